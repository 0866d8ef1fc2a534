"""Being asked to stop: a signal to any rank lets every rank finish the same step, save and leave.

The handler only sets a flag. Ranks compare their wishes after steps with a reduction that stays on the device; on GPUs
after every eighth step, and the result is read eight steps later, so that asking costs neither a wait nor a collective
in every step.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor

from fastmoco.parallel import Parallel
from fastmoco.process.interrupt import SIGNALS, UNSAVED, not_ignored

STOPPED = 143
"""Exit code of a run that was asked to stop, saved and can be resumed. No other way to end has it."""
SAVED_MARK = "saved"
ECHO_SECONDS = 0.5
"""Signals this soon after the first are the same request: a terminal and a launcher both pass on one Ctrl-C."""


EVERY = 8
"""Steps between two votes of ranks on GPUs: a tenth of a second at the smallest batches, and with as much again until
the result is read, seconds at the largest. torchrun kills what was asked to stop after 30."""


def unsaved_code(number: int) -> int:
    """Exit code of a process that a signal ended before it had saved: 128 + its number, but never STOPPED."""
    return UNSAVED if 128 + number == STOPPED else 128 + number


def note_saved() -> None:
    """Tell the launcher, if there is one, that this job was asked to stop and has saved."""
    folder = os.environ.get("FASTMOCO_LAUNCH")
    if folder and os.path.isdir(folder):
        Path(folder, SAVED_MARK).touch()


class Stopped(Exception):
    """Raised inside work that is not a step, kNN above all, where the run was asked to stop."""


class StopRequest:
    """Whether this process was asked to stop."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.since = 0.0
        """When the first signal came, by time.monotonic; known also while the main thread is busy in C, and `signal`
        is still unset."""

    def __bool__(self) -> bool:
        return self.signal is not None

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Signal handler: note the first signal; at a second one, leave at once and unsaved (`unsaved_code`)."""
        now = time.monotonic()
        if self.signal is None:
            self.signal, self.since = number, self.since or now
        elif now - self.since > ECHO_SECONDS:
            os._exit(unsaved_code(number))


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Turn SIGNALS into a request while the block lasts; outside the main thread, do nothing."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    with _noticed_at_once(request):
        yield from _receiving(request)


@contextmanager
def _noticed_at_once(request: StopRequest) -> Iterator[None]:
    # Python runs a handler only between two steps of the main thread, which a long operation may keep for minutes.
    # The byte that the interpreter writes for each signal is there at once.
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    thread = threading.Thread(target=_notice, args=(reader, request), name="fastmoco-signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writer)
        thread.join()


def _notice(reader: int, request: StopRequest) -> None:
    while number := os.read(reader, 1):
        if number[0] in SIGNALS:
            request.since = request.since or time.monotonic()
    os.close(reader)


def _receiving(request: StopRequest) -> Iterator[StopRequest]:
    before = {number: signal.signal(number, request.receive) for number in not_ignored(SIGNALS)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Vote:
    """Wishes that count when any rank has them, agreed on by all ranks at the same step.

    Ranks on a CPU vote after each step, and know the result at once. Ranks on GPUs vote after every EVERY steps, on all
    that was wished since, and read the result at the next vote, when it has long arrived: so that most steps cost no
    collective, and none a wait.
    """

    def __init__(self, parallel: Parallel, every: int | None = None) -> None:
        self.parallel = parallel
        self._every = every or (EVERY if parallel.device.type == "cuda" else 1)
        self._casts = 0
        self._wishes: list[bool] = []
        self._pending: tuple[Tensor, torch.cuda.Event | None] | None = None

    def cast(self, *wishes: bool) -> list[bool]:
        """Every rank calls this after each step. Returns what was wished, on GPUs at most 2 EVERY - 1 calls before."""
        if self.parallel.world == 1:
            return [bool(wish) for wish in wishes]
        earlier = self._wishes or [False] * len(wishes)
        self._wishes = [bool(wish) or before for wish, before in zip(wishes, earlier, strict=True)]
        self._casts += 1
        if self._casts % self._every:
            return [False] * len(wishes)
        votes, self._wishes = self._count(self._wishes), []
        if self._every == 1:
            return _read(*votes)
        last, self._pending = self._pending, votes
        return [False] * len(wishes) if last is None else _read(*last)

    def _count(self, wishes: list[bool]) -> tuple[Tensor, torch.cuda.Event | None]:
        device = self.parallel.device
        # Filled on the device: a tensor made on the host would have to be waited for.
        ballot = torch.stack([torch.full((), float(wish), device=device) for wish in wishes])
        votes = self.parallel.mean(ballot)
        if device.type != "cuda":
            return votes, None
        host = torch.empty(votes.shape, pin_memory=True).copy_(votes, non_blocking=True)
        event = torch.cuda.Event(blocking=True)  # otherwise a host that has to wait spins, on a core that decodes
        event.record()
        return host, event


def _read(votes: Tensor, event: torch.cuda.Event | None) -> list[bool]:
    if event is not None:
        event.synchronize()
    return [share > 0 for share in votes.tolist()]
