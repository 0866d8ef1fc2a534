"""Being asked to stop: a signal to any rank lets every rank finish the same step, save and leave.

The handler only sets a flag. Ranks compare their wishes after each step with a reduction that stays on the device;
on a GPU its result is read one step later, so that asking costs no wait.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from torch import Tensor

from fastmoco.parallel import Parallel

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
STOPPED = 143
"""Exit code of a run that was asked to stop, saved and can be resumed."""
ECHO_SECONDS = 0.5
"""Signals this soon after the first are the same request: a terminal and a launcher both pass on one Ctrl-C."""


class Stopped(Exception):
    """Raised inside work that is not a step, kNN above all, where the run was asked to stop."""


class StopRequest:
    """Whether this process was asked to stop."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.since = 0.0

    def __bool__(self) -> bool:
        return self.signal is not None

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Signal handler: note the first signal; at a second one, leave at once with 128 + its number, unsaved."""
        now = time.monotonic()
        if self.signal is None:
            self.signal, self.since = number, now
        elif now - self.since > ECHO_SECONDS:
            os._exit(128 + number)


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Turn SIGTERM, SIGINT and SIGUSR1 into a request while the block lasts; outside the main thread, do nothing."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request.receive) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Vote:
    """Wishes that count when any rank has them, agreed on by all ranks at the same step."""

    def __init__(self, parallel: Parallel) -> None:
        self.parallel = parallel
        self._pending: tuple[Tensor, torch.cuda.Event] | None = None

    def cast(self, *wishes: bool) -> list[bool]:
        """Every rank calls this after each step. Returns what was wished, on a GPU with ranks one call earlier."""
        if self.parallel.world == 1:
            return [bool(wish) for wish in wishes]
        device = self.parallel.device
        # Filled on the device: a tensor made on the host would have to be waited for.
        ballot = torch.stack([torch.full((), float(bool(wish)), device=device) for wish in wishes])
        counted = self.parallel.mean(ballot)
        if device.type != "cuda":
            return [share > 0 for share in counted.tolist()]
        return self._exchange(counted)

    def _exchange(self, counted: Tensor) -> list[bool]:
        host = torch.empty(counted.shape, pin_memory=True).copy_(counted, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        last, self._pending = self._pending, (host, arrived)
        if last is None:
            return [False] * len(counted)
        last[1].synchronize()
        return [share > 0 for share in last[0].tolist()]
