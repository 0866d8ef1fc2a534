"""The watchdog: ends what is stuck, with its stacks; leaves alone what moves."""

import signal
import time

import pytest

from fastmoco.process import watchdog
from fastmoco.process.stop import StopRequest
from fastmoco.process.watchdog import STUCK, Watchdog


def sleep_in_a_step() -> None:
    with Watchdog(0.2, StopRequest()) as dog:
        dog.beat()
        time.sleep(20)


def hold_the_lock() -> None:
    # A call that never gives the interpreter's lock back, as a broken extension may: sleep(20) through PyDLL.
    import ctypes

    watchdog.HELD_SECONDS = 0.3
    with Watchdog(0.2, StopRequest()) as dog:
        dog.beat()
        time.sleep(0.1)
        ctypes.PyDLL(None).sleep(20)


def test_a_stuck_process_ends_with_a_code_of_its_own_and_its_stacks(in_fork, tmp_path):
    began = time.monotonic()
    assert in_fork(sleep_in_a_step) == STUCK == 124
    output = (tmp_path / "said").read_text()
    assert time.monotonic() - began < 5 and "no progress" in output
    assert "sleep_in_a_step" in output and "Current thread" in output and output.count("Thread 0x") >= 1


def test_so_does_one_that_holds_the_interpreters_lock(in_fork, tmp_path):
    assert in_fork(hold_the_lock) == 1  # the interpreter's own last resort
    assert "hold_the_lock" in (tmp_path / "said").read_text()


def test_who_moves_is_left_alone_and_so_is_the_slow_first_step():
    exits = []
    with Watchdog(0.2, StopRequest(), exits.append) as dog:
        time.sleep(0.4)  # compiling
        for _ in range(6):
            dog.beat()
            time.sleep(0.1)
    assert not exits
    with Watchdog(0.2, StopRequest(), exits.append) as dog:
        dog.beat()
        time.sleep(0.5)
    assert exits == [STUCK]


@pytest.mark.parametrize(
    ("environment", "saving", "expected"),
    [({"TORCHELASTIC_RUN_ID": "x"}, True, [STUCK]), ({}, False, [STUCK]), ({}, True, [])],
)
def test_a_stop_request_shortens_the_wait(monkeypatch, environment, saving, expected):
    """For a step; the last state may take its time, unless torchrun is about to kill."""
    monkeypatch.setattr(watchdog, "STOP_SECONDS", 0.3)
    exits, calls = [], StopRequest()
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with Watchdog(2.0, calls, exits.append) as dog:
        dog.beat()
        dog.saving = saving
        calls.receive(signal.SIGTERM, None)
        time.sleep(0.8)
    assert exits == expected


def test_who_waits_for_others_is_more_patient(monkeypatch, tmp_path):
    """So that the stuck rank is the first to show its stacks, and to end."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    folder = tmp_path / "torch" / "distributed"
    folder.mkdir(parents=True)
    exits, source = [], "import time\ndef wait():\n    time.sleep(0.6)\n"
    for path, expected in ((folder / "waits.py", []), (tmp_path / "works.py", [STUCK])):
        space = {}
        exec(compile(source, str(path), "exec"), space)
        with Watchdog(0.2, StopRequest(), exits.append) as dog:
            dog.beat()
            space["wait"]()
        assert exits == expected


def test_no_watchdog():
    with Watchdog(0, StopRequest()) as dog:
        dog.beat()
        assert not dog._thread.is_alive()


def test_an_end_that_is_caught_leaves_no_timer_that_ends_the_process_later(monkeypatch):
    armed, exits = [], []
    monkeypatch.setattr(watchdog.faulthandler, "dump_traceback_later", lambda *_, **__: armed.append(True))
    monkeypatch.setattr(watchdog.faulthandler, "cancel_dump_traceback_later", armed.clear)
    monkeypatch.setattr(watchdog.faulthandler, "dump_traceback", lambda *_, **__: None)
    with Watchdog(0.05, StopRequest(), exits.append):
        time.sleep(1)
    assert exits == [watchdog.STUCK] and not armed
