"""The search over tiles finds the fastest row within its reach and passes over those that do not run."""

import torch

from fastmoco.bench.kernels import PROVIDED
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


def test_neighbours_differ_in_one_number():
    def numbers(row: Tiles) -> tuple:
        return (*row.block, row.num_warps, row.num_stages)

    found = [numbers(row) for row in neighbours(START)]
    assert len(set(found)) == len(found) == 8
    assert all(sum(a != b for a, b in zip(row, numbers(START), strict=True)) == 1 for row in found)


def test_every_entry_of_the_table_has_a_size_to_time_it_at():
    for entry in TABLE:
        assert entry.partition(".")[0] in PROVIDED, entry
    assert (size_of("info_nce.512").recipe.dim, size_of("info_nce.512").dtype) == (512, torch.bfloat16)
    assert (size_of("photometric.blur.fp32").recipe.dim, size_of("photometric.blur.fp32").dtype) == (128, torch.float32)
