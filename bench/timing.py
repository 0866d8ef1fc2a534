"""How long things take: interleaved rounds, their medians, and the machine's own ceilings.

Providers are timed in turn, round after round, each round in another order, because clocks drift: two blocks timed one
after the other can differ by more than the effect looked for. On a GPU a sample is what the device itself measures
between two events around the call, and it is awaited before the next one begins; the device is kept busy before the
first event, so that launches run ahead. On a CPU a sample repeats the work until it lasts long enough for the clock.
"""

from __future__ import annotations

import functools
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from fastmoco.kernels.convolution import conv2d, layer_of, saving

CPU_NAME = "cpu"  # of a `Machine` that is no GPU
SHORTEST_SAMPLE = 0.005  # seconds: the clock and the loop around it stay under 0.1 % of a sample
FLUSH_BYTES = 256 << 20  # larger than the last cache of any machine we know
WAKE_SECONDS = 0.3


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
    after_round: Callable[[dict[str, Timing]], None] | None = None,
    on_failure: Callable[[str, Exception], None] | None = None,
) -> dict[str, Timing]:
    """Time every provider `rounds` times, in turn and in an order that changes each round.

    `warmup` calls of each come first and are not counted. `cold` empties the caches before each call on a GPU, which
    is what a kernel meets inside a training step. `after_round` gets what was measured so far. With `on_failure`, a
    provider that raises is reported to it and takes no further part; its samples from before stay. Raises ValueError
    if there is nothing to time.
    """
    if not providers or rounds < 1:
        raise ValueError(f"nothing to time: {len(providers)} providers, {rounds} rounds")
    live, shuffle = dict(providers), random.Random(0)
    timer = _GpuTimer(cold) if torch.device(device).type == "cuda" else _CpuTimer()
    samples: dict[str, list[float]] = {name: [] for name in live}

    def attempt(name: str, work: Callable[[str, Callable], float | None]) -> float | None:
        try:
            return work(name, live[name])
        except Exception as error:  # whatever it is, the others are still to be timed
            if on_failure is None:
                raise
            del live[name]
            on_failure(name, error)
            return None

    def warm(name: str, call: Callable) -> None:
        for _ in range(warmup):
            call()
        timer.prepare(name, call)

    def collect() -> dict[str, Timing]:
        return {name: Timing(tuple(values)) for name, values in samples.items() if values}

    for name in list(live):
        attempt(name, warm)
    for _ in range(rounds):
        order = list(live)
        shuffle.shuffle(order)
        for name in order:
            seconds = attempt(name, timer.seconds)
            samples[name] += [] if seconds is None else [seconds]
        if after_round is not None:
            after_round(collect())
    return collect()


class _CpuTimer:
    def __init__(self) -> None:
        self._repeats: dict[str, int] = {}

    def prepare(self, name: str, call: Callable) -> None:
        start = time.perf_counter()
        call()
        self._repeats[name] = max(1, int(SHORTEST_SAMPLE / max(time.perf_counter() - start, 1e-9)))

    def seconds(self, name: str, call: Callable) -> float:
        start = time.perf_counter()
        for _ in range(self._repeats[name]):
            call()
        return (time.perf_counter() - start) / self._repeats[name]


class _GpuTimer:
    def __init__(self, cold: bool) -> None:
        self._flush = torch.zeros(FLUSH_BYTES // 4, device="cuda") if cold else None
        self._sum = torch.zeros((), device="cuda") if cold else None

    def prepare(self, name: str, call: Callable) -> None:
        torch.cuda.synchronize()  # what failed in the warm-up is this provider's

    def seconds(self, name: str, call: Callable) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if self._flush is not None:
            # Read, and not written: what is left of writing would go back to memory beside the call that is timed.
            torch.sum(self._flush, 0, out=self._sum)
        # A starved stream would time the host's gaps: over a millisecond of work lets the launches run ahead.
        torch.cuda._sleep(3_000_000)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3


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
    Measured once in a process, so that all rows of a run refer to the same ceilings; a GPU multiplies for a while
    before, because an idle one has low clocks.
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
    if on_gpu:
        _wake(lambda: torch.mm(left, right, out=product))
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
    name = torch.cuda.get_device_name(device) if on_gpu else CPU_NAME
    # The best sample: a ceiling is what the machine can do, not what it did on average.
    best = {name: min(timing.samples) for name, timing in times.items()}
    return Machine(name, max(2 * size / best["copy"], 3 * size / best["sum"]), 2 * side**3 / best["product"])


def measure_convolutions(device: torch.device, dtype: torch.dtype, *, rounds: int = 3) -> float:
    """Operations a second of a 3x3 convolution of 256 channels at 14 pixels, forward and backward, channels-last.

    The one in the middle of a ResNet-50 at 224 pixels, which has as many operations as most of the others. Those that
    Winograd's algorithm saves are not counted.
    """
    channels, side, count = 256, 14, 256 if device.type == "cuda" else 8
    x = torch.randn(count, channels, side, side, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    weight = torch.randn(channels, channels, 3, 3, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    gradient = torch.randn_like(x)
    inputs = [x.requires_grad_(), weight.requires_grad_()]

    def call() -> object:
        return torch.autograd.grad(conv2d(x, weight, padding=1), inputs, gradient)

    timing = interleave({"both": call}, rounds=rounds, warmup=1, device=device)["both"]
    layer = layer_of(x.shape, weight.shape, 1, 1)
    flops = 3 * 2 * 9 * channels**2 * side**2 * count / (saving(layer, dtype) if device.type == "cpu" else 1)
    return flops / min(timing.samples)


def _wake(work: Callable[[], object]) -> None:
    end = time.perf_counter() + WAKE_SECONDS
    while time.perf_counter() < end:
        work()
        torch.cuda.synchronize()
