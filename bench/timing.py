"""How long things take: interleaved rounds, their medians, and the machine's own ceilings.

Providers are timed in turn, round after round, each round in another order, because clocks drift: two blocks timed one
after the other can differ by more than the effect looked for. On a GPU the whole round is queued before it is awaited,
so that a sample is the time of the work and not of its launch; on a CPU a sample repeats the work until it lasts long
enough for the clock.
"""

from __future__ import annotations

import functools
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

SHORTEST_SAMPLE = 0.005  # seconds: the clock and the loop around it stay under 0.1 % of a sample
FLUSH_BYTES = 256 << 20  # larger than the last cache of any machine we know


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one provider: every sample, and their median."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median seconds per call."""
        return statistics.median(self.samples)


def interleave(
    providers: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 20,
    warmup: int = 3,
    device: torch.device | str = "cpu",
    cold: bool = False,
) -> dict[str, Timing]:
    """Time every provider `rounds` times, in turn and in an order that changes each round.

    `warmup` calls of each come first and are not counted. `cold` empties the caches before each call on a GPU, which
    is what a kernel meets inside a training step. ValueError where there is nothing to time.
    """
    if not providers or rounds < 1:
        raise ValueError(f"nothing to time: {len(providers)} providers, {rounds} rounds")
    device = torch.device(device)
    for call in providers.values():
        for _ in range(warmup):
            call()
    order, shuffle = list(providers), random.Random(0)
    samples: dict[str, list[float]] = {name: [] for name in providers}
    timer = _gpu_timer(cold) if device.type == "cuda" else _cpu_timer(providers)
    for _ in range(rounds):
        shuffle.shuffle(order)
        for name in order:
            samples[name].append(timer(name, providers[name]))
    return {name: Timing(tuple(values)) for name, values in samples.items()}


def _cpu_timer(providers: Mapping[str, Callable[[], object]]) -> Callable[[str, Callable], float]:
    repeats = {}
    for name, call in providers.items():
        started = time.perf_counter()
        call()
        repeats[name] = max(1, int(SHORTEST_SAMPLE / max(time.perf_counter() - started, 1e-9)))

    def timed(name: str, call: Callable) -> float:
        started = time.perf_counter()
        for _ in range(repeats[name]):
            call()
        return (time.perf_counter() - started) / repeats[name]

    return timed


def _gpu_timer(cold: bool) -> Callable[[str, Callable], float]:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda") if cold else None

    def timed(name: str, call: Callable) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if flush is not None:
            flush.zero_()
        # A starved stream would time the host's gaps: half a millisecond of work lets the launches run ahead.
        torch.cuda._sleep(1_000_000)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3

    return timed


@dataclass(frozen=True)
class Machine:
    """What the device reaches in plain passes over memory and in a plain matrix product, measured now."""

    name: str
    bandwidth: float  # bytes a second, read and written
    flops: float  # a second, in the given type, fp32 accumulation

    def bound(self, nbytes: float, flops: float) -> float:
        """Seconds that this work takes at the least: the larger of its memory and its arithmetic time."""
        return max(nbytes / self.bandwidth, flops / self.flops)


@functools.cache
def measure_machine(device: torch.device | str, dtype: torch.dtype, *, rounds: int = 5, tf32: bool = False) -> Machine:
    """The ceilings of `device` for `dtype`, by passes over more memory than its caches hold and a square product.

    A copy and a sum in place: on most CPUs a copy also reads what it overwrites, and then the sum shows more.
    Measured once in a process, so that all rows of a run refer to the same ceilings.
    """
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    size, side = (1 << 30, 8192) if on_gpu else (FLUSH_BYTES, 1536)
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    left = torch.randn(side, side, device=device).to(dtype)
    right = torch.randn(side, side, device=device).to(dtype)
    product = torch.empty(side, side, dtype=dtype, device=device)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    times = interleave(
        {
            "copy": lambda: target.copy_(source),
            "sum": lambda: target.add_(source),
            "product": lambda: torch.mm(left, right, out=product),
        },
        rounds=rounds,
        warmup=1,
        device=device,
    )
    torch.set_float32_matmul_precision(before)
    name = torch.cuda.get_device_name(device) if on_gpu else "cpu"
    # The best sample: a ceiling is what the machine can do, not what it did on average.
    best = {name: min(timing.samples) for name, timing in times.items()}
    return Machine(name, max(2 * size / best["copy"], 3 * size / best["sum"]), 2 * side**3 / best["product"])
