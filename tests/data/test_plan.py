"""The plan is pure, uniform, and has torchvision's distribution of boxes."""

from __future__ import annotations

import dataclasses
import math
import random

import numpy as np
import pytest
from scipy import stats

from fastmoco.data import plan as plan_module
from fastmoco.data.draws import hash_words, uniform
from fastmoco.data.plan import Plan, centre_boxes, route
from fastmoco.kernels import reference
from fastmoco.presets import PRESETS
from fastmoco.recipe import Augmentation, Recipe, RecipeError

V2 = PRESETS["v2"][1]
SMALL = dataclasses.replace(V2, batch_size=32, bn_group=8)
LEVEL = 1e-3  # of every statistical test below; the draws are fixed, so each passes or fails for ever


def sizes(n: int, height: int = 375, width: int = 500) -> np.ndarray:
    return np.tile(np.array([[height, width]], np.int32), (n, 1))


def test_columns_and_codes_are_those_of_the_kernels() -> None:
    names = "FLIP GRAY ORDER BRIGHTNESS CONTRAST SATURATION HUE SIGMA GRAY_NEVER GRAY_BEFORE_JITTER GRAY_AFTER_JITTER"
    for name in [*names.split(), "NO_JITTER"]:
        assert getattr(plan_module, name) == getattr(reference, name), name


def test_hash_is_pinned() -> None:
    """A change of the hash changes every run and breaks every resume. First value: SplitMix64 seeded with 0."""
    assert hash_words(0)[0] == 0xE220A8397B1DCDAF
    assert hash_words(1)[0] == 0x6E789E6AA1B965F4
    assert hash_words(0, 0)[0] == splitmix(0xE220A8397B1DCDAF)


def splitmix(state: int) -> int:
    mask = 2**64 - 1
    z = (state + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & mask
    return z ^ z >> 31


@pytest.mark.parametrize("batch_size, world, rank", [(8, 1, 0), (64, 1, 0), (64, 4, 3), (32, 2, 1)])
def test_draws_depend_on_nothing_but_seed_epoch_sample_and_view(batch_size: int, world: int, rank: int) -> None:
    size = np.random.default_rng(0).integers(20, 900, (500, 2)).astype(np.int32)
    first = Plan(SMALL, size)
    other = Plan(dataclasses.replace(SMALL, batch_size=batch_size), size, world, rank)
    samples = np.array([3, 499, 77, 0])
    for epoch, view in ((0, 0), (0, 1), (7, 0)):
        together = first.boxes(epoch, np.arange(500), view), first.photometric(epoch, np.arange(500), view)
        np.testing.assert_array_equal(other.boxes(epoch, samples, view), together[0][samples])
        np.testing.assert_array_equal(other.photometric(epoch, samples, view), together[1][samples])
    np.testing.assert_array_equal(other.order(5), first.order(5))


@pytest.mark.parametrize("change", ["seed", "epoch", "view"])
def test_draws_differ_when_any_of_them_does(change: str) -> None:
    other = dataclasses.replace(SMALL, seed=1) if change == "seed" else SMALL
    epoch, view = int(change == "epoch"), int(change == "view")
    samples = np.arange(1000)
    ours, theirs = Plan(SMALL, sizes(1000)), Plan(other, sizes(1000))
    equal = (ours.boxes(0, samples, 0) == theirs.boxes(epoch, samples, view)).all(1)
    assert equal.mean() < 0.01
    factors = [p.photometric(e, samples, v)[:, 3] for p, e, v in ((ours, 0, 0), (theirs, epoch, view))]
    assert abs(np.corrcoef(*factors)[0, 1]) < 4 / math.sqrt(1000)


@pytest.mark.parametrize("images, batch_size", [(100, 32), (96, 32), (32, 32)])
def test_each_sample_at_most_once_an_epoch(images: int, batch_size: int) -> None:
    plan = Plan(SMALL, sizes(images))
    assert plan.steps_per_epoch == images // batch_size
    for epoch in range(3):
        first = epoch * plan.steps_per_epoch
        seen = np.concatenate([plan.samples(step) for step in range(first, first + plan.steps_per_epoch)])
        assert len(np.unique(seen)) == len(seen) == plan.steps_per_epoch * batch_size
        assert plan.epoch(first) == plan.epoch(first + plan.steps_per_epoch - 1) == epoch


def dependence(places: np.ndarray, others: np.ndarray) -> float:
    """Of two epochs: the larger correlation of a sample's places, and of the new places of former neighbours."""
    moved = others[np.argsort(places)]
    return max(abs(np.corrcoef(places, others)[0, 1]), abs(np.corrcoef(moved[:-1], moved[1:])[0, 1]))


def test_epochs_are_uncorrelated() -> None:
    count = 20_000
    plan, limit = Plan(V2, sizes(count)), 4 / math.sqrt(count)
    places = [np.arange(count), *(np.argsort(plan.order(epoch)) for epoch in range(4))]
    assert all(dependence(places[i], places[j]) < limit for i in range(5) for j in range(i))
    window = np.argsort(places[1] + np.random.default_rng(0).uniform(0, 1024, count))  # a shuffle buffer of 1024
    assert dependence(places[1], np.argsort(window)) > limit


@pytest.mark.parametrize("axis", ["seed", "epoch", "sample", "draw"])
def test_hash_is_uniform_and_uncorrelated_along_every_word(axis: str) -> None:
    count = 200_000
    words: list = [3, 1, 5, 0, 42, 2]
    words[{"seed": 0, "epoch": 2, "sample": 4, "draw": 5}[axis]] = np.arange(count)
    draws = uniform(*words)
    assert draws.min() >= 0 and draws.max() < 1
    assert stats.kstest(draws, "uniform").pvalue > LEVEL
    for lag in (1, 2, 3, 8, 64):
        assert abs(np.corrcoef(draws[:-lag], draws[lag:])[0, 1]) < 4 / math.sqrt(count)
    low_bits = (hash_words(*words) & np.uint64(255)).astype(int)
    assert stats.chisquare(np.bincount(low_bits, minlength=256)).pvalue > LEVEL


def test_uniformity_test_finds_a_poor_generator() -> None:
    """Negative control of the test above: a multiplicative counter without mixing."""
    draws = (np.arange(200_000) * 0.6180339887) % 1
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) > 4 / math.sqrt(len(draws))


def torchvision_boxes(n: int, height: int, width: int, scale: tuple, ratio: tuple, seed: int) -> np.ndarray:
    """RandomResizedCrop as torchvision documents it, in plain Python with Python's own generator."""
    generator, boxes = random.Random(seed), []
    for _ in range(n):
        for _ in range(10):
            area = height * width * generator.uniform(*scale)
            aspect = math.exp(generator.uniform(math.log(ratio[0]), math.log(ratio[1])))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                boxes.append((generator.randint(0, height - h), generator.randint(0, width - w), h, w))
                break
        else:
            w, h = width, height
            if width / height < ratio[0]:
                h = round(width / ratio[0])
            elif width / height > ratio[1]:
                w = round(height * ratio[1])
            boxes.append(((height - h) // 2, (width - w) // 2, h, w))
    return np.array(boxes)


def box_statistics(boxes: np.ndarray, height: int, width: int) -> dict[str, np.ndarray]:
    top, left, h, w = boxes.T.astype(float)
    return {
        "area": h * w,
        "ratio": w / h,
        "top": top / np.maximum(height - h, 1),
        "left": left / np.maximum(width - w, 1),
        "bottom": top + h,
    }


def test_photographs_and_strips_have_torchvisions_boxes() -> None:
    count = 20_000
    for scale in ((0.2, 1.0), (0.08, 1.0)):
        recipe = dataclasses.replace(V2, augmentation=Augmentation(crop_scale=scale))
        for height, width in ((375, 500), (500, 333), (32, 32), (60, 400), (800, 90)):
            ours = Plan(recipe, sizes(count, height, width)).boxes(0, np.arange(count), 0)
            assert (ours[:, :2] >= 0).all() and (ours[:, 2:] > 0).all()
            assert (ours[:, 0] + ours[:, 2] <= height).all() and (ours[:, 1] + ours[:, 3] <= width).all()
            oracle = torchvision_boxes(count, height, width, scale, (3 / 4, 4 / 3), seed=1)
            for name, value in box_statistics(ours, height, width).items():
                expected = box_statistics(oracle, height, width)[name]
                assert stats.ks_2samp(value, expected).pvalue > LEVEL, (scale, height, width, name)


@pytest.mark.parametrize("wrong", [{"ratio": (0.7, 4 / 3)}, {"scale": (0.17, 1.0)}])
def test_a_wrong_box_distribution_is_detected(wrong: dict) -> None:
    count = 20_000
    ours = Plan(V2, sizes(count)).boxes(0, np.arange(count), 0)
    oracle = torchvision_boxes(count, 375, 500, **{"scale": (0.2, 1.0), "ratio": (3 / 4, 4 / 3), "seed": 1, **wrong})
    pairs = zip(box_statistics(ours, 375, 500).values(), box_statistics(oracle, 375, 500).values(), strict=True)
    assert min(stats.ks_2samp(a, b).pvalue for a, b in pairs) < LEVEL


def test_fallback_is_the_largest_centred_box() -> None:
    size = np.array([[20, 1000], [1000, 20], [1, 1], [1, 500], [500, 1]], np.int32)
    tiny = dataclasses.replace(SMALL, batch_size=1, bn_group=1)
    boxes = Plan(tiny, size).boxes(0, np.arange(5), 0)
    assert boxes.tolist()[:2] == [[0, 486, 20, 27], [486, 0, 27, 20]]
    assert (boxes[:, 2:] >= 1).all() and (boxes[:, :2] + boxes[:, 2:] <= size).all()


@pytest.mark.parametrize("preset", ["v1", "v2", "cifar"])
def test_photometric_draws_follow_the_recipe(preset: str) -> None:
    recipe, count = PRESETS[preset][1], 40_000
    a = recipe.augmentation
    draws = Plan(recipe, sizes(count)).photometric(0, np.arange(count), 1)
    flip, gray, order, *factors, hue, sigma = draws.T.astype(np.float64)
    jittered = order != plan_module.NO_JITTER
    when = plan_module.GRAY_BEFORE_JITTER if a.gray_first else plan_module.GRAY_AFTER_JITTER
    assert set(np.unique(gray)) <= {plan_module.GRAY_NEVER, when}
    for happened, p in ((flip == 1, a.flip_p), (gray == when, a.gray_p), (jittered, a.jitter_p), (sigma > 0, a.blur_p)):
        assert stats.binomtest(int(happened.sum()), count, p).pvalue > LEVEL
    shifts = [(factor - 1, s) for factor, s in zip(factors, (a.brightness, a.contrast, a.saturation), strict=True)]
    for shift, strength in [*shifts, (hue, a.hue)]:
        assert stats.kstest(shift[jittered], stats.uniform(-strength, 2 * strength).cdf).pvalue > LEVEL
        assert not shift[~jittered].any()
    counts = np.unique(order[jittered], return_counts=True)[1]
    assert len(counts) == 24 and stats.chisquare(counts).pvalue > LEVEL
    if a.blur_p:
        low, high = a.blur_sigma
        assert stats.kstest(sigma[sigma > 0], stats.uniform(low, high - low).cdf).pvalue > LEVEL
    events = np.stack([flip, gray > 0, jittered, sigma > 0]).astype(float)
    varying = events[events.std(1) > 0]
    assert np.abs(np.corrcoef(varying) - np.eye(len(varying))).max() < 4 / math.sqrt(count)


def test_order_codes_hold_each_operation_once() -> None:
    codes = plan_module.ORDER_CODES
    assert all(sorted(code >> 2 * place & 3 for place in range(4)) == [0, 1, 2, 3] for code in codes.tolist())
    assert len(set(codes.tolist())) == 24 and codes[0] == 0b11_10_01_00


def test_shuffle_is_a_fresh_permutation_for_each_step_and_view() -> None:
    plan = Plan(V2, sizes(1000))
    draws = [plan.shuffle(step, view) for step in range(3) for view in range(2)]
    assert all(sorted(p.tolist()) == list(range(256)) for p in draws)
    assert len({tuple(p.tolist()) for p in draws}) == 6
    off = Plan(dataclasses.replace(V2, shuffle_bn=False), sizes(1000))
    np.testing.assert_array_equal(off.shuffle(5, 1), np.arange(256))


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("views", [1, 2])
def test_route_brings_every_crop_to_its_place_and_every_key_back(world: int, views: int) -> None:
    generator, batch = np.random.default_rng(world), 32
    shuffles = [generator.permutation(batch) for _ in range(views)]
    n = batch // world
    routes = [route(shuffles, world, rank) for rank in range(world)]
    crop_name = [[(view, rank * n + i) for view in range(views) for i in range(n)] for rank in range(world)]
    outgoing = []  # a fake all-to-all, in process
    for rank, r in enumerate(routes):
        sent, ends = [crop_name[rank][row] for row in r.send_rows], np.cumsum(r.send_counts)
        outgoing.append([sent[end - count : end] for end, count in zip(ends, r.send_counts, strict=True)])
    gathered = []
    for rank, r in enumerate(routes):
        incoming = [crop for source in range(world) for crop in outgoing[source][rank]]
        assert [len(outgoing[source][rank]) for source in range(world)] == r.receive_counts
        assert incoming == list(zip(r.views.tolist(), r.slots.tolist(), strict=True))
        key_batch: list = [None] * (views * n)
        for row, crop in zip(r.key_rows, incoming, strict=True):
            key_batch[row] = crop
        assert key_batch == [(v, shuffles[v][p]) for v in range(views) for p in range(rank * n, (rank + 1) * n)]
        gathered += key_batch
    in_order = [(view, slot) for view in range(views) for slot in range(batch)]
    assert all([gathered[row] for row in r.unshuffle] == in_order for r in routes)
    if world == 1:
        np.testing.assert_array_equal(routes[0].send_rows, np.arange(views * batch))  # nothing moves on one rank


def test_centre_boxes() -> None:
    size = np.array([[256, 341], [500, 333], [3, 1]], np.int32)
    assert centre_boxes(size, 224).tolist() == [[16, 58, 224, 224], [104, 21, 291, 291], [1, 0, 1, 1]]
    assert centre_boxes(size, 32).tolist() == [[0, 42, 256, 256], [83, 0, 333, 333], [1, 0, 1, 1]]


def test_too_few_images_and_unsplittable_batches_name_the_remedy() -> None:
    with pytest.raises(RecipeError, match="batch_size 32 is more than the 25 images.*--batch-size 24"):
        Plan(SMALL, sizes(25))
    with pytest.raises(RecipeError, match="batch_size 32 is more than the 3 images.*more images"):
        Plan(SMALL, sizes(3))
    with pytest.raises(RecipeError, match="3 ranks"):
        Plan(SMALL, sizes(100), world=3)


def test_benchmark_plan_of_a_step(benchmark: object) -> None:
    """256 samples, two views."""
    plan = Plan(V2, sizes(100_000))
    plan.order(0)

    def step() -> None:
        samples = plan.samples(3)
        for view in (0, 1):
            plan.boxes(0, samples, view), plan.photometric(0, samples, view)
        route([plan.shuffle(3, 1)], 1, 0)

    benchmark(step)


def test_benchmark_order_of_an_imagenet_epoch(benchmark: object) -> None:
    plan = Plan(Recipe(), sizes(1_281_167))
    epochs = iter(range(1_000_000))
    benchmark(lambda: plan.order(next(epochs)))
