"""Tar archives: the same files give the same batches, an index is made once, what is wrong is told in one line."""

from __future__ import annotations

import dataclasses
import gzip
import io
import os
import shutil
import tarfile
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from data import odd_images as odd

from fastmoco.data import tars
from fastmoco.data.batch import Batch
from fastmoco.data.loader import Loader
from fastmoco.data.manifest import DataError, Manifest, scan
from fastmoco.data.pipeline import undecodable
from fastmoco.data.plan import Plan
from fastmoco.data.quarantine import Quarantine
from fastmoco.presets import PRESETS

RECIPE = dataclasses.replace(PRESETS["v2"][1], batch_size=32, bn_group=4, crop_size=24)
JPEG = odd.encoded(odd.COLOURS, "JPEG")
ALONE = SimpleNamespace(rank=0, world=1, device=torch.device("cpu"))


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pack(path: Path, members: Iterable[tuple[str, bytes]], **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def by_class(photo_folder: Path, tmp_path: Path) -> Path:
    """The photographs in three class folders."""
    for number, path in enumerate(sorted(photo_folder.iterdir())):
        target = tmp_path / "folder" / f"class {number % 3}" / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    return tmp_path / "folder"


@pytest.fixture
def shards(by_class: Path, tmp_path: Path) -> Path:
    """The same files, dealt out over three archives, in another order."""
    members = [(str(path.relative_to(by_class)), path.read_bytes()) for path in sorted(by_class.rglob("*.img"))]
    for number in range(3):
        pack(tmp_path / "shards" / f"{number}.tar", reversed(members[number::3]))
    return tmp_path / "shards"


def batches(manifest: Manifest) -> list[Batch]:
    with Loader(manifest, Plan(RECIPE, manifest.sizes), ALONE, range(4)) as loader:
        return list(loader)


def same(a: Manifest, b: Manifest) -> bool:
    arrays = all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("sizes", "labels"))
    return a.paths == b.paths and a.classes == b.classes and a.bytes == b.bytes and arrays


def test_archives_and_a_folder_give_the_same_batches(by_class: Path, shards: Path, tmp_path: Path) -> None:
    folder, packed = scan(by_class), scan(shards)
    assert same(folder, packed) and folder.classes == ["class 0", "class 1", "class 2"]
    assert all(np.array_equal(folder.read(i), packed.read(i)) for i in range(len(folder)))
    pairs = list(zip(batches(folder), batches(packed), strict=True))
    for a, b in pairs:
        assert all(
            np.array_equal(np.asarray(x), np.asarray(y))
            for x, y in zip(vars(a).values(), vars(b).values(), strict=True)
        )
    assert not torch.equal(pairs[0][0].query_crops, pairs[1][1].query_crops)  # the control
    (tmp_path / "list.txt").write_text("shards/0.tar\nshards/1.tar\n" + str(shards / "2.tar") + "\n")
    assert same(scan(tmp_path / "list.txt"), folder)
    assert len(scan(shards / "0.tar")) == 35 and packed.path(0).startswith(str(shards))


def test_the_index_is_made_once_and_again_when_the_archive_changed(
    shards: Path, cache_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, read, calls = scan(shards), tars._read, []
    monkeypatch.setattr(tars, "_read", lambda path, status: calls.append(path) or read(path, status))
    assert same(scan(shards), first) and calls == []
    os.utime(shards / "1.tar")
    assert same(scan(shards), first) and calls == [str(shards / "1.tar")]
    calls.clear()
    for path in cache_home.rglob("tar-*"):
        path.write_bytes(path.read_bytes()[:100])  # a damaged index is made again
    assert same(scan(shards), first) and len(calls) == 3
    monkeypatch.setenv("XDG_CACHE_HOME", str(shards / "0.tar"))  # and where none can be kept, it is made each time
    assert same(scan(shards), first) and len(calls) == 6


def test_webdataset_layout(tmp_path: Path, photo_folder: Path) -> None:
    data = next(photo_folder.iterdir()).read_bytes()
    long = "deep/" * 40 + "long name é"
    members = [
        ("./0001.jpg", data),
        ("./0001.cls", b"7"),
        ("0002.jpg", data),
        ("0002.cls", b"10\n"),
        ("0002.json", b"{}"),
        ("a/0003.seg.png", data),
        ("a/0003.cls", b"7"),
        (f"{long}.jpg", data),
        (f"{long}.cls", b"10"),
        (".hidden.jpg", data),
    ]
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        images = scan(pack(tmp_path / f"{kind}.tar", members, format=kind))
        assert images.paths == ["0001.jpg", "0002.jpg", "a/0003.seg.png", f"{long}.jpg"] and not images.rejected
        assert images.classes == ["7", "10"] and images.labels.tolist() == [0, 1, 0, 1]
        assert all(bytes(images.read(i)) == data for i in range(4))


def test_bad_members_are_left_out_or_quarantined_by_their_names(tmp_path: Path, shards: Path) -> None:
    good = scan(shards)
    members = [(path, good.read(i).tobytes()) for i, path in enumerate(good.paths)]
    jpegs = [i for i, (path, _) in enumerate(members) if " jpeg." in path]
    members[jpegs[0]] = (members[jpegs[0]][0], members[jpegs[0]][1][:-100])
    torn = members[jpegs[1]][1]
    tables = torn.index(b"\xff\xdb")  # without them a header tells nothing amiss
    rest = torn[tables + 2 + int.from_bytes(torn[tables + 2 : tables + 4], "big") :]
    while rest.startswith(b"\xff\xdb"):
        rest = rest[2 + int.from_bytes(rest[2:4], "big") :]
    members[jpegs[1]] = (members[jpegs[1]][0], torn[:tables] + rest)
    manifest = scan(pack(tmp_path / "one.tar", members))
    assert manifest.rejected == [(members[jpegs[0]][0], "truncated")]
    quarantine = Quarantine(manifest, None, 0.1)
    plan = Plan(RECIPE, manifest.sizes)
    with Loader(manifest, plan, ALONE, range(6), quarantine=quarantine) as loader:
        assert len(list(loader)) == 6
    seen = {int(sample) for step in range(6) for sample in plan.samples(step)}
    name = members[jpegs[1]][0]
    assert manifest.find(name) in seen and [bad.file for bad in quarantine.news] == [name]
    full = scan(tmp_path / "one.tar", decode=undecodable)
    assert {path for path, _ in full.rejected} == {members[i][0] for i in jpegs[:2]}


def sized(data: bytes, size: bytes) -> bytes:
    """The archive with another size in its first header, whose checksum is right."""
    head = bytearray(data[:512])
    head[124:136], head[148:156] = size, b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head) + data[512:]


def do_harm(path: Path, harm: str) -> None:
    data = path.read_bytes()
    content = {
        "cut in a member": data[: len(data) // 2],
        "cut between members": data.rstrip(b"\0"),
        "cut to nothing": b"",
        "damaged": data[:1024] + data[1024:].replace(b"ustar", b"rusty"),
        "compressed": gzip.compress(data[:4096]),
        "no tar": b"x" * 4096,
        "size beyond all": sized(data, b"\x80" + bytes(3) + b"\x7f" + b"\xff" * 7),
        "size below 0": sized(data, b"\xff" * 12),
    }[harm]
    if harm == "cut between members":  # without the blocks of zeros at the end
        with tarfile.open(path) as archive:
            last = archive.getmembers()[-1]
        content = data[: last.offset_data + -(-last.size // 512) * 512]
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        ("cut in a member", "is cut short"),
        ("cut between members", "is cut short"),
        ("cut to nothing", "tar"),
        ("damaged", "is damaged at byte"),
        ("compressed", "unpack it"),
        ("no tar", "no tar that can be read"),
        ("size beyond all", "no tar that can be read"),
        ("size below 0", "is damaged"),
    ],
)
def test_a_harmed_archive_is_one_clear_line(shards: Path, harm: str, says: str) -> None:
    do_harm(shards / "1.tar", harm)
    with pytest.raises(DataError, match=says) as error:
        scan(shards)
    assert str(error.value).startswith(f"{shards / '1.tar'}: ") and "\n" not in str(error.value)
    assert error.value.exit_code == 3


def test_a_name_that_is_there_twice_is_refused(shards: Path) -> None:
    shutil.copy(shards / "1.tar", shards / "copy.tar")
    with pytest.raises(DataError, match=r"is there twice, in .*1.tar and in .*copy.tar: remove"):
        scan(shards)
    with pytest.raises(DataError, match="no such folder, list of files or tar"):
        scan(shards / "missing.tar")


def test_a_manifest_is_saved_and_loaded_elsewhere(by_class: Path, shards: Path, tmp_path: Path) -> None:
    for source in (by_class, shards, shards / "0.tar"):
        manifest = scan(source)
        manifest.save(tmp_path / "images.npz")
        assert same(Manifest.load(tmp_path / "images.npz", source), dataclasses.replace(manifest, bytes=0))
    moved = shards.rename(tmp_path / "moved")
    again = Manifest.load(tmp_path / "images.npz", moved / "0.tar")
    assert len(again.read(0)) > 100
    (tmp_path / "images.npz").write_bytes(b"torn")
    with pytest.raises(DataError, match="missing or damaged"):
        Manifest.load(tmp_path / "images.npz", moved)


def make(path: Path, *members: tuple[str, bytes | str], **options: object) -> Path:
    """A tar of files (bytes) and links: "=target" is a hard one, ">target" a symbolic one."""
    with tarfile.open(path, "w", **options) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.LNKTYPE if content[0] == "=" else tarfile.SYMTYPE, content[1:]
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path


def test_archives_joined_by_cat_are_read_to_the_last_end(tmp_path: Path) -> None:
    parts = [make(tmp_path / f"{i}.tar", (f"{i}.jpg", JPEG), (f"{i}.cls", str(i % 2).encode())) for i in range(3)]
    merged_sum = tmp_path / "joined.tar"
    merged_sum.write_bytes(b"".join(part.read_bytes() for part in parts))
    for part in parts:
        part.unlink()
    for _ in range(2):  # the second time from the cache
        images = scan(merged_sum)
        assert images.paths == ["0.jpg", "1.jpg", "2.jpg"] and images.labels.tolist() == [0, 1, 0]
        assert all(bytes(images.read(i)) == JPEG for i in range(3))
    # What follows that is no archive is counted, and a damaged header in the middle is an error.
    merged_sum.write_bytes(merged_sum.read_bytes() + b"something else".ljust(512, b"!"))
    assert scan(merged_sum).rejected == [("joined.tar", "512 bytes after its end are no archive")]
    data = bytearray(merged_sum.read_bytes())
    data[data.index(b"1.cls") + 20] ^= 1
    merged_sum.write_bytes(data)
    with pytest.raises(DataError, match="damaged|no tar"):
        scan(merged_sum)


@pytest.mark.parametrize("between", ["nothing", "an empty archive", "records of zeros"])
def test_whatever_lies_between_joined_archives(tmp_path: Path, between: str) -> None:
    one, two = (make(tmp_path / f"{i}.tar", (f"{i}.jpg", JPEG)).read_bytes() for i in "ab")
    gap = {"nothing": b"", "an empty archive": bytes(10240), "records of zeros": bytes(3_000_000 // 512 * 512)}[between]
    (tmp_path / "a.tar").write_bytes(one + gap + two)
    (tmp_path / "b.tar").unlink()
    assert scan(tmp_path / "a.tar").paths == ["a.jpg", "b.jpg"]


def test_links_in_an_archive_are_followed_or_counted(tmp_path: Path) -> None:
    path = make(
        tmp_path / "links.tar",
        ("a/x.jpg", JPEG),
        ("b/hard.jpg", "=a/x.jpg"),
        ("b/soft.jpg", ">../a/x.jpg"),
        ("b/chain.jpg", ">soft.jpg"),
        ("b/lost.jpg", ">../gone.jpg"),
        ("b/circle.jpg", ">circle.jpg"),
        ("b/pipe", JPEG),
    )
    for _ in range(2):
        images = scan(path)
        assert images.paths == ["a/x.jpg", "b/chain.jpg", "b/hard.jpg", "b/pipe", "b/soft.jpg"]
        assert all(bytes(images.read(i)) == JPEG for i in range(5)) and images.classes == ["a", "b"]
        assert [name for name, _ in images.rejected] == ["b/circle.jpg", "b/lost.jpg"]


def test_labels_of_keys_with_dots(tmp_path: Path) -> None:
    pairs = [(f"s{i}.{kind}", JPEG if "jpg" in kind else b"ab"[i % 2 :][:1])
             for i in range(4) for kind in ("input.jpg", "output.cls", "meta.json")]  # fmt: skip
    images = scan(make(tmp_path / "dots.tar", *pairs))
    assert images.paths == [f"s{i}.input.jpg" for i in range(4)] and not images.rejected
    assert images.classes == ["a", "b"] and images.labels.tolist() == [0, 1, 0, 1]
    exact = scan(make(tmp_path / "exact.tar", *pairs, ("s0.cls", b"b"), ("s2.cls", b"b")))
    assert exact.labels is None  # KEY.cls counts more, and so all are b: a single class is none
    with pytest.raises(DataError, match="s1 has several classes"):
        scan(make(tmp_path / "two.tar", *pairs, ("s1.other.cls", b"a")))


def test_nothing_in_an_archive_vanishes_uncounted(tmp_path: Path) -> None:
    """Every member that is no folder is an image, a class that was read, counted by its ending, or named."""
    members: list[tuple[str, bytes | str]] = [
        ("x.jpg", JPEG),
        ("x.cls", b"7"),
        ("x.json", b"{}"),
        ("x.TXT", b"a caption"),
        ("y.jpg", JPEG),
        ("y.cls", b"8"),
        ("x.cls", b"5"),
        ("y.txt", ">x.TXT"),
        ("gone.cls", b"9"),
        (".DS_Store", b"litter"),
        ("._x.jpg", b"a Mac's"),
        ("@eaDir/x.jpg", JPEG),
        ("readme.md", b"text"),
        ("lost.jpg", "=gone.jpg"),
        ("z.jpg", b""),
        ("", JPEG),
        ("v.cls", b" "),
        ("../up.jpg", JPEG),
    ]
    path = make(tmp_path / "all.tar", *members)
    for _ in range(2):  # the second time from the cache
        found = scan(path)
        assert found.paths == ["x.jpg", "y.jpg"] and found.classes == ["5", "8"]
        assert found.passed == {".json": 1, ".txt": 2, "hidden": 2}
        assert dict(found.rejected) == {
            "@eaDir/x.jpg": "left by a system beside the images",
            "gone.cls": "the class of no image",
            "lost.jpg": "link to gone.jpg, which the archive does not hold",
            "readme.md": "not an image",
            "x.cls": "replaced by a later member of the same name",
            "z.jpg": "empty file",
            "../up.jpg": "in no class, where the others are",
            "": "a member without a name",
            "v.cls": "an empty class",
        }
        classes = 2
        assert len(found) + classes + sum(found.passed.values()) + len(found.rejected) == len(members)


def test_of_two_members_of_one_name_the_later_counts(tmp_path: Path) -> None:
    other = odd.encoded(np.zeros((20, 30, 3), np.uint8), "JPEG")
    images = scan(make(tmp_path / "twice.tar", ("x.jpg", JPEG), ("x.jpg", other), (".hidden/y.jpg", JPEG)))
    assert images.paths == ["x.jpg"] and bytes(images.read(0)) == other
    assert images.rejected == [("x.jpg", "replaced by a later member of the same name")]


def test_windows_take_the_images_of_few_archives_at_a_time(shards: Path, by_class: Path) -> None:
    found = scan(shards)
    recipe = dataclasses.replace(RECIPE, batch_size=8, order="windows", window_shards=1)
    plan = Plan(recipe, found.sizes, shards=found.shards)
    with Loader(found, plan, ALONE, range(plan.steps_per_epoch)) as loader:
        seen = np.concatenate([batch.sample for batch in loader])
    homes = found.places[seen, 0]
    assert len(np.unique(seen)) == 104 == len(found) and np.count_nonzero(np.diff(homes)) == 2
    assert sorted(found.paths[i] for i in seen.tolist()) == found.paths
    assert scan(by_class).shards is None  # files of their own stand in no archive
