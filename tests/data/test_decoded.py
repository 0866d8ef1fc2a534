"""Images that are kept decoded change nothing but the time it takes, and never take more than they were given."""

from __future__ import annotations

import dataclasses
import math
import os
import time
import weakref
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from batches import ALONE, CPU, all_equal, batches
from PIL import Image

from fastmoco.data import loader as loader_module
from fastmoco.data import pipeline as pipeline_module
from fastmoco.data import request as request_module
from fastmoco.data.batch import Batch
from fastmoco.data.decoded import PIXEL, SMALL, PixelCache, bytes_decoded
from fastmoco.data.loader import EvaluationLoader, Loader, Loading
from fastmoco.data.manifest import Manifest, scan
from fastmoco.data.pipeline import Pipeline
from fastmoco.data.plan import Plan
from fastmoco.data.quarantine import Quarantine
from fastmoco.data.request import DecodeError, Request
from fastmoco.options import Options, UsageError
from fastmoco.presets import PRESETS
from fastmoco.runs import checkpoint
from fastmoco.train.job import Job
from fastmoco.train.loop import pretrain

RECIPE = dataclasses.replace(PRESETS["v2"][1], batch_size=40, bn_group=4, crop_size=24, max_bad_share=0.1)
STEPS = range(15)
MIB = 2**20


def dali_crops(requests: object, repair: object, batch: int, size: int, views: int, *rest: object) -> object:
    """As on a GPU, but by DALI's operators for a CPU: without a cache in one pipeline, with one in two."""
    threads, kept = rest
    return pipeline_module._dali_crops(requests, repair, batch, size, views, CPU, threads, {}, kept)


@pytest.fixture(params=["torch", "dali"])
def cutter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Cut as on a CPU, or as on a GPU: by torch or DALI."""
    if request.param == "dali":
        monkeypatch.setattr(pipeline_module, "_cpu_crops", dali_crops)
    return request.param


@pytest.fixture
def caches(monkeypatch: pytest.MonkeyPatch) -> list[PixelCache]:
    """All that loaders make from now on."""
    calls = []
    monkeypatch.setattr(loader_module, "PixelCache", lambda *options: calls.append(PixelCache(*options)) or calls[-1])
    return calls


def draw(manifest: Manifest, budget: int, parallel: Any = ALONE, **options: Any) -> list[Batch]:
    return batches(manifest, RECIPE, STEPS, parallel, decoded_bytes=budget, **options)


def pixels(manifest: Manifest) -> int:
    return 3 * int(manifest.sizes.prod(1).sum())


def image(height: int, width: int, value: int) -> torch.Tensor:
    return torch.full((height, width, 3), value, dtype=torch.uint8)


def test_who_comes_first_stays_and_the_budget_holds() -> None:
    cache = PixelCache(100)
    for sample, (height, width) in enumerate([(2, 5), (4, 5), (3, 4), (2, 1)]):  # 30, 60, 36 and 6 bytes
        cache.put(sample, image(height, width, sample))
    assert [sample in cache for sample in range(4)] == [True, True, False, True]
    assert cache.fill == 96 and len(cache) == 3
    cache.put(0, image(2, 5, 99))  # another time changes nothing
    result = cache.complete(np.array([3, 7, 0]), [PIXEL, b"any", PIXEL], [image(9, 9, 7)])
    for expected, actual in zip([image(2, 1, 3), image(9, 9, 7), image(2, 5, 0)], result, strict=True):
        assert torch.equal(actual, expected)
    assert cache.fill == 96 and 7 not in cache


def test_what_is_kept_is_a_copy() -> None:
    cache, shown = PixelCache(30), image(2, 5, 1)
    cache.put(0, shown)
    shown.zero_()
    assert torch.equal(cache.complete(np.array([0]), [PIXEL], [image(1, 1, 0)])[0], image(2, 5, 1))


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_batches_are_the_same_and_what_fits_is_read_once(
    photo_manifest: Manifest, monkeypatch: pytest.MonkeyPatch, caches: list[PixelCache], cutter: str, share: float
) -> None:
    expected = draw(photo_manifest, 0)
    reads: Counter[int] = Counter()
    original = Manifest.read
    monkeypatch.setattr(Manifest, "read", lambda self, i, *place: (reads.update([i]), original(self, i, *place))[1])
    budget = int(share * pixels(photo_manifest))
    for options in ({"threads": 1}, {"threads": 3, "prefetch": 5}):
        assert all_equal(draw(photo_manifest, budget, **options), expected)
    once = sum(count == 2 for count in reads.values())  # in each of the two runs
    # An epoch leaves a rest of 24 out; and one that is used again at once is read before it is kept, as more are where
    # DALI has whole batches under way.
    assert all(0.8 * budget < kept.fill <= budget for kept in caches)
    least = 0.15 if share < 1 else {"torch": 0.6, "dali": 0.3}[cutter]
    assert once > least * len(photo_manifest)
    reads.clear()
    draw(photo_manifest, 0)
    assert min(reads.values()) > 1  # the control


@pytest.mark.usefixtures("cutter")
def test_another_images_pixels_would_be_noticed(photo_manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the test above."""
    put = PixelCache.put
    monkeypatch.setattr(PixelCache, "put", lambda self, sample, image: put(self, sample, image.flip(0)))
    assert not all_equal(draw(photo_manifest, pixels(photo_manifest)), draw(photo_manifest, 0))


def test_what_is_kept_is_never_decoded_again(
    photo_manifest: Manifest, monkeypatch: pytest.MonkeyPatch, cutter: str
) -> None:
    arguments, original = [], pipeline_module._encoded
    monkeypatch.setattr(
        pipeline_module, "_encoded", lambda part: arguments.append(original(part)[0]) or (arguments[-1],)
    )
    draw(photo_manifest, pixels(photo_manifest))
    assert all(arguments)  # DALI is given no batch without an image
    assert sum(data is not PIXEL for batch in arguments for data in batch) < 2 * len(photo_manifest)
    if cutter == "dali":
        assert len(arguments[-1]) == 1 and arguments[-1][0] is PIXEL
    arguments.clear()
    draw(photo_manifest, 0)
    # The control; DALI's one pipeline gets images and boxes together.
    assert sum(map(len, arguments)) == (15 * RECIPE.batch_size if cutter == "torch" else 0)


def test_batches_that_are_kept_whole_are_cut_and_nothing_else(
    photo_manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No file is read, no header looked at, no DALI called once an epoch is over and what was under way is done."""
    images = photo_manifest.take(range(80))  # two batches, and none left over
    expected, calls = draw(images, 0), Counter()

    def count(module: Any, name: str) -> None:
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given, **named: (calls.update([name]), original(*given, **named))[1])

    for module, name in ((loader_module, "read"), (request_module, "examine"), (pipeline_module, "_encoded")):
        count(module, name)
    plan, result, seen = Plan(RECIPE, images.sizes), [], []
    with Loader(images, plan, ALONE, STEPS, Loading(2, 1, decoded_bytes=pixels(images))) as loader:
        for batch in loader:
            result.append(batch)
            seen.append(Counter(calls))
    assert all_equal(result, expected)
    assert seen[8] == seen[-1] and set(calls) == {"read", "examine", "_encoded"}
    calls.clear()
    draw(images, 0)
    assert calls["read"] == calls["examine"] == 15 * RECIPE.batch_size  # the control


def test_batches_may_be_kept_whole_or_not_in_any_turn(
    photo_manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, pipelines = dataclasses.replace(RECIPE, batch_size=2, bn_group=2), []
    original = pipeline_module._dali
    monkeypatch.setattr(pipeline_module, "_dali", lambda *given: pipelines.append(given) or original(*given))
    images = photo_manifest.take(range(40))
    budgets = 0, pixels(images) // 2
    expected, drawn = (batches(images, recipe, range(60), decoded_bytes=budget, threads=1) for budget in budgets)
    assert all_equal(drawn, expected) and len(pipelines) > 4  # one for each turn away from what is kept


def test_dalis_cutter_is_not_the_one_of_torch(photo_manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the fixture `cutter`."""
    expected = draw(photo_manifest, 0)
    monkeypatch.setattr(pipeline_module, "_cpu_crops", dali_crops)
    result = draw(photo_manifest, 0)
    for a, b in zip(result, expected, strict=True):
        assert 0 < (a.query_crops.int() - b.query_crops.int()).abs().float().mean() < 0.5


@pytest.mark.usefixtures("cutter")
def test_a_damaged_image_among_kept_ones_is_named(photo_manifest: Manifest) -> None:
    """And none of its batch is kept."""
    indices = np.arange(20)
    sizes, cache = photo_manifest.sizes[indices], PixelCache(pixels(photo_manifest))
    boxes = np.stack([np.concatenate([np.zeros_like(sizes), sizes], 1)])
    first = Request([*map(str, indices)], [photo_manifest.read(i) for i in indices], sizes, boxes, 0, indices)
    good = first._replace(encoded=[PIXEL if i % 3 else data for i, data in enumerate(first.encoded)])
    bad = good._replace(encoded=[*good.encoded], samples=indices + 20)
    bad.encoded[6] = bad.encoded[6][: len(bad.encoded[6]) // 2].copy()
    for i in indices[indices % 3 > 0]:
        cache.put(i + 20, image(*sizes[i], i))
    options = {"batch_size": 25, "crop_size": 32, "views": 1, "device": CPU, "threads": 1, "cache": cache}
    (expected,) = Pipeline(iter([first]), **options)
    pipe = Pipeline(iter([good, good, bad, good]), **options)
    assert torch.equal(next(pipe), expected) and torch.equal(next(pipe), expected)
    with pytest.raises(DecodeError) as error:
        next(pipe)
    assert error.value.positions == [6] and 26 not in cache and 20 not in cache
    with pytest.raises(StopIteration):
        next(pipe)


@pytest.mark.usefixtures("cutter")
def test_bad_images_are_never_kept(
    tmp_path: Path, write_set: Callable[[Path, int], dict[str, str]], caches: list[PixelCache]
) -> None:
    write_set(tmp_path / "dirty", 200)
    manifest = scan(tmp_path / "dirty", cache=False)
    batches, expected = [], []
    for budget, records in ((0, expected), (pixels(manifest), batches)):
        quarantine = Quarantine(manifest, None, 0.1)
        records += [draw(manifest, budget, quarantine=quarantine), list(quarantine.news)]
    bad = {manifest.find(record.file) for record in batches[1]}
    assert len(bad) == 4 and batches[1] == expected[1]
    assert all_equal(batches[0], expected[0])
    (kept,) = caches
    assert [sample in kept for sample in bad] == [False] * 4
    substitutes = {manifest.find(record.substitute) for record in batches[1]} - bad
    assert substitutes and all(sample in kept for sample in substitutes)


@pytest.mark.usefixtures("cutter")
def test_a_kept_image_outlives_its_file(tmp_path: Path, write_set: Callable[[Path, int], dict[str, str]]) -> None:
    for name in write_set(tmp_path / "data", 200).values():
        (tmp_path / "data" / name).unlink()
    manifest = scan(tmp_path / "data", cache=False)
    plan, expected = Plan(RECIPE, manifest.sizes), draw(manifest, 0)
    quarantine = Quarantine(manifest, None, 0.1)
    with Loader(manifest, plan, ALONE, STEPS, Loading(decoded_bytes=pixels(manifest)), quarantine) as loader:
        result = [next(loader)]
        os.remove(manifest.path(plan.samples(0)[0]))
        assert all_equal([*result, *loader], expected) and not quarantine.news


def test_memory_rises_by_the_budget_at_most(photo_manifest: Manifest, growth: Callable) -> None:
    draw(photo_manifest, 0)
    budget = pixels(photo_manifest) // 3
    with growth() as growth_of:
        draw(photo_manifest, 10**10)  # promised, and not taken: all images are 8 MB
    assert growth_of() < pixels(photo_manifest) + 40 * MIB
    cache = PixelCache(budget)
    with growth() as growth_of:
        for sample in range(200):
            cache.put(sample, image(200, 300, sample))
    assert cache.fill <= budget and growth_of() < budget + 2 * MIB


@pytest.mark.usefixtures("cutter")
def test_a_closed_loader_gives_its_memory_back(photo_manifest: Manifest, caches: list[PixelCache]) -> None:
    """At once: a run that goes back to a checkpoint has one loader after another, and a GPU no room for two blocks."""
    plan = Plan(RECIPE, photo_manifest.sizes)
    loader = Loader(photo_manifest, plan, ALONE, range(9), Loading(decoded_bytes=10**7))
    next(loader)
    kept = weakref.ref(caches.pop())
    assert kept() is not None
    loader.close()
    assert kept() is None


def test_wrong_uses() -> None:
    with pytest.raises(ValueError, match="no room for 1.15292e"):
        PixelCache(1 << 60)
    for wrong in (-1, math.nan, -math.inf):
        with pytest.raises(UsageError, match=f"--decoded-cache is {wrong}"):
            Options(decoded_cache=wrong)


def test_how_much_a_set_takes_once_decoded(photo_manifest: Manifest) -> None:
    sizes, whole = photo_manifest.sizes, pixels(photo_manifest)
    assert bytes_decoded(sizes, 10**9) == bytes_decoded(sizes, whole) == whole
    assert bytes_decoded(sizes, 1000) == 1000 and bytes_decoded(sizes, 0) == bytes_decoded(sizes[:0], 9) == 0
    wide = np.full((10_000, 2), 40_000, np.int32)  # beyond 32 bits, and in several readings
    assert bytes_decoded(wide, 10**15) == 10_000 * 3 * 40_000**2


@pytest.mark.parametrize(
    ("device", "chosen", "side", "expected"),
    [
        ("cpu", None, 100, 60_000),
        ("cpu", None, 6531, 3 * 2 * 6531**2),
        ("cpu", None, 6533, 0),  # 0.256074 GB
        ("cpu", 0.0, 100, 0),
        ("cpu", 0.2, 6533, 200_000_000),
        ("cpu", math.inf, 6533, 3 * 2 * 6533**2),
        ("cuda", None, 100, 0),
        ("cuda", 0.00005, 100, 50_000),
        ("cuda", 0.5, 100, 60_000),  # all is taken at the start, but no more than the set can fill
        ("cuda", math.inf, 100, 60_000),
    ],
)
def test_a_cpu_keeps_small_sets_unless_told_otherwise(
    photo_manifest: Manifest, device: str, chosen: float | None, side: int, expected: int
) -> None:
    images = dataclasses.replace(photo_manifest.take(range(2)), sizes=np.full((2, 2), side, np.int32))
    where: Any = SimpleNamespace(device=torch.device(device))
    job = Job("v2", RECIPE, Options(decoded_cache=chosen, threads=1), where, images, None, ())
    assert job.loading.decoded_bytes == expected and 3 * 2 * 6531**2 <= SMALL < 3 * 2 * 6533**2


@pytest.mark.parametrize(
    ("device", "chosen", "val", "sizes"),
    [
        ("cpu", None, 2, (60000, 60000)),
        ("cpu", None, 0, (60000, 0)),
        ("cpu", 0.00007, 2, (60000, 10000)),  # those that train come first
        ("cpu", 0.00005, 2, (50000, 0)),
        ("cpu", math.inf, 2, (60000, 60000)),
        ("cpu", 0.0, 2, ()),
        ("cuda", 0.5, 2, ()),
    ],
)
def test_a_run_on_a_cpu_has_one_place_for_the_images_of_each_set(
    photo_manifest: Manifest, device: str, chosen: float | None, val: int, sizes: tuple[int, ...]
) -> None:
    images = dataclasses.replace(photo_manifest.take(range(2)), sizes=np.full((2, 2), 100, np.int32))
    where: Any = SimpleNamespace(device=torch.device(device))
    job = Job("v2", RECIPE, Options(decoded_cache=chosen, threads=1), where, images, images if val else None, ())
    both = job.loading_with_memory()
    kept = [each.kept for each in both if each.kept is not None]
    assert [dataclasses.replace(loading, kept=None) for loading in both] == [job.loading] * 2
    assert tuple(len(each._block) for each in kept) == sizes
    assert job.kept_bytes == (sizes or (job.loading.decoded_bytes, 0))  # what --dry-run counts


def test_loaders_that_share_a_cache_decode_an_image_once(
    photo_manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An evaluation before training, and another one after it: all crops are those of loaders without."""
    read: list[int] = []
    original = Manifest.read
    monkeypatch.setattr(Manifest, "read", lambda self, i, *place: (read.append(i), original(self, i, *place))[1])

    def all_of(kept: PixelCache | None) -> list[list[Any]]:
        loading = Loading(threads=2, kept=kept)
        evaluate = partial(EvaluationLoader, photo_manifest, RECIPE, CPU, batch_size=37, loading=loading)
        before = [crops for crops, _ in evaluate()]
        training = list(Loader(photo_manifest, Plan(RECIPE, photo_manifest.sizes), ALONE, STEPS, loading))
        return [before, training, [crops for crops, _ in evaluate()]]

    expected = all_of(None)
    assert len(read) > 2 * len(photo_manifest)  # the control
    read.clear()
    before, training, after = all_of(PixelCache(pixels(photo_manifest)))
    assert all_equal(training, expected[1])
    assert all(map(torch.equal, before + after, expected[0] + expected[2]))
    assert sorted(read) == list(range(len(photo_manifest)))


def test_threads_fill_it_at_once() -> None:
    """Each image is whole, and at a place of its own; with the lock left out, two of them share one."""
    rows = [image(8, 8, value) for value in range(200)]
    cache = PixelCache(len(rows) * rows[0].numel())
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(cache.put, [*range(200)] * 3, rows * 3))
    assert cache.fill == len(rows) * rows[0].numel() and len(cache) == 200
    kept = cache.complete(np.arange(200), [PIXEL] * 200, [])
    assert all(map(torch.equal, kept, rows))


def test_a_run_is_bit_equal_to_one_without(photo_folder: Path, tmp_path: Path) -> None:
    recipe = dataclasses.replace(
        PRESETS["demo"][1], width=0.125, crop_size=16, batch_size=40, bn_group=4, queue_size=80, epochs=3
    )
    states = []
    for cache in (0.0, None):
        out = tmp_path / f"run{cache}"
        pretrain(recipe, Options(data=photo_folder, out=out, device="cpu", threads=1, knn=False, decoded_cache=cache))
        states.append(checkpoint.load(checkpoint.latest(out)).state)
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_on_a_gpu_batches_are_the_same(photo_manifest: Manifest, share: float) -> None:
    gpu = SimpleNamespace(rank=0, world=1, device=torch.device("cuda", 0))
    # One decoder for all: which images the decoding engine gets depends on the batch.
    expected = draw(photo_manifest, 0, gpu, hw_decoder_load=0.0)
    for options in ({"threads": 1}, {"threads": 3, "prefetch": 5}):
        result = draw(photo_manifest, int(share * pixels(photo_manifest)), gpu, hw_decoder_load=0.0, **options)
        assert all_equal(result, expected)


@pytest.mark.parametrize("cache", [0, 10**8], ids=["without", "with"])
def test_benchmark_an_epoch_of_500x375(
    photos: list[np.ndarray], tmp_path: Path, benchmark: Callable, cache: int
) -> None:
    """Four epochs, when all 128 images are kept; also in ms of processor time for two crops of 224 pixels."""
    for number in range(128):
        top, left = number // 20 * 8, number % 20 * 7
        crop = photos[number % 2][top : top + 375, left : left + 500]
        Image.fromarray(crop).save(tmp_path / f"{number}.jpg", quality=90)
    manifest, recipe = scan(tmp_path, cache=False), dataclasses.replace(RECIPE, batch_size=64, crop_size=224)
    plan, spent = Plan(recipe, manifest.sizes), []

    def setup() -> tuple[tuple, dict]:
        loader = Loader(manifest, plan, ALONE, range(12), Loading(1, 1, decoded_bytes=cache))
        for _ in range(4):
            next(loader)
        return (loader,), {}

    def epochs(loader: Loader) -> None:
        began = time.process_time()
        assert len(list(loader)) == 8
        spent.append(1000 * (time.process_time() - began) / (8 * 64))

    benchmark.pedantic(epochs, setup=setup, rounds=5)
    benchmark.extra_info["cpu_ms_per_pair"] = sorted(spent)[len(spent) // 2]
