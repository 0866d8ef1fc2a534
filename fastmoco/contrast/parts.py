"""The parts of a step, by name, as a profiler shows them; outside of a profile naming them costs one attribute."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, AbstractContextManager, contextmanager, nullcontext

import torch

PARTS = ("photometric", "key encoder", "query encoder", "loss", "backward", "update", "enqueue")

_named = False


def part(name: str) -> AbstractContextManager:
    """Range called `name`, one of PARTS: of torch.profiler, and on a GPU of NVTX too. Nothing unless `named` is on."""
    return _range(name) if _named else nullcontext()


@contextmanager
def named() -> Iterator[None]:
    """Name the parts of the steps inside."""
    global _named
    _named = True
    try:
        yield
    finally:
        _named = False


@contextmanager
def _range(name: str) -> Iterator[None]:
    with ExitStack() as ranges:
        ranges.enter_context(torch.profiler.record_function(name))
        if torch.cuda.is_available():
            ranges.enter_context(torch.cuda.nvtx.range(name))
        yield
