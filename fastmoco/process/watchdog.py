"""A run that makes no progress for too long is ended, with the stacks of all its threads on stderr.

A rank that hangs holds up every other rank, and a launcher learns of it only when the process ends.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable

from fastmoco.process.stop import StopRequest

STUCK = 124
"""Exit code of a process that the watchdog ended; that of timeout(1)."""
FIRST_FACTOR = 3
"""The first sign of life may take this many times longer: kernels are compiled and file caches are cold."""
STOP_SECONDS = 25.0
"""Patience with a step after a stop request: who asks will soon kill (torchrun after 30 s), and show no stacks."""
WAITING_SECONDS = 10.0
"""More patience with a process that waits for others: the one that they wait for is to show its stacks first."""
WAITING = ("parallel.py", "torch/distributed", "torch/nn/parallel", "torch/autograd/graph.py", "process/stop.py")
"""Ends of the source files whose calls wait for other ranks, or for a GPU that does."""
HELD_SECONDS = 30.0
"""Beyond its patience, for the case that a stuck call holds the interpreter's lock and this thread cannot run."""


class Watchdog:
    """Ends the process with code STUCK where `beat` is not called for `seconds`; 0 seconds is no watchdog.

    A context manager: it watches while the block lasts.
    """

    def __init__(self, seconds: float, request: StopRequest, exit: Callable[[int], object] = os._exit) -> None:
        self._seconds, self._request, self._exit = seconds, request, exit
        self._patience = seconds * FIRST_FACTOR
        self._last = time.monotonic()
        self.saving = False
        """Whether the process is writing its last state, which may take its time; torchrun's 30 s still hold."""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="fastmoco-watchdog", daemon=True)

    def beat(self) -> None:
        """A sign of life: a step, a batch of an evaluation, a finished write."""
        self._last, self._patience = time.monotonic(), self._seconds

    def __enter__(self) -> Watchdog:
        if self._seconds:
            self._last = time.monotonic()
            self._arm(self._patience)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._seconds:
            self._thread.join()

    def _watch(self) -> None:
        pause = min(1.0, self._seconds / 10)
        try:
            while not self._over.wait(pause):
                patience, silent = self._limit(), time.monotonic() - max(self._last, self._since())
                if silent > patience:
                    self._end(silent)
                    return
                self._arm(patience)
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _arm(self, patience: float) -> None:
        faulthandler.dump_traceback_later(patience + HELD_SECONDS, exit=True, file=2)

    def _limit(self) -> float:
        launched = "TORCHELASTIC_RUN_ID" in os.environ
        hurried = self._request.since > 0 and (launched or not self.saving)
        patience = min(self._patience, STOP_SECONDS) if hurried else self._patience
        return patience + WAITING_SECONDS if launched and not hurried and _waits_for_others() else patience

    def _since(self) -> float:
        return self._request.since

    def _end(self, silent: float) -> None:
        rank = os.environ.get("RANK", "0")
        text = f"fastmoco: error (rank {rank}): no progress for {silent:.0f} s, the stacks of all threads follow\n"
        os.write(2, text.encode())
        faulthandler.dump_traceback(file=2, all_threads=True)
        self._exit(STUCK)


def _waits_for_others() -> bool:
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        if any(part in frame.f_code.co_filename for part in WAITING):
            return True
        frame = frame.f_back
    return False
