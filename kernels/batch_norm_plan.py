"""How the passes of batch norm are cut into programs and launched.

On Hopper and later, what follows a reduction may be launched while that still runs (programmatic dependent launch): its
blocks are there when the last block of the one before ends, instead of a microsecond later. Each waits for the whole
kernel before it, and for what that has written, ahead of all else it does, so that no more than the launch overlaps.
A norm is four to six such launches, a step more than three hundred.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fastmoco.kernels.dispatch import launch_options, machine
from fastmoco.kernels.tiles import Tiles, tiles

OVERLAPPING = (9, 0)  # the first capability that can launch a kernel before the one ahead of it has ended
# Launched so, because the kernel ahead of them in their stream is always one of ours, which says when.
FOLLOWERS = ("batch_norm.finish", "batch_norm.apply", "batch_norm.gradient")
FINISH = Tiles((4,), 8, 1, "one 16-byte load of fp32 a row: few partials are left for a program, which is all latency")
PROGRAMS_PER_MULTIPROCESSOR = 4  # of the reductions: all resident at once, so that none is a tail
# Partial sums of a channel that a program of the second stage holds in registers. Several groups are loaded together,
# so that their memory latencies overlap.
MAX_SPLITS = 512


class Plan(NamedTuple):
    """How one pass is launched: options, rows of a group, and the grids of passes that apply and that reduce."""

    options: dict[str, int]
    rows: int
    grid: tuple[int]
    splits: int
    split_grid: tuple[int, int, int]


def plan(kernel: str, x: Tensor, groups: int, rows: int | None = None) -> Plan:
    """The launch of `kernel` (a name in the table of tiles) over x, or over `rows` rows a group of as many channels."""
    capability, processors = machine(x.device)
    # The row is looked up on every call, as `bench tune` changes the table; what follows from it is kept.
    rows = rows or x.numel() // x.shape[1] // groups
    return _cut(tiles(kernel, capability), rows, x.shape[1], groups, processors, kernel, overlapping(capability))


@functools.cache
def _cut(row: Tiles, rows: int, channels: int, groups: int, processors: int, kernel: str, early: bool) -> Plan:
    options = block_options(row, channels)
    columns = triton.cdiv(channels, options["BLOCK_CHANNELS"])
    count = triton.cdiv(rows, options["BLOCK_ROWS"])
    wanted = min(MAX_SPLITS, max(1, PROGRAMS_PER_MULTIPROCESSOR * processors // (columns * groups)))
    splits = triton.cdiv(count, triton.cdiv(count, wanted))
    options |= launch_options(row) | overlaps(kernel, early)
    return Plan(options, rows, (columns * groups * count,), splits, (splits, columns, groups))


def block_options(row: Tiles, channels: int) -> dict[str, int]:
    """The block of a row of tiles; fewer channels than it has give as many more rows."""
    block_channels = min(row.block[1], triton.next_power_of_2(channels))
    return {"BLOCK_ROWS": row.block[0] * row.block[1] // block_channels, "BLOCK_CHANNELS": block_channels}


def finish_options(groups: int, splits: int, device: torch.device) -> dict[str, int]:
    """How a second stage is launched."""
    return _finish_options(groups, splits, overlapping(machine(device).capability))


@functools.cache
def _finish_options(groups: int, splits: int, early: bool) -> dict[str, int]:
    block_splits = triton.next_power_of_2(splits)
    block_groups = min(triton.next_power_of_2(groups), max(1, MAX_SPLITS // block_splits))
    blocks = {"BLOCK_GROUPS": block_groups, "BLOCK_SPLITS": block_splits, "BLOCK_CHANNELS": FINISH.block[0]}
    return blocks | launch_options(FINISH) | overlaps("batch_norm.finish", early)


def overlapping(capability: tuple[int, int] | None) -> bool:
    """Whether launches overlap on a device of that capability; None is the interpreter."""
    return capability is not None and capability >= OVERLAPPING


def overlaps(kernel: str, early: bool) -> dict[str, int]:
    """The options of a kernel that lets the next one be launched early, or waits for the one before it."""
    if kernel.startswith("batch_norm_pool."):
        return {}
    options: dict[str, int] = {"DEPENDENT": early}
    return options | {"launch_pdl": True} if early and kernel in FOLLOWERS else options


@contextmanager
def one_after_the_other() -> Iterator[None]:
    """No launch overlaps another in the block: what overlapping is compared with."""
    global OVERLAPPING
    before, OVERLAPPING = OVERLAPPING, (99, 0)
    try:
        yield
    finally:
        OVERLAPPING = before
