"""Stop requests: the first is noted, an echo is none, the second ends the process; ranks agree."""

import multiprocessing
import os
import signal
import time

import pytest

from fastmoco.parallel import Parallel
from fastmoco.train import preempt
from fastmoco.train.preempt import SIGNALS, StopRequest, Vote, stop_on_signal


def ask_twice(pause: float) -> None:
    with stop_on_signal():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(pause)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)
        os._exit(7)


@pytest.mark.parametrize(("pause", "code"), [(0.1, 7), (0.7, 130)])
def test_a_second_signal_ends_the_process_and_an_echo_does_not(pause, code):
    """A terminal and a launcher both pass on one Ctrl-C: that is one request."""
    process = multiprocessing.get_context("fork").Process(target=ask_twice, args=(pause,))
    process.start()
    process.join(20)
    assert process.exitcode == code


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
