"""The search over tiles finds the fastest row within its reach and passes over those that do not run."""

import pytest
import torch

from fastmoco.bench import tune
from fastmoco.bench.kernels import CASES, Case
from fastmoco.bench.timing import Timing
from fastmoco.bench.tune import climb, neighbours, size_of
from fastmoco.kernels.tiles import TABLE, Tiles

START = Tiles((64, 64), 4, 3, "")


def toy(row: Tiles) -> float | None:
    """Fastest at blocks of 128 x 32 with 8 warps and 2 stages; blocks over 128 do not run."""
    if max(row.block) > 128:
        return None
    return 1 + abs(row.block[0] - 128) / 64 + abs(row.block[1] - 32) / 32 + abs(row.num_warps - 8) + row.num_stages**2


def test_the_climb_ends_at_the_best_row_it_can_reach():
    best, least, first = climb(START, toy)
    assert (best.block, best.num_warps) == ((128, 32), 8) and first == toy(START) > least == toy(best)


def test_without_a_real_gain_the_row_stays():
    assert climb(START, lambda row: 1.0 if row == START else 0.99) == (START, 1.0, 1.0)
    assert climb(START, lambda row: 1.0 if row == START else None)[0] == START


def numbers(row: Tiles) -> tuple:
    return (*row.block, row.num_warps, row.num_stages)


def valley(row: Tiles) -> float:
    """As an H100's InfoNCE is expected to be: half the block pays only with half the warps and twice the programs."""
    together = (row.block[0] == 64) + (row.block[2] == 2) + (row.num_warps == 4)
    return {0: 1.0, 1: 1.3, 2: 1.2, 3: 0.7}[together]


def test_a_row_behind_a_valley_is_reached_by_changing_three_numbers_at_once():
    """The control is the climb that changes fewer: every step on the way loses."""
    start = Tiles((128, 64, 1, 128), 8, 3, "")
    best, least, first = climb(start, valley, 3)
    assert (best.block[0], best.block[2], best.num_warps) == (64, 2, 4) and (least, first) == (0.7, 1.0)
    for together in (1, 2):
        assert climb(start, valley, together) == (start, 1.0, 1.0)


def test_no_row_is_timed_twice():
    records = []
    climb(START, lambda row: records.append(row) or toy(row), 2)
    assert len(set(records)) == len(records)


def test_several_numbers_change_at_once():
    for changes in (1, 2, 3):
        actual = [numbers(row) for row in neighbours(START, changes)]
        assert len(set(actual)) == len(actual) > 7
        assert all(sum(a != b for a, b in zip(row, numbers(START), strict=True)) == changes for row in actual)


@pytest.mark.parametrize("launches", [True, False])
def test_many_launches_are_timed_as_the_graph_that_production_replays(monkeypatch, launches):
    """On a GPU; launched one by one, every row would time alike, as long as the host takes."""
    asked, gpu = [], torch.device("cuda", 0)
    case = Case("x", {}, {tune.OURS: lambda: "eager"}, tune.OURS, 1.0, launches=launches)
    monkeypatch.setitem(tune.CASES, "toy", lambda size, device: [case, case])
    monkeypatch.setattr(tune, "replay", lambda call, *_: lambda: "replayed")
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)

    def interleave(calls: dict, **_: object) -> dict:
        asked.append(calls[tune.OURS]())
        return {tune.OURS: Timing((0.25,))}

    monkeypatch.setattr(tune, "interleave", interleave)
    assert tune.measure("toy.phase", None, gpu, 1) == 0.5
    assert asked == (["replayed"] * 2 if launches else ["eager"] * 2)
    asked.clear()
    tune.measure("toy", None, torch.device("cpu"), 1)
    assert asked == ["eager"] * 2


def test_neighbours_differ_in_one_number():
    actual = [numbers(row) for row in neighbours(START)]
    assert len(set(actual)) == len(actual) == 8
    assert all(sum(a != b for a, b in zip(row, numbers(START), strict=True)) == 1 for row in actual)


def test_every_entry_of_the_table_has_a_size_to_time_it_at():
    for entry in TABLE:
        assert entry.partition(".")[0] in CASES, entry
    assert (size_of("info_nce.512").recipe.dim, size_of("info_nce.512").dtype) == (512, torch.bfloat16)
    assert (size_of("photometric.blur.fp32").recipe.dim, size_of("photometric.blur.fp32").dtype) == (128, torch.float32)
