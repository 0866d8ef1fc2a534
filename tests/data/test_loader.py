"""Batches depend on the plan alone, arrive in order, and leave nothing behind however early one stops."""

from __future__ import annotations

import dataclasses
import gc
import io
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from batches import ALONE, CPU, batches, equal
from PIL import Image

from fastmoco.bench.loader import pillow
from fastmoco.data import loader as loader_module
from fastmoco.data import order as order_module
from fastmoco.data.batch import Batch
from fastmoco.data.draws import ORDER_STREAM
from fastmoco.data.loader import Background, EvaluationLoader, Loader, Loading
from fastmoco.data.manifest import Manifest, scan
from fastmoco.data.plan import Plan, centre_boxes
from fastmoco.data.request import NO_BOXES, DecodeError, together
from fastmoco.presets import PRESETS

RECIPE = dataclasses.replace(PRESETS["v2"][1], batch_size=32, bn_group=4, crop_size=24)  # 3 steps an epoch


@pytest.mark.parametrize("symmetric", [False, True])
def test_batches_are_what_the_plan_says(photo_manifest: Manifest, symmetric: bool) -> None:
    recipe = dataclasses.replace(RECIPE, symmetric=symmetric)
    plan = Plan(recipe, photo_manifest.sizes)
    rows = recipe.views * 32
    for step, batch in enumerate(batches(photo_manifest, recipe, range(5))):
        samples, epoch = plan.samples(step), step // 3
        assert (batch.step, batch.epoch) == (step, epoch)
        np.testing.assert_array_equal(batch.sample, samples)
        for name, used in (("query", plan.query_views), ("key", plan.key_views)):
            crops, parameters = getattr(batch, f"{name}_crops"), getattr(batch, f"{name}_parameters")
            assert crops.shape == (rows, 24, 24, 3) and crops.dtype == torch.uint8
            expected = np.concatenate([plan.photometric(epoch, samples, view) for view in used])
            np.testing.assert_array_equal(parameters, expected)
            for number, view in enumerate(used):
                boxes = plan.boxes(epoch, samples, view)
                for slot in (0, 7, 31):
                    expected = cut(photo_manifest, samples[slot], boxes[slot], 24)
                    assert np.abs(crops[number * 32 + slot].numpy() - expected).max() <= 1
        shuffles = np.concatenate([view * 32 + plan.shuffle(step, v) for view, v in enumerate(plan.key_views)])
        places = torch.empty(rows, dtype=torch.int64)
        places[batch.key_rows] = torch.arange(rows)
        np.testing.assert_array_equal(places, shuffles)  # row p of the key batch is slot perm[p]
        np.testing.assert_array_equal(batch.key_rows[batch.unshuffle.argsort()].sort().values, np.arange(rows))
        assert torch.equal(places[batch.unshuffle], torch.arange(rows))


def cut(manifest: Manifest, sample: int, box: np.ndarray, size: int) -> np.ndarray:
    top, left, height, width = box.tolist()
    image = Image.open(io.BytesIO(manifest.read(sample))).convert("RGB")
    cropped = image.crop((left, top, left + width, top + height))
    return np.asarray(cropped.resize((size, size), Image.BILINEAR), np.int16)


@pytest.mark.parametrize("options", [{"threads": 3}, {"prefetch": 1}, {"prefetch": 7, "threads": 2}])
def test_threads_and_prefetch_change_nothing(photo_manifest: Manifest, options: dict) -> None:
    result = zip(
        batches(photo_manifest, RECIPE, range(5)), batches(photo_manifest, RECIPE, range(5), **options), strict=True
    )
    assert all(equal(a, b) for a, b in result)


@pytest.mark.parametrize("start", [1, 3, 4])
def test_starting_later_is_skipping(photo_manifest: Manifest, start: int) -> None:
    whole, rest = (batches(photo_manifest, RECIPE, range(first, 6)) for first in (0, start))
    assert len(rest) == 6 - start and all(equal(a, b) for a, b in zip(whole[start:], rest, strict=True))
    assert not equal(whole[start - 1], rest[0])  # negative control: a step count that is off by one


def test_an_epochs_order_is_computed_once(photo_manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Although the reader is ahead of what is assembled; the control: a plan that remembers one epoch computes more."""
    computed, original = [], order_module.hash_words

    def count(*words: object) -> np.ndarray:
        computed.extend([words[2]] if words[1] == ORDER_STREAM and len(words) == 4 else [])
        return original(*words)

    recipe = dataclasses.replace(RECIPE, batch_size=16)
    monkeypatch.setattr(order_module, "hash_words", count)
    batches(photo_manifest, recipe, range(18))
    assert computed == [0, 1, 2]
    monkeypatch.setattr(order_module, "_newest", lambda kept: {})
    batches(photo_manifest, recipe, range(18))
    assert len(computed) > 6


@pytest.mark.parametrize(
    ("kind", "seconds", "least", "most"),
    [("cpu", 0.02, 2, 16), ("cuda", 0.02, 17, 64), ("cuda", 0.0, 1, 16)],  # 8, of each of two batches
)
def test_more_files_are_read_at_once_for_a_gpu_where_they_come_slowly(
    photo_manifest: Manifest, monkeypatch: pytest.MonkeyPatch, kind: str, seconds: float, least: int, most: int
) -> None:
    """How long a file takes is told, not measured: a busy machine would ask for more readers than an idle one."""
    reading, records, took = [], [], loader_module.Readers.took

    def read(*_: object) -> np.ndarray:
        reading.append(1)
        records.append(len(reading))
        time.sleep(seconds)
        return np.zeros(reading.pop(), np.uint8)

    monkeypatch.setattr(Manifest, "read", read)
    monkeypatch.setattr(loader_module.Readers, "took", lambda self, _, files: took(self, seconds * files, files))
    source = loader_module.ImageSource(photo_manifest, None, lambda *_: np.empty(0), torch.device(kind))
    with ThreadPoolExecutor(source.readers.most) as readers:
        work = [(step, np.arange(100)) for step in range(4)]
        assert [len(batch_requests.encoded) for batch_requests in source.requests(readers, work)] == [100] * 4
    assert least <= max(records) <= most


def test_nobody_asks_what_the_images_of_a_good_batch_are_called(
    photo_manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a hundred million images the names lie on a disk, and a batch would wait for each of them."""
    asked, path = [], Manifest.path
    monkeypatch.setattr(Manifest, "read", lambda *_: np.zeros(3, np.uint8))
    monkeypatch.setattr(Manifest, "path", lambda self, index: asked.append(index) or path(self, index))
    source = loader_module.ImageSource(photo_manifest, None, lambda step, samples: NO_BOXES, CPU)
    with ThreadPoolExecutor(2) as readers:
        made = list(source.requests(readers, [(step, np.arange(9) + step) for step in range(3)]))
    part = together(made)
    assert not asked and len(part.request.names) == 27
    expected = [path(photo_manifest, index) for request in made for index in request.samples.tolist()]
    assert [*part.request.names] == expected and [*part.request.rows(slice(8, 20)).names] == expected[8:20]


def test_so_many_readers_as_the_time_of_a_file_asks_for() -> None:
    readers = loader_module.Readers(8, 64)
    assert readers.count == 8
    for seconds, expected in ((2e-5, 8), (4e-3, 32), (1.0, 64), (2e-5, 8)):
        for _ in range(200):
            readers.took(10 * seconds, 10)
        assert readers.count == expected
    readers.took(5.0, 0)  # all of them were decoded already
    assert readers.count == 8


@pytest.mark.parametrize(("per_rank", "expected"), [(256, 1), (128, 1), (100, 2), (32, 4), (4, 32)])
def test_small_batches_are_decoded_several_at_a_time_on_a_gpu(per_rank: int, expected: int) -> None:
    assert loader_module.in_one_call(per_rank, torch.device("cuda", 0)) == expected
    assert loader_module.in_one_call(per_rank, CPU) == 1


def test_the_files_of_the_next_call_are_read_while_one_is_decoded(photo_manifest: Manifest) -> None:
    source = loader_module.ImageSource(photo_manifest, None, lambda *_: np.empty(0), CPU)
    for merged_sum in (1, 4):
        log = []

        def wanted() -> Iterator[tuple[int, np.ndarray]]:
            for step in range(20):
                log.append(step)
                yield step, np.arange(2)

        with ThreadPoolExecutor(2) as readers:
            asked = source.requests(readers, wanted(), merged_sum)
            assert [next(asked).step for _ in range(merged_sum)] == list(range(merged_sum))
            assert len(log) == 2 * merged_sum


class FakeRanks:
    """Ranks as threads: exchange by a table and a barrier, as all_to_all_single would."""

    def __init__(self, world: int) -> None:
        self.world, self.table, self.barrier = world, [[None] * world for _ in range(world)], threading.Barrier(world)

    def rank(self, rank: int) -> SimpleNamespace:
        def exchange(rows: torch.Tensor, send_counts: list[int], receive_counts: list[int]) -> torch.Tensor:
            self.table[rank] = list(rows.split(send_counts))
            self.barrier.wait(60)
            incoming = [self.table[source][rank] for source in range(self.world)]
            self.barrier.wait(60)
            assert [len(rows) for rows in incoming] == receive_counts
            return torch.cat(incoming)

        return SimpleNamespace(rank=rank, world=self.world, device=CPU, exchange=exchange)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("symmetric", [False, True])
def test_ranks_share_out_exactly_the_batch_of_one_rank(photo_manifest: Manifest, world: int, symmetric: bool) -> None:
    recipe = dataclasses.replace(RECIPE, symmetric=symmetric)
    ranks, views, per_rank = FakeRanks(world), recipe.views, 32 // world

    def run(rank: int) -> list[Batch]:
        plan = Plan(recipe, photo_manifest.sizes, world, rank)
        with Loader(photo_manifest, plan, ranks.rank(rank), range(4), Loading(prefetch=1 + rank)) as loader:
            return list(loader)

    with ThreadPoolExecutor(world) as pool:
        shared = list(pool.map(run, range(world)))
    for step, whole in enumerate(batches(photo_manifest, recipe, range(4))):
        parts = [batches_of_rank[step] for batches_of_rank in shared]
        for name in ("query_crops", "query_parameters"):
            rows = [getattr(part, name).unflatten(0, (views, per_rank)) for part in parts]
            assert torch.equal(torch.cat(rows, 1).flatten(0, 1), getattr(whole, name))
        for name in ("key_crops", "key_parameters"):
            rows = [placed(part, name).unflatten(0, (views, per_rank)) for part in parts]
            assert torch.equal(torch.cat(rows, 1).flatten(0, 1), placed(whole, name))
            gathered = torch.cat([placed(part, name) for part in parts])
            assert all(torch.equal(gathered[part.unshuffle], getattr(whole, name)) for part in parts)
        np.testing.assert_array_equal(np.concatenate([part.sample for part in parts]), whole.sample)


def placed(batch: Batch, name: str) -> torch.Tensor:
    """Key rows where the photometric kernel writes them."""
    rows = getattr(batch, name)
    return torch.empty_like(rows).index_copy_(0, batch.key_rows, rows)


class OnGpu(torch.Tensor):
    """A CPU tensor that says it is on a GPU and notes the streams its memory waits for."""

    is_cuda = True

    def record_stream(self, stream: object) -> None:
        RECORDED.append((self.data_ptr(), stream))


RECORDED: list[tuple[int, object]] = []


@pytest.mark.parametrize("kind", [OnGpu, torch.Tensor])
def test_what_is_sent_is_not_reused_before_the_exchange_has_read_it(
    photo_manifest: Manifest, monkeypatch: pytest.MonkeyPatch, kind: type
) -> None:
    """Recorded on the stream that reads it, once it is sent; the control: what arrives and a CPU's crops are not."""
    plan = Plan(RECIPE, photo_manifest.sizes, 2, 0)
    entered, outgoing, original = [], [], loader_module._on
    monkeypatch.setattr(loader_module, "_on", lambda stream, *after: entered.append(stream) or original(None))

    def exchange(rows: torch.Tensor, _: list[int], receive_counts: list[int]) -> torch.Tensor:
        assert entered[-1] == "exchange" and not RECORDED
        outgoing.append(rows.data_ptr())
        return rows.as_subclass(torch.Tensor).new_zeros(sum(receive_counts), *rows.shape[1:]).as_subclass(kind)

    place = SimpleNamespace(rank=0, world=2, device=CPU, exchange=exchange)
    with Loader(photo_manifest, plan, place, range(1)) as ours:
        ((batch, *rest),) = ours._background
    batch.key_crops = batch.key_crops.as_subclass(kind)
    RECORDED.clear()
    stand_in = SimpleNamespace(
        _background=iter([(batch, *rest)]), _parallel=place, _exchange_stream="exchange", _views=None
    )
    assert Loader.__next__(stand_in).key_crops.data_ptr() not in outgoing
    assert RECORDED == ([(outgoing[0], "exchange")] if kind is OnGpu else [])


def loader(manifest: Manifest, stop: int = 1000, **options: int) -> Loader:
    return Loader(manifest, Plan(RECIPE, manifest.sizes), ALONE, range(stop), Loading(**options))


def left_over() -> tuple[int, int]:
    gc.collect()
    return threading.active_count(), len(os.listdir("/proc/self/fd"))


def test_closing_at_any_moment_leaves_no_thread_or_file(photo_manifest: Manifest) -> None:
    batches(photo_manifest, RECIPE, range(5))
    before = left_over()
    for count in (0, 1, 2, 5):
        for delay in (0, 0.02):
            ours = loader(photo_manifest)
            for _ in range(count):
                next(ours)
            time.sleep(delay)
            ours.close()
            ours.close()
            assert next(ours, None) is None
    assert left_over() == before
    running = loader(photo_manifest)
    next(running)
    assert left_over()[0] > before[0]  # negative control: the count does see a loader that is not closed
    del running
    assert left_over() == before  # and one that is dropped closes itself


def test_an_exit_without_closing_is_clean(photo_folder: Path) -> None:
    code = f"""
from types import SimpleNamespace
import torch
from fastmoco.data.loader import Loader
from fastmoco.data.manifest import scan
from fastmoco.data.plan import Plan
from fastmoco.recipe import Recipe
manifest, recipe = scan({str(photo_folder)!r}, cache=False), Recipe(crop_size=24, batch_size=32)
alone = SimpleNamespace(rank=0, world=1, device=torch.device("cpu"))
running = Loader(manifest, Plan(recipe, manifest.sizes), alone, range(1000))
next(running)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0 and "Traceback" not in result.stderr and "executor" not in result.stderr


def test_the_wait_is_measured(photo_manifest: Manifest) -> None:
    with loader(photo_manifest, prefetch=2) as ours:
        next(ours)
        start = ours.wait_seconds
        assert start > 0
        time.sleep(1)
        next(ours)
        assert ours.wait_seconds - start < 0.1  # it was ready


@pytest.fixture
def copy(photo_folder: Path, tmp_path: Path) -> Manifest:
    return scan(shutil.copytree(photo_folder, tmp_path / "copy"), cache=False)


@pytest.mark.parametrize("harm", ["deleted", "truncated", "replaced"])
def test_a_file_harmed_after_the_scan_is_named_in_its_step(copy: Manifest, harm: str) -> None:
    plan = Plan(RECIPE, copy.sizes)
    position = next(i for i, sample in enumerate(plan.samples(2)) if " jpeg." in copy.paths[sample])
    victim = Path(copy.path(int(plan.samples(2)[position])))
    if harm == "deleted":
        victim.unlink()
    elif harm == "truncated":
        victim.write_bytes(victim.read_bytes()[:-200])
    else:
        Image.new("RGB", (7, 9)).save(victim, "JPEG")
    with loader(copy, stop=5) as ours:
        assert [next(ours).step, next(ours).step] == [0, 1]
        with pytest.raises(DecodeError) as error:
            next(ours)
        assert error.value.positions == [position] and error.value.names == [str(victim)]
        assert next(ours, None) is None


def test_wrong_use_is_refused(photo_manifest: Manifest) -> None:
    plan = Plan(RECIPE, photo_manifest.sizes)
    with pytest.raises(ValueError, match="the plan is for 104 images, the manifest has 1"):
        Loader(Manifest("", ["a"], np.ones((1, 2), np.int32)), plan, ALONE, range(1))
    with pytest.raises(ValueError, match="rank 1 of 2 has the plan of 0 of 1"):
        Loader(photo_manifest, plan, SimpleNamespace(rank=1, world=2, device=CPU), range(1))
    with pytest.raises(ValueError, match="prefetch is 0"):
        loader(photo_manifest, prefetch=0)


@pytest.mark.parametrize("crop_size", [64, 32])
def test_evaluation_sees_every_centre_once_in_order(photo_manifest: Manifest, crop_size: int) -> None:
    recipe = dataclasses.replace(RECIPE, crop_size=crop_size)
    with EvaluationLoader(photo_manifest, recipe, CPU, batch_size=40) as ours:
        assert len(ours) == 3
        result = list(ours)
    assert [len(index) for _, index in result] == [40, 40, 24]
    np.testing.assert_array_equal(np.concatenate([index for _, index in result]), np.arange(104))
    boxes = centre_boxes(photo_manifest.sizes, crop_size)
    for sample, crop in enumerate(torch.cat([crops for crops, _ in result]).numpy()):
        assert np.abs(crop - cut(photo_manifest, sample, boxes[sample], crop_size)).max() <= 1
    order = np.array([50, 3, 3])
    ((crops, index),) = EvaluationLoader(photo_manifest, recipe, CPU, indices=order)
    np.testing.assert_array_equal(index, order)
    assert torch.equal(crops[1], crops[2]) and torch.equal(crops[1], result[0][0][3])
    assert list(EvaluationLoader(photo_manifest, recipe, CPU, indices=np.array([], int))) == []


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_background_is_bounded_and_passes_errors_on(depth: int) -> None:
    produced: list[int] = []

    def count() -> Iterator[int]:
        for i in range(10):
            produced.append(i)
            yield i
        raise OSError("end")

    background = Background(count, depth)
    for taken in range(10):
        deadline = time.monotonic() + 5
        while len(produced) < min(taken + depth, 10) and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.01)
        assert len(produced) == min(taken + depth, 10)
        assert next(background) == taken
    with pytest.raises(OSError, match="end"):
        next(background)
    assert next(background, None) is None


@pytest.fixture(scope="session")
def benchmark_manifest(photos: list[np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder, generator = tmp_path_factory.mktemp("benchmark"), np.random.default_rng(0)
    for i in range(256):
        top, left = generator.integers(0, 50), generator.integers(0, 140)
        crop = Image.fromarray(photos[i % 2][top : top + 375, left : left + 500])
        crop.save(folder / f"{i}.jpg", quality=int(generator.integers(80, 97)))
    return scan(folder, cache=False)


@pytest.mark.parametrize("crop_size", [224, 40])
@pytest.mark.parametrize("who", ["fastmoco", "pillow", "pillow threads"])
def test_benchmark_256_pairs(benchmark_manifest: Manifest, benchmark: object, who: str, crop_size: int) -> None:
    """Pairs from 500x375 JPEGs in the file cache; both use the cores there are."""
    recipe = dataclasses.replace(RECIPE, batch_size=128, crop_size=crop_size)
    plan = Plan(recipe, benchmark_manifest.sizes)
    if who == "fastmoco":
        with Loader(benchmark_manifest, plan, ALONE, range(1000)) as ours:
            next(ours)
            benchmark.pedantic(lambda: [next(ours) for _ in range(2)], rounds=6, warmup_rounds=1)
    else:
        with pillow(recipe, benchmark_manifest, os.cpu_count() if who == "pillow threads" else 0) as draw:
            benchmark.pedantic(lambda: [draw() for _ in range(2)], rounds=6, warmup_rounds=1)
