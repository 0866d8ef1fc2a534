"""Signals to one process and to two ranks, in a terminal, under nohup, in a script: a table, and it holds.

What must agree: the exit code is 143 if and only if a checkpoint was written.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastmoco.process import interrupt
from fastmoco.process.stop import STOPPED, not_ignored, note_saved, unsaved_code
from fastmoco.process.supervise import _after_signal, first, summary
from fastmoco.runs import checkpoint
from fastmoco.runs.lines import read_lines

ROOT = Path(__file__).parents[2]
SMALL = (
    "--width 0.125 --batch-size 32 --bn-group 8 --queue-size 100 --crop-size 16 --no-knn --device cpu --epochs 5000 "
    "--log-every 2 --save-minutes 0"
)
ALL = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT)
# Where a job is started, which signals it then finds ignored, and which ones it is sent. nohup ignores SIGHUP alone; a
# script's `nohup ... &` ignores the signals of a keyboard, too.
STARTS = {
    "a terminal": ((), ALL),
    "nohup": ((signal.SIGHUP,), (signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM)),
    "nohup in a script": ((signal.SIGHUP, signal.SIGQUIT, signal.SIGINT), (signal.SIGQUIT, signal.SIGTERM)),
}


def outcome(folder: Path, images: Path, number: int, ranks: int, ignored: tuple[int, ...]) -> tuple[int | None, bool]:
    """Exit code of a job that was sent a signal, None where it goes on, and whether it saved."""
    out = folder / "run"
    command = [sys.executable, ROOT / "launch.py", "--nproc", str(ranks), "pretrain", "demo", *SMALL.split()]

    def as_nohup_does() -> None:
        for each in (signal.SIGHUP, signal.SIGQUIT, signal.SIGINT):
            signal.signal(each, signal.SIG_IGN if each in ignored else signal.SIG_DFL)

    process = subprocess.Popen(
        [*command, "--data", images, "--out", out],
        stdout=subprocess.DEVNULL,
        stderr=(folder / "stderr").open("wb"),
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=as_nohup_does,
    )
    try:
        while not read_lines(out / "log.jsonl"):
            assert process.poll() is None, (folder / "stderr").read_text()
            time.sleep(0.1)
        process.send_signal(number)
        if number in ignored:
            lines = len(read_lines(out / "log.jsonl"))
            while len(read_lines(out / "log.jsonl")) < lines + 3:
                assert process.poll() is None
                time.sleep(0.1)
            return None, checkpoint.latest(out) is not None
        return process.wait(120), checkpoint.latest(out) is not None
    finally:
        process.terminate()
        process.wait(120)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_exit_codes_and_checkpoints_agree(images, tmp_path):
    rows = []
    for ranks in (1, 2):
        for where, (ignored, sent) in STARTS.items():
            for number in sent:
                folder = tmp_path / f"{ranks} {where} {number.name}"
                folder.mkdir()
                code, saved = outcome(folder, images, number, ranks, ignored)
                rows.append((number.name, ranks, where, code, saved))
    print("\n| signal | processes | started in | exit code | saved |\n|---|---:|---|---|---|")
    for name, ranks, where, code, saved in rows:
        told = "goes on" if code is None else code
        print(f"| {name} | {ranks} | {where} | {told} | {'yes' if saved else 'no'} |")
    for name, _, where, code, saved in rows:
        ignored = getattr(signal, name) in STARTS[where][0]
        assert (code, saved) == ((None, False) if ignored else (STOPPED, True)), (name, where)


def test_what_nohup_ignores_stays_ignored():
    before = {number: signal.getsignal(number) for number in interrupt.SIGNALS}
    try:
        for number in interrupt.SIGNALS:  # whatever these tests were started under
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        assert signal.SIGHUP not in not_ignored(interrupt.SIGNALS) and signal.SIGTERM in not_ignored(interrupt.SIGNALS)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        assert not_ignored(interrupt.SIGNALS) == list(interrupt.SIGNALS)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_no_signal_that_ends_a_process_unsaved_gives_the_code_for_saved(monkeypatch, tmp_path):
    assert all(unsaved_code(number) != STOPPED for number in interrupt.SIGNALS)
    assert unsaved_code(signal.SIGINT) == 130
    assert _after_signal(signal.SIGTERM, saved=False) == 1 and _after_signal(signal.SIGHUP, saved=False) == 129
    assert _after_signal(signal.SIGHUP, saved=True) == STOPPED
    monkeypatch.setenv("FASTMOCO_LAUNCH", str(tmp_path))
    note_saved()
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_sigterm_during_the_imports_is_not_the_code_for_saved(tmp_path):
    code = "from fastmoco.process import interrupt; interrupt.end_silently(); import os; os.kill(os.getpid(), 15)"
    assert subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL).returncode == 1
    # The control: Python's own answer, which a shell shows as 143.
    plain = subprocess.run([sys.executable, "-c", code.replace("interrupt.end_silently(); ", "")])
    assert plain.returncode == -signal.SIGTERM


def test_a_rank_that_nccl_ended_is_no_culprit():
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    aborted = ProcessFailure(1, 12, -signal.SIGABRT, "")
    for code in (124, 3):
        failures = {0: ProcessFailure(0, 11, code, ""), 1: aborted}
        assert first(failures) == 0 and summary(failures).startswith("rank 0 (process 11")
    assert "gave up waiting" in summary({1: aborted})
    segfault = {0: ProcessFailure(0, 11, 124, ""), 1: ProcessFailure(1, 12, -signal.SIGSEGV, "")}
    assert first(segfault) == 1  # the control


def test_a_stop_request_is_noticed_inside_a_long_operation():
    """Python runs handlers between steps of the main thread; the time of the request is known at once."""
    code = (
        "import hashlib, os, signal, threading\n"
        "from fastmoco.process.stop import stop_on_signal\n"
        "from fastmoco.process.watchdog import Watchdog\n"
        "from fastmoco.process import watchdog\n"
        "watchdog.STOP_SECONDS = 0.5\n"
        "with stop_on_signal() as asked, Watchdog(600, asked) as dog:\n"
        "    dog.beat()\n"
        "    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()\n"
        "    hashlib.pbkdf2_hmac('sha256', b'x', b'y', 100_000_000)\n"
    )
    began = time.monotonic()
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 124 and "no progress" in result.stderr, result.stderr
    assert time.monotonic() - began < 30  # the operation takes a minute
