"""What one subject has measured so far: kept after every set of rows, with what failed and the clocks meanwhile.

A benchmark that is stopped, or that runs out of memory half way, so leaves everything that was finished before.
"""

from __future__ import annotations

import contextlib
import gc
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator

import torch

from fastmoco.bench.clocks import Clocks
from fastmoco.bench.record_files import Row


class Journal:
    """Collects rows and failures; `save` is called with the journal whenever rows have come in."""

    def __init__(self, save: Callable[[Journal], None] | None = None, clocks: Clocks | None = None) -> None:
        self._save, self._clocks = save, clocks
        self._rows: dict[str, Row] = {}
        self.failures: dict[str, str] = {}

    @property
    def rows(self) -> list[Row]:
        """The rows so far, in the order in which they first came."""
        return list(self._rows.values())

    def keep(self, rows: Iterable[Row]) -> None:
        """Take `rows` in, in place of those of the same measurement, and save."""
        if self._clocks is not None:
            self._clocks.sample()
        self._rows |= {row.key: row for row in rows}
        if self._save is not None:
            self._save(self)

    def fail(self, what: str, error: Exception) -> None:
        """Note and print why `what` failed, and free the memory that it held."""
        self.failures[what] = f"{type(error).__name__}: {' '.join(str(error).split())}"
        print(f"{what} failed: {self.failures[what]}", file=sys.stderr, flush=True)
        if not isinstance(error, torch.OutOfMemoryError):
            traceback.print_exception(error)
        cause: BaseException | None = error
        while cause is not None:
            traceback.clear_frames(cause.__traceback__)
            cause = cause.__context__
        gc.collect()
        if torch.cuda.is_available():
            with contextlib.suppress(RuntimeError):  # some errors of CUDA stay, and every later call raises them again
                torch.cuda.empty_cache()

    @contextlib.contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """What fails inside is noted under `what`, and the rest goes on."""
        try:
            yield
        except Exception as error:
            self.fail(what, error)

    def facts(self) -> dict[str, object]:
        """What a record's environment says of this: clocks, and what failed, where there is any."""
        clocks = {} if self._clocks is None else self._clocks.summary()
        return {name: value for name, value in (("clocks", clocks), ("failed", self.failures)) if value}
