"""Saving while training goes on: the state is copied at the step, one thread writes the copy.

A disk that is full, read-only or gone costs a warning and a checkpoint, not the run: the last good one is still whole,
and the next interval tries again. Anything else that goes wrong in the thread ends the run at its next step.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmoco.process import crash_points
from fastmoco.runs import checkpoint
from fastmoco.runs.facts import go_on

DISK_TROUBLE = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EIO,
    errno.ESTALE,
    errno.ENODEV,
    errno.ENXIO,
    errno.ENOTCONN,
    errno.EHOSTDOWN,
    errno.ETIMEDOUT,
}


class SaveError(ValueError):
    """The last state of a run could not be written."""

    exit_code = 1


class Saver:
    """Writes checkpoints of `run` in the background, one at a time; memory for the copy is taken once and kept.

    `report` gets one line where the disk refuses. `good` is the newest step known to be on disk, None if none is.
    """

    def __init__(
        self, run: Path, keep: int, keep_every: int, report: Callable[[str], None], good: int | None = None
    ) -> None:
        self.run, self.good = run, good
        self._keep, self._keep_every, self._report = keep, keep_every, report
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fastmoco-saver")
        self._copies: dict[str, Tensor] = {}
        self._job: tuple[int, Mapping[str, Any], torch.cuda.Event | None] | None = None
        self._writing: Future | None = None
        self._refusal: OSError | None = None

    def start(self, step: int, state: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Copy `state` as it is at this moment and begin to write it, once the write before it has ended.

        On a GPU the copy is queued behind the step, and nothing waits for it.
        """
        self.wait()
        crash_points.reach("before copy")
        self._job = (step, dict(meta), self._copy(state))
        crash_points.reach("after copy")
        self._writing = self._thread.submit(self._write)

    def check(self) -> None:
        """Take in a write that has ended. Raises what went wrong in it, unless the disk refused."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Let the write in progress end, and take it in like `check`."""
        writing, self._writing = self._writing, None
        if writing is None:
            return
        assert self._job is not None
        step = self._job[0]
        try:
            writing.result()
        except OSError as error:
            if error.errno not in DISK_TROUBLE:
                raise
            self._refusal = error
            self._report(
                f"warning: the checkpoint of step {step} could not be written ({_answer(error)}); "
                f"{self._last()}; training goes on, the next interval tries again"
            )
        else:
            self.good, self._refusal = step, None

    def finish(self) -> None:
        """Return when the newest state is on disk, after one more try where the disk refused it; else SaveError."""
        self.wait()
        if self._refusal is not None:
            self._writing = self._thread.submit(self._write)
            self.wait()
        if self._refusal is not None and self._job is not None:
            raise SaveError(
                f"{self.run}: the state after step {self._job[0]} could not be written ({_answer(self._refusal)}); "
                f"{self._last()}: mend the disk, then go on with {go_on(self.run)}"
            )

    def close(self) -> None:
        """Let the write in progress end, whatever comes of it, and end the thread."""
        self._thread.shutdown()

    def _copy(self, state: Mapping[str, Tensor]) -> torch.cuda.Event | None:
        on_gpu = any(value.is_cuda for value in state.values())
        if self._copies.keys() != state.keys():
            self._copies = {
                name: torch.empty(value.shape, dtype=value.dtype, pin_memory=on_gpu) for name, value in state.items()
            }
        for name, value in state.items():
            self._copies[name].copy_(value.detach(), non_blocking=True)
        return torch.cuda.current_stream().record_event() if on_gpu else None

    def _write(self) -> None:
        assert self._job is not None
        step, meta, event = self._job
        if event is not None:
            event.synchronize()
        if not self.run.is_dir():  # a folder made anew in its place could be on another disk
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.run))
        checkpoint.save(self.run, step, self._copies, meta, self._keep, self._keep_every)

    def _last(self) -> str:
        if self.good is None:
            return "no checkpoint was written yet"
        return f"the last good checkpoint is of step {self.good}"


def _answer(error: OSError) -> str:
    return f"{error.strerror}: {error.filename}" if error.filename else str(error.strerror)
