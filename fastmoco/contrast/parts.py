"""The parts of a step, by name, as a profiler shows them; outside of a profile naming them costs one attribute."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch

PARTS = ("photometric", "key encoder", "query encoder", "loss", "backward", "update", "enqueue")

Range = Callable[[str], AbstractContextManager]
_ranges: tuple[Range, ...] = ()


def part(name: str) -> AbstractContextManager:
    """Range called `name`, one of PARTS, for every profiler that `named` names parts to; nothing outside of it."""
    return _range(name) if _ranges else nullcontext()


@contextmanager
def named(*more: Range) -> Iterator[None]:
    """Name the parts of the steps inside: to torch.profiler, on a GPU to NVTX, and to `more`."""
    global _ranges
    nvtx = (torch.cuda.nvtx.range,) if torch.cuda.is_available() else ()
    _ranges = (torch.profiler.record_function, *nvtx, *more)
    try:
        yield
    finally:
        _ranges = ()


@contextmanager
def _range(name: str) -> Iterator[None]:
    with ExitStack() as ranges:
        for each in _ranges:
            ranges.enter_context(each(name))
        yield
