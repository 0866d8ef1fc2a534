"""The parts of a step, by name, as a profiler shows them; outside of a profile naming them costs one attribute."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ContextDecorator, ExitStack, contextmanager
from typing import Any

import torch

PARTS = ("photometric", "key encoder", "query encoder", "loss", "backward", "update", "enqueue")

Range = Callable[[str], AbstractContextManager]
_ranges: tuple[Range, ...] = ()


class part(ContextDecorator):
    """Range called `name`, one of PARTS, for every profiler that `naming` names parts to; nothing outside of it.

    Use it on a function, or around a block: `with part(name):`.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._stack: ExitStack | None = None

    def _recreate_cm(self) -> part:
        return part(self._name)

    def __enter__(self) -> None:
        if _ranges:
            self._stack = stack = ExitStack()
            for each in _ranges:
                stack.enter_context(each(self._name))

    def __exit__(self, *error: Any) -> None:
        if self._stack is not None:
            self._stack.__exit__(*error)


@contextmanager
def naming(*more: Range) -> Iterator[None]:
    """Name the parts of the steps inside: to torch.profiler, on a GPU to NVTX, and to `more`."""
    global _ranges
    nvtx = (torch.cuda.nvtx.range,) if torch.cuda.is_available() else ()
    _ranges = (torch.profiler.record_function, *nvtx, *more)
    try:
        yield
    finally:
        _ranges = ()
