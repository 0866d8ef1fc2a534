"""A folder that was packed is the same set: what is left out is listed, and an end half way costs nothing."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from data.test_remote import batches, same
from PIL import Image

from fastmoco.cli import main
from fastmoco.data import pack, shard_set, tars
from fastmoco.data.manifest import Manifest, scan
from fastmoco.options import DataPack, UsageError
from fastmoco.presets import PRESETS

RECIPE = dataclasses.replace(PRESETS["v2"][1], batch_size=16, bn_group=4, crop_size=24)
KEY = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")  # how WebDataset splits a member's name into key and field


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def dirty(tmp_path: Path, write_set: Callable[[Path, int], dict[str, str]]) -> Path:
    """100 small images and 10 broken ones in two class folders, and a text file."""
    write_set(tmp_path / "all", 160)
    for number, path in enumerate(sorted((tmp_path / "all").iterdir())):
        target = tmp_path / "dirty" / f"class {number % 2}" / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
    (tmp_path / "dirty" / "class 0" / "notes.txt").write_text("no image")
    return tmp_path / "dirty"


def packed(source: Path, out: Path, **flags: object) -> list[str]:
    pack.run(DataPack(source, out, **({"shard_mb": 1} | flags)))
    return sorted(path.name for path in out.glob("*.tar"))


def samples_of(out: Path) -> dict[str, dict[str, bytes]]:
    """What WebDataset makes of the shards: consecutive members of one key are a sample."""
    found: dict[str, dict[str, bytes]] = {}
    before = ""
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                key, ending = KEY.match(member.name).groups()
                assert key == before or key not in found
                assert ending not in found.setdefault(key, {})
                found[key][ending], before = archive.extractfile(member).read(), key
    return found


def test_a_dirty_folder_is_packed_and_what_is_left_out_is_listed(dirty: Path, tmp_path: Path, capsys) -> None:
    folder = scan(dirty, cache=False)
    assert len(packed(dirty, tmp_path / "out")) == 1
    said = capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "out" / "left_out.jsonl").read_text().splitlines()]
    assert [(line["file"], line["reason"]) for line in lines] == folder.rejected and len(lines) > 5
    assert f"{len(folder)} images in 1 shard," in said and f"left out  {len(lines)}:" in said
    found = scan(tmp_path / "out", cache=False)
    assert [path.removeprefix("x") for path in found.paths] == folder.paths and found.rejected == []
    np.testing.assert_array_equal(found.labels, folder.labels)
    assert (tmp_path / "out" / "classes.txt").read_text().split("\n")[:2] == folder.classes
    recipe = dataclasses.replace(RECIPE, max_bad_share=1.0)
    assert same(batches(found, recipe), batches(folder, recipe))
    for name, fields in samples_of(tmp_path / "out").items():
        data, number = fields[next(ending for ending in fields if ending != "cls")], int(fields["cls"])
        assert (dirty / folder.classes[number]).is_dir() and data in {p.read_bytes() for p in dirty.glob(f"{name}.*")}


def test_the_index_opens_the_set_without_reading_a_shard(
    dirty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed(dirty, tmp_path / "out")
    monkeypatch.setattr(shard_set.pieces, "read", lambda *_: pytest.fail("a shard was read"))
    found = scan(tmp_path / "out")
    with (tmp_path / "out" / "000000.tar").open("ab") as file:
        file.write(bytes(512))
    with pytest.raises(pytest.fail.Exception):  # the control: what is no longer what the index says is read again
        scan(tmp_path / "out")
    assert len(found) > 100


class Ended(Exception):
    pass


@pytest.mark.parametrize(("after", "shuffle"), [(0, False), (1, False), (1, True), (2, False)])
def test_a_pack_that_ends_half_way_goes_on(
    photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int, shuffle: bool
) -> None:
    whole = packed(photo_folder, tmp_path / "whole", shuffle=shuffle)
    assert len(whole) == 3
    kept, counted = tars.contents, []

    def end(path: str) -> tars.Members:
        counted.append(path)
        if len(counted) > after:
            raise Ended
        return kept(path)

    monkeypatch.setattr(tars, "contents", end)
    with pytest.raises(Ended):
        packed(photo_folder, tmp_path / "out", shuffle=shuffle)
    monkeypatch.setattr(tars, "contents", lambda path: counted.append(path) or kept(path))
    counted.clear()
    assert packed(photo_folder, tmp_path / "out", shuffle=shuffle) == whole and len(counted) == len(whole) - after
    for name in whole:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    counted.clear()
    packed(photo_folder, tmp_path / "out", shuffle=shuffle)
    assert not counted  # all is there
    (tmp_path / "out" / whole[1]).unlink()
    packed(photo_folder, tmp_path / "out", shuffle=shuffle)
    assert len(counted) == len(whole) - 1  # a shard that is gone, and those after it, are made again


def test_mixed_shards_hold_every_class_and_give_the_batches_of_the_folder(photo_folder: Path, tmp_path: Path) -> None:
    for number, path in enumerate(sorted(photo_folder.iterdir())):
        target = tmp_path / "set" / f"class {number * 4 // 104}" / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)

    def classes_of_the_first(out: Path) -> set[str]:
        with tarfile.open(out / "000000.tar") as archive:
            return {name.split("/")[0] for name in archive.getnames()}

    packed(tmp_path / "set", tmp_path / "mixed", shuffle=True)
    packed(tmp_path / "set", tmp_path / "plain")
    folder, found = scan(tmp_path / "set", cache=False), scan(tmp_path / "mixed", cache=False)
    assert classes_of_the_first(tmp_path / "mixed") == set(folder.classes)
    assert len(classes_of_the_first(tmp_path / "plain")) < 4  # the control
    assert samples_of(tmp_path / "mixed") == samples_of(tmp_path / "plain")
    np.testing.assert_array_equal(found.labels, folder.labels)
    assert same(batches(found), batches(folder))


def test_another_folder_or_other_flags_are_refused(photo_folder: Path, dirty: Path, tmp_path: Path) -> None:
    packed(photo_folder, tmp_path / "out")
    for source, flags in ((dirty, {}), (photo_folder, {"shard_mb": 2}), (photo_folder, {"shuffle": True})):
        with pytest.raises(UsageError, match="a pack of other images, or with other flags"):
            packed(source, tmp_path / "out", **flags)
    with pytest.raises(UsageError, match="is not empty, and no pack was begun there"):
        packed(photo_folder, dirty)


def test_images_are_shrunk_to_a_shorter_side(photo_folder: Path, tmp_path: Path) -> None:
    packed(photo_folder, tmp_path / "out", shorter_side=64)
    before, after = scan(photo_folder, cache=False), scan(tmp_path / "out", cache=False)
    stems = {path.rpartition(".")[0]: index for index, path in enumerate(after.paths)}
    small = transparent = 0
    for index, path in enumerate(before.paths):
        other = stems[path.rpartition(".")[0]]
        if "rgba" in path or min(before.sizes[index]) <= 64:
            assert before.read(index).tobytes() == after.read(other).tobytes()
            transparent += 1
        else:
            small += 1
            height, width = after.sizes[other].tolist()
            assert min(height, width) == 64 and after.paths[other].endswith(".jpg")
            assert abs(width / height / (before.sizes[index][1] / before.sizes[index][0]) - 1) < 0.03
            was = Image.open(io.BytesIO(before.read(index).tobytes())).convert("RGB").resize((width, height))
            now = np.asarray(Image.open(io.BytesIO(after.read(other).tobytes()))).astype(int)
            assert np.corrcoef(now.ravel(), np.asarray(was).ravel())[0, 1] > 0.95
            assert np.abs(now.mean((0, 1)) - np.asarray(was).mean((0, 1))).max() < 3
    assert small > 60 and transparent > 7


def test_names_become_keys_of_their_own(photo_folder: Path, tmp_path: Path) -> None:
    source, folder = next(photo_folder.glob("*jpeg.img")), tmp_path / "folder"
    names = ["a/x.1.jpg", "a/x.2.jpg", "a/y.jpg", "a/y.png", "b.c/z.jpg", "b.c/none", "b.c/odd.txt"]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, folder / name)
    assert pack.member_names(scan(folder, cache=False)) == [
        "a/x_1.jpg",
        "a/x_2.jpg",
        "a/y.jpg",
        "a/y_2.png",
        "b.c/none.jpg",
        "b.c/odd.jpg",
        "b.c/z.jpg",
    ]


def test_the_command_packs_training_and_validation_parts(photo_folder: Path, tmp_path: Path) -> None:
    for number, path in enumerate(sorted(photo_folder.iterdir())[:40]):
        target = tmp_path / "set" / ("train", "val")[number % 2] / f"class {number % 3}" / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    assert main(["data", "pack", str(tmp_path / "set"), "--out", str(tmp_path / "out"), "--shard-mb", "1"]) == 0
    train, val = scan(tmp_path / "out" / "train"), scan(tmp_path / "out" / "val")
    assert isinstance(train, Manifest) and train.classes == val.classes and len(train) == len(val) == 20
    assert main(["data", "pack", str(tmp_path / "set")]) == 2
    assert torch.is_tensor(batches(train, RECIPE, range(1))[0].origins)
