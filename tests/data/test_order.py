"""The order of an epoch: a permutation, as good as a shuffle by every statistic here, and kept by runs that began."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fastmoco.data.draws import hash_words
from fastmoco.data.order import Keyed, Permutation, ShardRows, Table, Windows, order_for
from fastmoco.data.plan import Plan
from fastmoco.presets import PRESETS
from fastmoco.recipe import Recipe, RecipeError

V2 = PRESETS["v2"][1]
SMALL = dataclasses.replace(V2, batch_size=32, bn_group=8)
BEGUN = json.loads((Path(__file__).parents[1] / "golden" / "order_before_choice.json").read_text())
LEVEL = 1e-3  # of every test below; the draws are fixed, so each passes or fails for ever
N, FEW = 100_003, 5003  # of FEW many permutations are drawn
Drawn = Callable[[int, int, np.ndarray], np.ndarray]
"""Given n, a number of the permutation and some places: what stands there, int64 [m]."""


def table(n: int, number: int, places: np.ndarray) -> np.ndarray:
    return Table(5, n)(number, places)


def keyed(n: int, number: int, places: np.ndarray) -> np.ndarray:
    return Keyed(5, n)(number, places)


def one_window(n: int, number: int, places: np.ndarray) -> np.ndarray:
    """A window of all shards, which must then be a shuffle of everything."""
    return Windows(5, ShardRows(np.linspace(0, n, 8).astype(np.int64)), 7)(number, places)


def affine(n: int, number: int, places: np.ndarray) -> np.ndarray:
    """The control: a x + b modulo n, random and one to one, and no shuffle."""
    generator = np.random.default_rng(number)
    step = next(a for a in iter(lambda: int(generator.integers(1, n)), 0) if math.gcd(a, n) == 1)
    return (step * places + int(generator.integers(n))) % n


def shifted(n: int, number: int, places: np.ndarray) -> np.ndarray:
    """Another control: the files as they are listed, from another beginning."""
    return (places + number % 40) % n


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 3000) | st.integers(4090, 9000), key=st.integers(0, 2**63 - 1))
def test_any_number_of_elements_is_permuted_and_any_of_them_can_be_asked_for(n: int, key: int) -> None:
    permutation = Permutation(n, key, 3)
    whole = permutation(np.arange(n))
    assert whole.dtype == np.int64 and np.array_equal(np.sort(whole), np.arange(n))
    asked = np.array([n - 1, 0, n // 2])
    np.testing.assert_array_equal(permutation(asked), whole[asked])


def test_a_hundred_billion_images_need_no_table() -> None:
    permutation = Permutation(10**11, 1)
    found = permutation(np.arange(10**11 - 5000, 10**11))
    assert found.min() >= 0 and found.max() < 10**11 and len(np.unique(found)) == 5000
    with pytest.raises(ValueError, match="a permutation of 0 numbers: give at least 1"):
        Permutation(0)


def all_orders(drawn: Drawn) -> float:
    """p of: each of the 120 ways to order five images is as likely."""
    places, weights = np.array([0, 1, 2, 700, FEW - 1]), 5 ** np.arange(5)
    counts = np.unique([np.argsort(drawn(FEW, number, places)) @ weights for number in range(3000)], return_counts=True)
    return stats.chisquare(np.pad(counts[1], (0, 120 - len(counts[1])))).pvalue


def positions(drawn: Drawn) -> float:
    """p of: at each of 40 places each fortieth of the images stands as often."""
    places = np.linspace(0, FEW - 1, 40).astype(np.int64)
    counts = np.zeros((40, 40), np.int64)
    for number in range(1500):
        counts[np.arange(40), drawn(FEW, number, places) * 40 // FEW] += 1
    return stats.chisquare(counts, np.full((40, 40), 1500 / 40), ddof=39, axis=None).pvalue


def pairs(drawn: Drawn) -> float:
    """p of: each pair of twelfths of the images is as often the first two."""
    firsts = np.array([drawn(FEW, number, np.arange(2)) * 12 // FEW for number in range(3000)])
    return stats.chisquare(np.bincount(firsts[:, 0] * 12 + firsts[:, 1], minlength=144)).pvalue


def steps(drawn: Drawn) -> float:
    """p of: from one place to the next, and to the ones after, any distance is as likely."""
    order = drawn(N, 0, np.arange(N))
    found = [
        stats.chisquare(np.bincount((order[lag:] - order[:-lag]) % N * 256 // N, minlength=256)).pvalue
        for lag in (1, 2, 3, 64)
    ]
    return min(1.0, 4 * min(found))


def batches(drawn: Drawn) -> float:
    """p of: batches of 256 take as much from each sixteenth of the images as drawing without replacement does."""
    order = drawn(N, 1, np.arange(N))[: N // 256 * 256].reshape(-1, 256) * 16 // N
    counts = np.stack([(order == part).sum(1) for part in range(16)], 1)
    expected = 256 / 16
    spread = ((counts - expected) ** 2 / expected).sum() * (N - 1) / (N - 256)  # the hypergeometric's correction
    freedom = 15 * len(counts)
    return 2 * min(stats.chi2.cdf(spread, freedom), stats.chi2.sf(spread, freedom))


def epochs(drawn: Drawn) -> float:
    """p of: the order of an epoch tells nothing of another, nor of that of the files."""
    places = [np.arange(N), *(np.argsort(drawn(N, number, np.arange(N))) for number in range(4))]
    found = []
    for i in range(5):
        for j in range(i):
            moved = places[i][np.argsort(places[j])]
            found += [np.corrcoef(places[i], places[j])[0, 1], np.corrcoef(moved[:-1], moved[1:])[0, 1]]
    return min(1.0, len(found) * 2 * stats.norm.sf(np.abs(found).max() * math.sqrt(N)))


STATISTICS = (all_orders, positions, pairs, steps, batches, epochs)


@pytest.mark.parametrize("drawn", [table, keyed, one_window])
@pytest.mark.parametrize("statistic", STATISTICS)
def test_an_epoch_is_shuffled(drawn: Drawn, statistic: Callable[[Drawn], float]) -> None:
    assert statistic(drawn) > LEVEL


def test_the_statistics_find_what_is_no_shuffle() -> None:
    """Negative controls: random affine permutations, whose places and pairs are fair, and a list that is shifted."""
    assert all(statistic(affine) < LEVEL for statistic in (all_orders, steps, batches, epochs))
    assert all(statistic(shifted) < LEVEL for statistic in (positions, pairs))


def test_runs_from_before_there_was_a_choice_keep_their_order() -> None:
    """The file holds the recipe and the samples of a plan of the last version without one."""
    recipe = Recipe.from_dict(BEGUN["recipe"])
    assert recipe.order == "table" and recipe == recipe.for_images(BEGUN["images"])
    plan = Plan(recipe, np.full((BEGUN["images"], 2), 64, np.int32))
    for step, samples in BEGUN["samples"].items():
        assert plan.samples(int(step)).tolist() == samples
    large = Plan(dataclasses.replace(V2, seed=3), np.full((1_281_167, 2), 64, np.int32))  # and new ones of this size
    for step, samples in BEGUN["imagenet"].items():
        assert large.samples(int(step))[:8].tolist() == samples
    other = Plan(dataclasses.replace(recipe, order="keyed"), plan.sizes)
    assert other.samples(0).tolist() != BEGUN["samples"]["0"]


def shards(counts: list[int]) -> ShardRows:
    return ShardRows(np.concatenate([[0], np.cumsum(counts)]))


@settings(max_examples=60, deadline=None)
@given(counts=st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(any), window=st.integers(1, 35))
def test_windows_take_whole_shards_one_group_after_the_other(counts: list[int], window: int) -> None:
    rows, n = shards(counts), sum(counts)
    order = Windows(1, rows, window)
    seen = order(4, np.arange(n))
    assert np.array_equal(np.sort(seen), np.arange(n))
    home = np.searchsorted(rows.starts, seen, side="right") - 1
    groups = order.windows(4, 0, n)
    assert len(groups) == -(-sum(map(bool, counts)) // window)
    at = 0
    for group in groups:
        size = sum(counts[shard] for shard in group.tolist())
        assert set(home[at : at + size].tolist()) == set(group.tolist())
        if size > 1:
            assert [g.tolist() for g in order.windows(4, at, at + size)] == [group.tolist()]
        at += size
    asked = np.array([n - 1, 0])
    np.testing.assert_array_equal(order(4, asked), seen[asked])


def test_windows_are_the_same_on_any_number_of_ranks_and_mix_images_of_one_shard() -> None:
    recipe = dataclasses.replace(SMALL, order="windows", window_shards=3)
    rows, size = shards([25] * 20), np.full((500, 2), 64, np.int32)
    whole = Plan(recipe, size, shards=rows)
    for world in (2, 4):
        for rank in range(world):
            assert np.array_equal(Plan(recipe, size, world, rank, rows).samples(31), whole.samples(31))
    # A batch of 32 lies in one window of 75 images, or in two; what follows is told ahead of time.
    assert [len(w) for w in whole.windows(0)] == [3] and [len(w) for w in whole.windows(2)] == [3, 3]
    assert len(whole.windows(0, ahead=75)) == 2
    end = whole.steps_per_epoch
    both = (*whole.windows(end - 1), *whole.windows(end, ahead=75 - 32))  # those of the next epoch, too
    assert [w.tolist() for w in whole.windows(end - 1, ahead=75)] == [w.tolist() for w in both] and len(both) == 3
    with pytest.raises(RecipeError, match="order windows needs images in tar archives.*fastmoco data pack"):
        Plan(recipe, size)


def neighbour_distance(order: np.ndarray, rows: ShardRows) -> float:
    """Mean distance, in places, of two images that are neighbours in their shard."""
    place = np.argsort(order)
    same = np.diff(np.searchsorted(rows.starts, np.arange(len(order)), side="right")) == 0
    return float(np.abs(np.diff(place))[same].mean())


@pytest.mark.parametrize("window", [1, 4, 16, 64])
def test_neighbours_of_a_shard_come_to_lie_a_third_of_a_window_apart(window: int) -> None:
    """Of two uniform places in m the mean distance is (m + 1) / 3: so far are windows from a global shuffle."""
    rows = shards([200] * 64)
    places = np.arange(12800)
    found = neighbour_distance(Windows(2, rows, window)(0, places), rows)
    assert found == pytest.approx((200 * window + 1) / 3, rel=0.02)
    if window == 64:
        assert found == pytest.approx(neighbour_distance(keyed(12800, 0, places), rows), rel=0.02)


def test_an_order_is_chosen_by_its_name() -> None:
    assert isinstance(order_for(SMALL, 1000), Table) and isinstance(order_for(SMALL, 3_000_000), Keyed)
    assert isinstance(order_for(dataclasses.replace(SMALL, order="keyed"), 10), Keyed)
    assert order_for(SMALL, 1000).windows(0, 0, 32) == [] == Keyed(0, 10).windows(0, 0, 5)


def test_the_hash_of_a_permutation_is_pinned() -> None:
    """A change of it changes every run that it orders."""
    assert Permutation(5003, 7)(np.arange(5)).tolist() == [3016, 666, 463, 2604, 2115]
    assert Permutation(1000, 7)(np.arange(5)).tolist() == np.argsort(hash_words(7, np.arange(1000)))[:5].tolist()


@pytest.mark.parametrize("images", [1_281_167, 100_000_000])
def test_benchmark_samples_of_a_step_in_keyed_order(benchmark: Callable, images: int) -> None:
    order = Keyed(0, images)
    benchmark(lambda: order(1, np.arange(4096)))
