"""Metrics of the steps: kept on the device, copied to the host without waiting, read one interval late.

Reading a metric on the host waits for the device. So metrics stay on the device until the end of an interval, are
copied without waiting, and are read one interval later, when they have long arrived.
"""

from __future__ import annotations

import resource
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

GIB = 2**30
METRICS = ("loss", "top1", "top5", "nonfinite", "spread")


class BadStep(NamedTuple):
    """A step with a loss or gradients that are infinite or NaN."""

    step: int
    """Number of the step, the first being 1."""
    ranks: tuple[int, ...]
    """Ranks whose own loss was not finite; none where gradients alone were, which ranks share."""

    def __str__(self) -> str:
        whose = f"the loss of rank {', '.join(map(str, self.ranks))}" if self.ranks else "gradients"
        return f"{whose} became infinite or NaN in step {self.step}"


class Reading(NamedTuple):
    """What the host knows of an interval once its figures have arrived."""

    line: dict[str, float]
    """Log line: step, the means of METRICS over ranks and finite steps (NaN without any), and the facts."""
    finite: int
    """Steps of the interval that were finite."""
    faults: list[BadStep]
    """The others."""


@dataclass(frozen=True)
class Interval:
    """Metrics of the steps since the last one, [ranks, steps, metrics], on their way to the host."""

    step: int
    rows: Tensor
    event: torch.cuda.Event | None
    facts: Mapping[str, float]

    def read(self) -> Reading:
        """Wait for the figures and sum them up."""
        if self.event is not None:
            self.event.synchronize()
        bad = self.rows[..., METRICS.index("nonfinite")] > 0
        good = ~bad.any(0)
        means = dict(zip(METRICS, self.rows[:, good].double().mean((0, 1)).tolist(), strict=True))
        first = self.step - len(good) + 1
        nonfinite = ~self.rows[..., METRICS.index("loss")].isfinite()
        faults = [
            BadStep(first + index, tuple(nonfinite[:, index].nonzero().flatten().tolist()))
            for index in (~good).nonzero().flatten().tolist()
        ]
        return Reading({"step": self.step, **means, **self.facts, "nonfinite": len(faults)}, int(good.sum()), faults)


class Meter:
    """Collects metrics on the device; an interval is read `lag` intervals after it ended (one on a GPU)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.lag = 1 if device.type == "cuda" else 0
        self._rows: list[Tensor] = []
        self._pending: deque[Interval] = deque()

    def add(self, values: Iterable[Tensor]) -> None:
        """Add one step's 0-d tensors, METRICS."""
        self._rows.append(torch.stack([value.detach().float() for value in values]))

    @property
    def steps(self) -> int:
        """Steps in the current interval."""
        return len(self._rows)

    def nonfinite(self) -> bool:
        """Whether a step of this rank that was not yet read was not finite. Waits for the device."""
        pending = [fault for interval in self._pending for fault in interval.read().faults]
        column = METRICS.index("nonfinite")
        return bool(pending) or bool(self._rows) and bool((torch.stack(self._rows)[:, column] > 0).any())

    def cut(self, step: int, parallel: Any, facts: Mapping[str, float]) -> None:
        """End the interval at `step`: gather it from all ranks, and start the copy to the host."""
        assert self._rows
        rows = parallel.all_gather(torch.stack(self._rows)).view(parallel.world, -1, len(METRICS))
        event = None
        if self.device.type == "cuda":
            pinned = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
            rows = pinned.copy_(rows, non_blocking=True)
            event = torch.cuda.Event(blocking=True)
            event.record()
        self._pending.append(Interval(step, rows, event, dict(facts)))
        self._rows = []

    def read(self, everything: bool = False) -> Iterator[Reading]:
        """Intervals that are due."""
        while len(self._pending) > (0 if everything else self.lag):
            yield self._pending.popleft().read()


class Stopwatch:
    """Time of an interval, and how much of it was spent waiting for data."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._waits = 0.0

    def add_wait(self, seconds: float) -> None:
        """Note a wait for data."""
        self._waits += seconds

    def lap(self, pairs: int) -> dict[str, float]:
        """Pairs per second and the share of data wait since the last lap."""
        now = time.perf_counter()
        elapsed = max(now - self._start, 1e-9)
        facts = {"pairs_per_s": pairs / elapsed, "data_wait": min(self._waits / elapsed, 1.0)}
        self._start, self._waits = now, 0.0
        return facts

    def skip(self) -> None:
        """Start the interval anew: what happened since the last lap was no training."""
        self._start, self._waits = time.perf_counter(), 0.0


class Pace:
    """Keeps the host at most AHEAD steps before the device.

    Launching takes a fraction of a step: without this, batches would pile up in the device's memory, and the host would
    wait for the loader all the time, however fast it is.
    """

    AHEAD = 2

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._ends: deque[torch.cuda.Event] = deque()

    def step(self) -> None:
        """A step was launched. Waits for the one AHEAD before it, leaving the core to others."""
        if not self._on_gpu:
            return
        self._ends.append(torch.cuda.Event(blocking=True))
        self._ends[-1].record()
        if len(self._ends) > self.AHEAD:
            self._ends.popleft().synchronize()


def memory(device: torch.device) -> float:
    """Peak memory of the process so far in GiB. On a GPU these are allocations, cuDNN's trials and kNN included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
