"""The timer finds known differences, interleaves, and refuses to time nothing."""

from collections.abc import Callable

import pytest
import torch

from fastmoco.bench.timing import interleave, measure_machine


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """work(seconds) takes so long by the timer's clock, however busy the machine is."""
    now = [0.0]
    monkeypatch.setattr("fastmoco.bench.timing.time.perf_counter", lambda: now[0])

    def spend(seconds: float) -> None:
        now[0] += seconds

    return spend


def test_a_call_twice_as_long_takes_twice_as_long(work):
    times = interleave({"one": lambda: work(0.004), "two": lambda: work(0.008)}, rounds=15, warmup=1)
    assert times["two"].median / times["one"].median == pytest.approx(2)
    assert times["one"].median == pytest.approx(0.004)


def test_a_short_call_is_repeated_until_the_clock_can_tell(work):
    calls = []
    times = interleave({"short": lambda: (calls.append(0), work(0.0005))}, rounds=4, warmup=0)
    assert times["short"].median == pytest.approx(0.0005) and len(calls) == 1 + 4 * 10


def test_rounds_interleave_and_change_their_order(work):
    calls: list[str] = []
    providers = {name: (lambda name=name: (calls.append(name), work(0.006))) for name in "abc"}
    interleave(providers, rounds=8, warmup=0)
    rounds = ["".join(calls[i : i + 3]) for i in range(3, len(calls), 3)]  # the first three calibrate
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds) and len(set(rounds)) > 1


def test_nothing_to_time_is_refused():
    with pytest.raises(ValueError, match="nothing to time"):
        interleave({})


def test_the_ceilings_of_this_machine_bound_a_copy_and_a_product():
    machine = measure_machine("cpu", torch.float32, rounds=3)
    assert machine.bandwidth > 1e8 and machine.flops > 1e8
    assert machine.bound(machine.bandwidth, 0) == pytest.approx(1) == machine.bound(0, machine.flops)
    assert machine.bound(machine.bandwidth, 3 * machine.flops) == pytest.approx(3)


def test_a_provider_that_fails_is_told_and_the_others_are_timed_to_the_end(work):
    calls, messages, rounds = [], [], []

    def breaks() -> None:
        calls.append(0)
        if len(calls) == 5:  # two calls that are not counted, then the third sample
            raise RuntimeError("worn out")
        work(0.006)

    providers = {"good": lambda: work(0.006), "breaks": breaks, "never": lambda: 1 / 0}
    how = {"rounds": 6, "warmup": 1}
    times = interleave(
        providers, **how, on_failure=lambda name, error: messages.append((name, str(error))), after_round=rounds.append
    )
    assert messages == [("never", "division by zero"), ("breaks", "worn out")]
    assert {name: len(timing.samples) for name, timing in times.items()} == {"good": 6, "breaks": 2}
    assert [len(so_far["good"].samples) for so_far in rounds] == [1, 2, 3, 4, 5, 6] and rounds[-1] == times
    with pytest.raises(ZeroDivisionError):
        interleave(providers, **how)
