"""Shards behind a URL give the batches that local ones give, whatever the network does meanwhile; or the run stops."""

from __future__ import annotations

import dataclasses
import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from data.shard_server import ShardServer

from fastmoco.data import manifest as manifest_module
from fastmoco.data import remote, shard_set
from fastmoco.data.batch import Batch
from fastmoco.data.loader import Loader, announced
from fastmoco.data.manifest import DataError, Manifest, ShardManifest, scan, split
from fastmoco.data.plan import Plan
from fastmoco.data.quarantine import Quarantine
from fastmoco.data.shard_cache import ShardCache
from fastmoco.data.shard_source import Fetching, as_url, expanded
from fastmoco.presets import PRESETS
from fastmoco.recipe import Recipe

pytest.importorskip("aiohttp")
RECIPE = dataclasses.replace(PRESETS["v2"][1], batch_size=16, bn_group=4, crop_size=24)
WINDOWS = dataclasses.replace(RECIPE, order="windows", window_shards=2)
SHARDS = 6


@pytest.fixture(autouse=True)
def own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.01)


@pytest.fixture
def shards(photo_folder: Path, tmp_path: Path) -> Path:
    """The photographs in three classes, dealt out over six archives, with one file that is no image."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(SHARDS):
        with tarfile.open(folder / f"{number:06d}.tar", "w") as archive:
            for i, path in enumerate(sorted(photo_folder.iterdir())):
                if i % SHARDS == number:
                    archive.add(path, f"class {i % 3}/{path.name}")
            if number == 2:
                info = tarfile.TarInfo("class 0/page.jpg")
                info.size = 6
                archive.addfile(info, io.BytesIO(b"<html>"))
    return folder


@pytest.fixture
def server(shards: Path) -> Iterator[ShardServer]:
    with ShardServer(shards) as running:
        yield running


def batches(images: Manifest, recipe: Recipe = RECIPE, steps: range = range(6)) -> list[Batch]:
    place = SimpleNamespace(rank=0, world=1, device=torch.device("cpu"))
    plan = Plan(recipe, images.sizes, shards=images.shards)
    with Loader(images, plan, place, steps, quarantine=Quarantine(images, max_share=recipe.max_bad_share)) as loader:
        return list(loader)


def same(ours: list[Batch], theirs: list[Batch]) -> bool:
    names = ("query_crops", "key_crops", "query_parameters", "key_parameters", "origins")
    return len(ours) == len(theirs) and all(
        torch.equal(getattr(a, name), getattr(b, name)) for a, b in zip(ours, theirs, strict=True) for name in names
    )


def everything(images: Manifest) -> tuple:
    return images.paths, images.sizes.tolist(), images.labels.tolist(), images.classes, images.bytes, len(images)


@pytest.mark.parametrize("form", ["folder", "braces"])
def test_a_server_and_a_disk_give_the_same_images_and_batches(shards: Path, server: ShardServer, form: str) -> None:
    url = {"folder": server.url, "braces": server.url + "/{000000..000005}.tar"}[form]
    far, near = scan(url), scan(shards, cache=False)
    assert everything(far) == everything(near) and len(far) == 104
    assert [reason for _, reason in far.rejected] == [reason for _, reason in near.rejected] == ["not an image"]
    assert same(batches(far), batches(near))
    assert same(batches(far, WINDOWS), batches(near, WINDOWS))


def test_a_path_that_is_a_url_is_one_and_holds_no_secrets() -> None:
    assert as_url(Path("s3://bucket/a b")) == as_url("s3:/bucket/a b") == "s3://bucket/a b"
    assert as_url("/data/train") is None and as_url("a:b") is None and split("gs://b/x") == ("gs://b/x", None)
    for secret in ("https://me:word@host/x", "s3://b/x?X-Amz-Signature=1"):
        with pytest.raises(DataError, match="would be written into the run's records") as caught:
            as_url(secret)
        assert "word" not in str(caught.value) and "Signature" not in str(caught.value)


def test_braces_count_as_a_shell_does() -> None:
    assert expanded("a{008..011}b") == ["a008b", "a009b", "a010b", "a011b"]
    assert expanded("{0..1}/{1..2}") == ["0/1", "0/2", "1/1", "1/2"] and expanded("plain{}") == ["plain{}"]
    with pytest.raises(DataError, match="counts down from 3 to 1"):
        expanded("{3..1}")


FAULTS = ("503", "cut", "lost", "slow")


@pytest.mark.parametrize("recipe", [RECIPE, WINDOWS], ids=["ranges", "windows"])
def test_one_failing_request_in_ten_changes_nothing(shards: Path, server: ShardServer, recipe: Recipe) -> None:
    step = 10 if recipe is RECIPE else 4  # whole shards take few requests
    server.fault = lambda number: FAULTS[number // step % 4] if number % step == 3 else ""
    far = scan(server.url, fetching=Fetching(0 if recipe is RECIPE else 1, patience=20))
    far.source.whole = recipe is WINDOWS
    assert same(batches(far, recipe), batches(scan(shards, cache=False), recipe))
    assert server.number > 5 * step - 6 and len(Quarantine(far)) == 0


def test_a_server_that_has_gone_stops_the_run_in_one_line_and_blames_no_image(
    shards: Path, server: ShardServer, tmp_path: Path
) -> None:
    far = scan(server.url, fetching=Fetching(0, patience=0.2))
    whole = batches(scan(shards, cache=False), steps=range(12))
    place = SimpleNamespace(rank=0, world=1, device=torch.device("cpu"))
    quarantine, got = Quarantine(far, tmp_path / "quarantine.jsonl"), []
    loader = Loader(far, Plan(RECIPE, far.sizes), place, range(12), quarantine=quarantine)
    with loader, pytest.raises(DataError) as caught:
        for batch in loader:
            got.append(batch)
            if len(got) == 2:
                server.close()
    assert "\n" not in str(caught.value) and "no image was noted as bad; repeat the command with --resume" in str(
        caught.value
    )
    assert not (tmp_path / "quarantine.jsonl").exists() and same(got, whole[: len(got)])
    server.open()
    assert same(batches(far, steps=range(len(got), 12)), whole[len(got) :])


def test_a_run_keeps_its_images_and_opens_them_without_listing(server: ShardServer, tmp_path: Path) -> None:
    far = scan(server.url)
    far.save(tmp_path / "images.npz")
    server.asked.clear()
    again = Manifest.load(tmp_path / "images.npz", server.url)
    assert everything(again)[:4] == everything(far)[:4] and not server.asked and again.others() == ""
    assert same(batches(again), batches(far))


def test_windows_fetch_each_shard_once_a_machine_and_an_epoch(server: ShardServer) -> None:
    """Four ranks with one cache between them; the control: image by image a shard is asked for again and again."""
    far = scan(server.url, fetching=Fetching(cache_gb=0))
    epoch = Plan(WINDOWS, far.sizes, shards=far.shards).steps_per_epoch

    def asked(world: int, cache_gb: float) -> tuple[list[list[int]], dict[str, int]]:
        folder, samples = server.folder.parent / f"kept {world}", [[] for _ in range(epoch)]
        ranks = []
        for rank in range(world):
            images = scan(server.url, fetching=Fetching(cache_gb, folder))
            images.source.whole = bool(cache_gb)
            ranks.append((images, Plan(WINDOWS, images.sizes, world, rank, images.shards)))
        server.asked.clear()
        for step in range(epoch):
            for images, plan in ranks:
                mine = plan.samples(step)[plan.rank * plan.per_rank :][: plan.per_rank].tolist()
                samples[step] += mine
                for index in mine:
                    images.read(index)
        return samples, {name: count for name, count in server.asked.items() if name.endswith(".tar")}

    one, counted = asked(1, 1)
    assert set(counted.values()) == {1} and len(counted) == SHARDS
    for world in (2, 4):
        several, again = asked(world, 1)
        assert several == one and again == counted
    _, singly = asked(1, 0)
    assert min(singly.values()) > 3


def test_a_shard_that_another_process_removes_is_fetched_again(
    server: ShardServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its images are not noted as ones that cannot be read."""
    far, get, removed = scan(server.url, fetching=Fetching(1)), ShardCache.get, []
    far.source.whole, expected = True, far.read(0)

    def get_and_lose(*arguments: object) -> Path:
        path = get(*arguments)
        if len(removed) < 2:
            removed.append(path)
            path.unlink()
        return path

    monkeypatch.setattr(ShardCache, "get", get_and_lose)
    for path in far.source.cache.folder.iterdir():
        path.unlink()
    np.testing.assert_array_equal(far.read(0), expected)
    assert len(removed) == 2


def test_the_first_window_of_an_epoch_is_fetched_before_its_first_step_and_nothing_after_the_last(
    server: ShardServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    far = scan(server.url, fetching=Fetching(1))
    far.source.whole, said = True, []
    monkeypatch.setattr(far.source, "fetch_ahead", said.append)
    plan = Plan(WINDOWS, far.sizes, shards=far.shards)
    end = plan.steps_per_epoch
    first = {far.archives[shard] for shard in plan.windows(end)[0].tolist()}
    for step in announced(far, plan, range(end + 1)):
        if step == end - 1:
            assert first <= set(said[-1])
    said.clear()
    list(announced(far, plan, range(end)))
    of_epoch = [far.archives[shard] for each in plan.windows(0, ahead=10**6)[:3] for shard in each.tolist()]
    assert sorted(of_epoch) == far.archives
    assert list(dict.fromkeys(name for names in said for name in names)) == of_epoch
    assert said[-1] == of_epoch[-2:]  # the control: those of the next epoch would follow
    said.clear()
    far.source.cache.limit = 3 * max(shard.bytes for shard in far.source.known.values())  # has no room for two windows
    list(announced(far, plan, range(end + 3)))
    assert said[0] == of_epoch[:2] and max(map(len, said)) == 4  # where a batch has images of two windows


def test_many_images_share_a_table_in_the_order_of_their_shards(
    shards: Path, server: ShardServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest_module, "TABLE_UP_TO", 50)
    monkeypatch.setattr(shard_set, "LARGE_BYTES", 0)
    far, near, before = scan(server.url), scan(shards), scan(server.url)
    assert isinstance(far, ShardManifest) and isinstance(near, ShardManifest) and len(far) == len(near) == 104
    assert far.table.digest == near.table.digest and list(far.content()) == list(near.content())
    homes = [far.name(index).split("/")[0] for index in range(104)]
    assert homes == sorted(homes) and [far.find(far.name(index)) for index in (0, 50, 103)] == [0, 50, 103]
    assert far.find("000009.tar/none") is None and far.find("000001.tar/none") is None
    recipe = dataclasses.replace(RECIPE, order="keyed")
    assert same(batches(far, recipe), batches(near, recipe)) and same(batches(far, WINDOWS), batches(near, WINDOWS))
    for images, source in ((far, server.url), (near, str(shards))):
        images.save(tmp_path / "run.npz")
        assert (tmp_path / "run.npz").stat().st_size < 6000  # a reference and a digest
        again = Manifest.load(tmp_path / "run.npz", source)
        assert same(batches(again, recipe), batches(before, recipe)) and again.others() == again.absence() == ""
        assert again.rejected[:] == [("000002.tar/class 0/page.jpg", "not an image")]


def test_a_table_of_other_classes_is_refused(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_module, "TABLE_UP_TO", 50)
    monkeypatch.setattr(shard_set, "LARGE_BYTES", 0)
    table = scan(shards)
    assert np.array_equal(scan(shards, classes=table.classes).labels[:], table.labels[:])
    with pytest.raises(DataError, match="its classes are not those of the training part"):
        scan(shards, classes=["another", *table.classes])


@pytest.mark.parametrize("harm", ["records", "shards.npz"])
def test_a_damaged_table_is_made_again(shards: Path, monkeypatch: pytest.MonkeyPatch, harm: str) -> None:
    monkeypatch.setattr(manifest_module, "TABLE_UP_TO", 50)
    monkeypatch.setattr(shard_set, "LARGE_BYTES", 0)
    first = scan(shards)
    (first.table.folder / harm).write_bytes(b"damaged")
    again, third = scan(shards), scan(shards, cache=False)
    assert again.table.digest == third.table.digest == first.table.digest and list(again.paths) == list(third.paths)


def test_shards_that_are_added_are_the_only_ones_read_and_a_run_keeps_its_own(
    shards: Path, server: ShardServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest_module, "TABLE_UP_TO", 50)
    last = (shards / "000005.tar").rename(tmp_path / "000005.tar")
    first = scan(server.url, fetching=Fetching(0))
    first.save(tmp_path / "run.npz")
    last.rename(shards / "000005.tar")
    server.asked.clear()
    second = scan(server.url, fetching=Fetching(0))
    assert len(second) == 104 > len(first) == len(Manifest.load(tmp_path / "run.npz", server.url))
    assert server.sent["000005.tar"] > 0 and [name for name in server.asked if server.asked[name] > 1] == ["000005.tar"]
    np.testing.assert_array_equal(second.sizes[: len(first)], first.sizes[:])


def test_what_is_missing_is_told_in_one_line(server: ShardServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"/000006.tar: no such shard"):
        scan(server.url + "/{000000..000009}.tar")
    with pytest.raises(DataError, match="no .tar files there"):
        (server.folder / "empty").mkdir()
        scan(server.url + "/empty")
    with pytest.raises(DataError, match=r"needs fsspec and s3fs: pip install .* '\.\[remote\]'"):
        monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
        scan("s3://bucket/set")


def test_a_list_that_tells_sizes_is_all_that_is_asked_for(shards: Path) -> None:
    """As object stores do: another protocol than HTTP, and one request for all shards."""
    fsspec = pytest.importorskip("fsspec")
    store = fsspec.filesystem("memory")
    for path in shards.iterdir():
        store.pipe(f"/set/{path.name}", path.read_bytes())
    far = scan("memory://set")
    assert [shard.bytes for shard in far.source.shards()] == [path.stat().st_size for path in sorted(shards.iterdir())]
    assert everything(far) == everything(scan(shards, cache=False)) and same(batches(far), batches(scan(shards)))
    store.rm("/set", recursive=True)
