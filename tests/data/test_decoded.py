"""Images that are kept decoded change nothing but the time it takes, and never take more than they were given."""

from __future__ import annotations

import dataclasses
import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from fastmoco.data import loader as loader_module
from fastmoco.data.decoded import PIXEL, Decoded
from fastmoco.data.loader import Batch, Loader
from fastmoco.data.manifest import Manifest, scan
from fastmoco.data.plan import Plan
from fastmoco.data.quarantine import Quarantine
from fastmoco.options import Options, UsageError
from fastmoco.recipe import PRESETS
from fastmoco.train import checkpoint
from fastmoco.train.loop import pretrain

RECIPE = dataclasses.replace(PRESETS["v2"][1], batch_size=40, bn_group=4, crop_size=24, max_bad_share=0.1)
CPU = torch.device("cpu")
ALONE = SimpleNamespace(rank=0, world=1, device=CPU)
MIB = 2**20


def batches(manifest: Manifest, budget: int, steps: int = 15, **options: object) -> list[Batch]:
    plan = Plan(RECIPE, manifest.sizes)
    with Loader(manifest, plan, RECIPE, ALONE, stop_step=steps, decoded_bytes=budget, **options) as loader:
        return list(loader)


def all_equal(a: list[Batch], b: list[Batch]) -> bool:
    columns = ((vars(x).values(), vars(y).values()) for x, y in zip(a, b, strict=True))
    return all(np.array_equal(np.asarray(x), np.asarray(y)) for one in columns for x, y in zip(*one, strict=True))


def pixels(manifest: Manifest) -> int:
    return 3 * int(manifest.sizes.prod(1).sum())


def image(height: int, width: int, value: int) -> torch.Tensor:
    return torch.full((height, width, 3), value, dtype=torch.uint8)


def test_who_comes_first_stays_and_the_budget_holds() -> None:
    kept = Decoded(100)
    for sample, (height, width) in enumerate([(2, 5), (4, 5), (3, 4), (2, 1)]):  # 30, 60, 36 and 6 bytes
        kept.put(sample, image(height, width, sample))
    assert [sample in kept for sample in range(4)] == [True, True, False, True]
    assert kept.used == 96 and len(kept) == 3
    kept.put(0, image(2, 5, 99))  # another time changes nothing
    made = kept.completed(np.array([3, 7, 0]), [PIXEL, b"any", PIXEL], [image(1, 1, 0), image(9, 9, 7), image(1, 1, 0)])
    for expected, found in zip([image(2, 1, 3), image(9, 9, 7), image(2, 5, 0)], made, strict=True):
        assert torch.equal(found, expected)
    assert kept.used == 96 and 7 not in kept


def test_what_is_kept_is_a_copy() -> None:
    kept, shown = Decoded(30), image(2, 5, 1)
    kept.put(0, shown)
    shown.zero_()
    assert torch.equal(kept.completed(np.array([0]), [PIXEL], [image(1, 1, 0)])[0], image(2, 5, 1))


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_batches_are_the_same_and_what_fits_is_read_once(
    photo_manifest: Manifest, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    expected, made = batches(photo_manifest, 0), []

    class Seen(Decoded):
        def __init__(self, budget: int) -> None:
            super().__init__(budget)
            made.append(self)

    reads: Counter[int] = Counter()
    original = Manifest.read
    monkeypatch.setattr(loader_module, "Decoded", Seen)
    monkeypatch.setattr(Manifest, "read", lambda self, i: (reads.update([i]), original(self, i))[1])
    budget = int(share * pixels(photo_manifest))
    for options in ({"threads": 1}, {"threads": 3, "prefetch": 5}):
        assert all_equal(batches(photo_manifest, budget, **options), expected)
    once = sum(count == 2 for count in reads.values())  # in each of the two runs
    # An epoch leaves a rest of 24 out; and one that is used again at once is read before it is kept.
    assert all(0.8 * budget < kept.used <= budget for kept in made)
    assert once > (0.6 if share == 1.0 else 0.15) * len(photo_manifest)
    reads.clear()
    batches(photo_manifest, 0)
    assert min(reads.values()) > 1  # the control


def test_another_images_pixels_would_be_noticed(photo_manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the test above."""
    put = Decoded.put
    monkeypatch.setattr(Decoded, "put", lambda self, sample, image: put(self, sample, image.flip(0)))
    assert not all_equal(batches(photo_manifest, pixels(photo_manifest)), batches(photo_manifest, 0))


def test_bad_images_are_never_kept(tmp_path: Path, write_set: Callable[[Path, int], dict[str, str]]) -> None:
    write_set(tmp_path / "dirty", 200)
    manifest = scan(tmp_path / "dirty", cache=False)
    found, expected = [], []
    for budget, records in ((0, expected), (pixels(manifest), found)):
        quarantine = Quarantine(manifest, None, 0.1)
        records += [batches(manifest, budget, quarantine=quarantine), list(quarantine.news)]
    assert len({record.file for record in found[1]}) == 4 and found[1] == expected[1]
    assert all_equal(found[0], expected[0])


def test_a_kept_image_outlives_its_file(tmp_path: Path, write_set: Callable[[Path, int], dict[str, str]]) -> None:
    for name in write_set(tmp_path / "data", 200).values():
        (tmp_path / "data" / name).unlink()
    manifest = scan(tmp_path / "data", cache=False)
    plan, expected = Plan(RECIPE, manifest.sizes), batches(manifest, 0)
    quarantine = Quarantine(manifest, None, 0.1)
    options = {"stop_step": 15, "quarantine": quarantine, "decoded_bytes": pixels(manifest)}
    with Loader(manifest, plan, RECIPE, ALONE, **options) as loader:
        made = [next(loader)]
        os.remove(manifest.path(plan.samples(0)[0]))
        assert all_equal([*made, *loader], expected) and not quarantine.news


def test_memory_rises_by_the_budget_at_most(photo_manifest: Manifest, growth: Callable) -> None:
    batches(photo_manifest, 0)
    budget = pixels(photo_manifest) // 3
    with growth() as grown:
        batches(photo_manifest, 10**10)  # promised, and not taken: all images are 8 MB
    assert grown() < pixels(photo_manifest) + 40 * MIB
    kept = Decoded(budget)
    with growth() as grown:
        for sample in range(200):
            kept.put(sample, image(200, 300, sample))
    assert kept.used <= budget and grown() < budget + 2 * MIB


def test_wrong_uses(photo_manifest: Manifest) -> None:
    gpu = SimpleNamespace(rank=0, world=1, device=torch.device("cuda"))
    with pytest.raises(ValueError, match="on a CPU only: leave --decoded-cache out"):
        Loader(photo_manifest, Plan(RECIPE, photo_manifest.sizes), RECIPE, gpu, stop_step=1, decoded_bytes=1)
    with pytest.raises(ValueError, match="no room for 1.15292e"):
        Decoded(1 << 60)
    with pytest.raises(UsageError, match="--decoded-cache is -1"):
        Options(decoded_cache=-1)


def test_a_run_is_bit_equal_to_one_without(photo_folder: Path, tmp_path: Path) -> None:
    recipe = dataclasses.replace(
        PRESETS["demo"][1], width=0.125, crop_size=16, batch_size=40, bn_group=4, queue_size=80, epochs=3
    )
    states = []
    for cache in (0.0, 0.01):
        out = tmp_path / f"run{cache}"
        pretrain(recipe, Options(data=photo_folder, out=out, device="cpu", threads=1, knn=False, decoded_cache=cache))
        states.append(checkpoint.load(checkpoint.latest(out)).state)
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize("cache", [0, 10**8], ids=["without", "with"])
def test_benchmark_an_epoch_of_500x375(
    photos: list[np.ndarray], tmp_path: Path, benchmark: Callable, cache: int
) -> None:
    """Four epochs, when all 128 images are kept; also in ms of processor time for two crops of 224 pixels."""
    for number in range(128):
        top, left = number // 20 * 8, number % 20 * 7
        cut = photos[number % 2][top : top + 375, left : left + 500]
        Image.fromarray(cut).save(tmp_path / f"{number}.jpg", quality=90)
    manifest, recipe = scan(tmp_path, cache=False), dataclasses.replace(RECIPE, batch_size=64, crop_size=224)
    plan, spent = Plan(recipe, manifest.sizes), []

    def setup() -> tuple[tuple, dict]:
        loader = Loader(manifest, plan, recipe, ALONE, stop_step=12, threads=1, prefetch=1, decoded_bytes=cache)
        for _ in range(4):
            next(loader)
        return (loader,), {}

    def epochs(loader: Loader) -> None:
        began = time.process_time()
        assert len(list(loader)) == 8
        spent.append(1000 * (time.process_time() - began) / (8 * 64))

    benchmark.pedantic(epochs, setup=setup, rounds=5)
    benchmark.extra_info["cpu_ms_per_pair"] = sorted(spent)[len(spent) // 2]
