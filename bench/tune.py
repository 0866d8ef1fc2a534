"""Tile sizes by measurement: from each row of `kernels/tiles.py` towards faster neighbours, few numbers at a time.

Explicit and rare, so that production compiles one variant of each kernel and never searches. What is printed is a row
for the table; run the tests of the kernels after taking it over.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from fastmoco import atomic
from fastmoco.bench.kernels import CASES, OURS, Size, replay
from fastmoco.bench.options import BenchTune
from fastmoco.bench.timing import interleave
from fastmoco.kernels.tiles import TABLE, Tiles, tiles
from fastmoco.options import UsageError
from fastmoco.presets import PRESETS
from fastmoco.recipe import Recipe

MOVES, GAIN = 6, 0.02  # moves at most from a row; a move must gain 2 %
WARPS, STAGES, BLOCK = (1, 2, 4, 8, 16), (1, 2, 3, 4, 5), (1, 8192)


def run(options: BenchTune) -> None:
    """`bench tune`: print the fastest rows found; UsageError without a GPU or where no entry has the name."""
    names = [name for name in TABLE if options.only in name]
    if not names:
        raise UsageError(f"no entry of kernels/tiles.py contains {options.only}: use one of {', '.join(TABLE)}")
    if not torch.cuda.is_available():
        raise UsageError("bench tune needs an NVIDIA GPU, and there is none here: run it where there is one")
    device = torch.device("cuda", torch.cuda.current_device())
    capability = torch.cuda.get_device_capability(device)
    lines = []
    for name in names:
        lines.append(_tune(name, capability, device, options))
        print(lines[-1], flush=True)
    if options.out is not None:
        atomic.write_text(Path(options.out), "\n".join(lines) + "\n")


def climb(start: Tiles, seconds: Callable[[Tiles], float | None], together: int = 1) -> tuple[Tiles, float, float]:
    """The fastest row reached from `start`, its seconds and those of `start`; None means that a row does not run.

    Where no change of one number gains, changes of two are tried, and so on up to `together`: a smaller block may only
    pay with fewer warps and more blocks at once.
    """
    best, first = start, seconds(start)
    assert first is not None, "a committed row does not run"
    least, changes, history = first, 1, {start}
    for _ in range(MOVES + together):
        candidates = [row for row in neighbours(best, changes) if row not in history]
        history |= set(candidates)
        times = [(time, row) for row in candidates if (time := seconds(row)) is not None]
        time, row = min(times, key=lambda pair: pair[0], default=(least, best))
        if time <= least * (1 - GAIN):
            best, least, changes = row, time, 1
        elif changes < together:
            changes += 1
        else:
            break
    return best, least, first


def neighbours(row: Tiles, changes: int = 1) -> Iterator[Tiles]:
    """Rows that differ in so many numbers: a block halved or doubled, other warps, one stage more or less."""
    numbers = (*row.block, row.num_warps, row.num_stages)
    blocks = [tuple(size for size in (n // 2, n * 2) if BLOCK[0] <= size <= BLOCK[1]) for n in row.block]
    warps = tuple(n for n in (row.num_warps // 2, row.num_warps * 2) if n in WARPS)
    stages = tuple(n for n in (row.num_stages - 1, row.num_stages + 1) if n in STAGES)
    choices = [*blocks, warps, stages]
    for places in itertools.combinations(range(len(numbers)), changes):
        for values in itertools.product(*(choices[place] for place in places)):
            change = dict(zip(places, values, strict=True))
            *block, num_warps, num_stages = (change.get(place, number) for place, number in enumerate(numbers))
            yield dataclasses.replace(row, block=tuple(block), num_warps=num_warps, num_stages=num_stages)


def size_of(entry: str) -> Size:
    """The shapes that exercise an entry of the table: its width, where its name holds one, and its type."""
    recipe = PRESETS["v2"][1].as_dict()
    width = entry.partition(".")[2]
    if width.isdigit():
        recipe["dim"] = int(width)
    return Size(Recipe.from_dict(recipe), torch.float32 if entry.endswith("fp32") else torch.bfloat16)


def measure(name: str, size: Size, device: torch.device, rounds: int) -> float:
    """Seconds of our kernels in all cases of an entry, each as a training step runs it: many launches as one graph."""
    total = 0.0
    for case in CASES[name.partition(".")[0]](size, device):
        calls = {OURS: case.providers[OURS]}
        if case.launches and device.type == "cuda":  # launched one by one, it is the host that would be timed
            stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
            calls = {OURS: replay(calls[OURS], stream, pool)}
        total += interleave(calls, rounds=rounds, device=device, cold=True)[OURS].median
    return total


def _tune(name: str, capability: tuple[int, int], device: torch.device, options: BenchTune) -> str:
    architecture, size = 10 * capability[0] + capability[1], size_of(name)
    original = TABLE[name]

    def seconds(row: Tiles) -> float | None:
        # The case is made anew, because tables on the device are laid out by the row.
        TABLE[name] = watch = _Watch({architecture: row})
        try:
            total = measure(name, size, device, options.rounds)
        except Exception:  # a candidate may exceed the machine in many ways, each with its own exception
            return None
        return total if watch.used else None

    try:
        start = tiles(name, capability)
        if seconds(start) is None:
            return f"# {name}: no benchmark reaches this entry"
        best, least, first = climb(start, seconds, options.together)
    finally:
        TABLE[name] = original
    why = f"measured on {torch.cuda.get_device_name(device)}: {1e6 * least:.1f} us, the row before {1e6 * first:.1f} us"
    return f'"{name}": {{{architecture}: Tiles({best.block}, {best.num_warps}, {best.num_stages}, "{why}")}},'


class _Watch(dict):
    """Rows of an entry that know whether they were looked up."""

    used = False

    def __getitem__(self, key: int) -> Tiles:
        self.used = True
        return super().__getitem__(key)
