"""Stop requests: the first is noted, an echo is none, the second ends the process; ranks agree."""

import os
import signal
import time

import pytest

from fastmoco.contrast.step import Step
from fastmoco.data.loader import Loader
from fastmoco.options import Options, Pretrain
from fastmoco.parallel import Parallel
from fastmoco.train import checkpoint, loop, preempt
from fastmoco.train.loop import Run
from fastmoco.train.monitor import Monitor, read_lines
from fastmoco.train.saver import Saver
from fastmoco.train.preempt import SIGNALS, StopRequest, Vote, stop_on_signal


FIRST, LAST = "in the kNN before the first step", "in the kNN after the last step"
SITUATIONS = {  # where the signal comes, at which visit, and the step after which the run must have stopped
    FIRST: (Run, "_stop_between", 1, 0),
    "while the first batch is awaited": (Loader, "__next__", 1, 1),
    "in the first step": (Step, "step", 1, 1),
    "in a later step": (Step, "step", 3, 3),
    "while a line is logged": (Monitor, "interval", 1, 4),
    "while a copy is made": (Saver, "_copy", 1, 5),
    "while the thread writes": (checkpoint, "_write", 1, None),
    "in a kNN between two steps": (Run, "_stop_between", 3, 5),
    LAST: (Run, "_stop_between", 5, 6),
}


def ask(place: object, name: str, visit: int, number: int) -> list[tuple[float, float]]:
    """Send this process a signal at a visit of place.name; the list then holds both clocks. For forked processes."""
    original, visits, times = getattr(place, name), [], []

    def asking(*arguments, **keywords):
        visits.append(name)
        if len(visits) == visit:
            times.append((time.monotonic(), time.process_time()))
            os.kill(os.getpid(), number)
            time.sleep(0.1)
        return original(*arguments, **keywords)

    setattr(place, name, asking)
    return times


def run_until_asked(parallel: Parallel, recipe, images, out, situation: str, number: int, ranks: tuple[int, ...]):
    """Exit code of a run, and the processor seconds between signal and exit, in a process made for it."""
    loop.Parallel.start = lambda _: parallel
    place, name, visit, _ = SITUATIONS[situation]
    times = ask(place, name, visit, number) if parallel.rank in ranks else []
    options = Options(data=images, out=out, device="cpu", threads=1, knn_every=1, log_every=4, save_every=4,
                      stop_after=6, save_minutes=0)  # fmt: skip
    code = loop.run(Pretrain("custom", recipe, options))
    wall, processor = times[0] if times else (time.monotonic(), time.process_time())
    # On a crowded machine the wall clock tells of the others; a wait that should not be shows in it all the same.
    assert time.monotonic() - wall < 30
    return code, time.process_time() - processor


QUICK = {FIRST, "in the first step", "while the thread writes"}


@pytest.mark.parametrize(
    "situation", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SITUATIONS]
)
def test_a_signal_is_honoured_within_a_step_wherever_it_comes(situation, run_ranks, recipe, images, tmp_path):
    number = SIGNALS[list(SITUATIONS).index(situation) % 3]
    [(code, seconds)] = run_ranks(1, run_until_asked, recipe, images, tmp_path / "run", situation, number, (0,))
    assert code == 143 and seconds < 3
    stopped_after(tmp_path / "run", SITUATIONS[situation][3])


@pytest.mark.parametrize("ranks", [(1,), *(pytest.param(ranks, marks=pytest.mark.slow) for ranks in ((0,), (0, 1)))])
def test_a_signal_to_any_rank_stops_all_at_one_step(ranks, run_ranks, recipe, images, tmp_path):
    arguments = (recipe, images, tmp_path / "run", "in a later step", signal.SIGUSR1, ranks)
    codes, seconds = zip(*run_ranks(2, run_until_asked, *arguments), strict=True)
    assert codes == (143, 143) and max(seconds) < 3
    stopped_after(tmp_path / "run", 3)


def stopped_after(out, step: int | None) -> None:
    newest = checkpoint.latest(out)
    assert newest is None if step == 0 else newest is not None
    if step:
        assert newest.name == f"step_{step:08d}"
        assert read_lines(out / "log.jsonl")[-1]["step"] == step
    assert not (out / "summary.json").exists() and not list(out.rglob("*.writing"))


def never_ending_step(recipe, images, out) -> None:
    def stuck(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.6)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)

    Step.step = stuck
    loop.run(Pretrain("custom", recipe, Options(data=images, out=out, device="cpu", threads=1, knn=False)))


def test_a_second_signal_ends_a_run_that_is_stuck(in_fork, recipe, images, tmp_path):
    began = time.monotonic()
    assert in_fork(never_ending_step, recipe, images, tmp_path / "run") == 143 and time.monotonic() - began < 10
    assert checkpoint.latest(tmp_path / "run") is None


def ask_twice(pause: float) -> None:
    with stop_on_signal():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(pause)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)
        os._exit(7)


@pytest.mark.parametrize(("pause", "code"), [(0.1, 7), (0.7, 130)])
def test_a_second_signal_ends_the_process_and_an_echo_does_not(pause, code, in_fork):
    """A terminal and a launcher both pass on one Ctrl-C: that is one request."""
    assert in_fork(ask_twice, pause) == code


@pytest.mark.parametrize("number", SIGNALS)
def test_each_signal_is_a_request_and_the_handlers_are_put_back(number):
    before = signal.getsignal(number)
    with stop_on_signal() as asked:
        assert not asked
        signal.raise_signal(number)
        assert asked and asked.signal == number
    assert signal.getsignal(number) is before


def vote(parallel: Parallel) -> list[list[bool]]:
    ballot = Vote(parallel)
    return [ballot.cast(parallel.rank == 1 and step == 2, False) for step in range(4)]


def test_one_ranks_wish_counts_for_all_at_one_step(run_ranks):
    expected = [[False, False], [False, False], [True, False], [False, False]]
    assert run_ranks(2, vote) == [expected, expected]


def test_an_echo_is_measured_from_the_first(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(preempt.time, "monotonic", lambda: now[0])
    ended = []
    monkeypatch.setattr(preempt.os, "_exit", ended.append)
    asked = StopRequest()
    for moment, expected in ((100.0, []), (100.4, []), (100.6, [143])):
        now[0] = moment
        asked.receive(signal.SIGTERM, None)
        assert ended == expected
