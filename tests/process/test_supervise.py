"""Whom the launcher blames, and how it says so."""

import json
import signal
import socket
import tempfile
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from fastmoco.options import is_restart
from fastmoco.process import supervise
from fastmoco.process.watchdog import STUCK


def failure(code: int, message: str = "", timestamp: int = 0) -> ProcessFailure:
    """As torchrun records it: with what the process left in its error file, or without."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "error.json")
        if message:
            path.write_text(json.dumps({"message": {"message": message, "extraInfo": {"timestamp": timestamp}}}))
        process_failure = ProcessFailure(local_rank=0, pid=7, exitcode=code, error_file=str(path))
    process_failure.timestamp = timestamp
    return process_failure


LOST = failure(1, "RuntimeError: Connection closed by peer\nand more", 5)


@pytest.mark.parametrize(
    ("other", "culprits", "code", "message"),
    [
        (failure(-signal.SIGKILL, timestamp=9), 1, 1, "was killed by SIGKILL: perhaps the machine ran out of memory"),
        (failure(-signal.SIGSEGV, timestamp=9), 1, 1, "was killed by SIGSEGV"),
        (failure(-signal.SIGSTOP, timestamp=9), 1, STUCK, "was stopped (SIGSTOP) while the others waited for it"),
        (failure(STUCK, timestamp=9), 1, STUCK, "made no progress for too long: its stacks are above"),
        (failure(1, "ValueError: first", 4), 1, 1, "failed: ValueError: first"),
        (failure(1, "ValueError: later", 6), 0, 1, "failed: RuntimeError: Connection closed by peer"),
        (failure(3, timestamp=9), 1, 3, "failed: exit code 3, told above or by the first rank"),
        (failure(-signal.SIGTERM, timestamp=1), 0, 1, "failed: RuntimeError: Connection closed by peer"),
    ],
)
def test_the_cause_is_told_from_its_consequences(
    other: ProcessFailure, culprits: int, code: int, message: str, capsys: pytest.CaptureFixture
) -> None:
    both = {0: LOST, 1: other}
    assert supervise.first(both) == culprits and supervise.report(both) == code
    line = capsys.readouterr().err
    assert line.startswith(f"fastmoco: error: rank {culprits} (process 7 on ") and line.count("\n") == 1
    assert message in line and line.endswith(f"; then rank {1 - culprits} failed too\n")


def test_one_rank_alone() -> None:
    assert supervise.summary({3: LOST}).endswith("failed: RuntimeError: Connection closed by peer")


@pytest.mark.parametrize(
    ("stopped", "code", "message"),
    [
        ({}, 1, "the launchers of the other machines have ended or cannot be reached (The store has failed): read"),
        ({77: 5}, STUCK, f"rank 5 (process 77 on {socket.gethostname()}) was stopped (SIGSTOP)"),
    ],
)
def test_a_machine_that_is_left_alone(stopped: dict, code: int, message: str, capsys: pytest.CaptureFixture) -> None:
    assert supervise.report_parting(RuntimeError("The store has failed. See inner exception."), stopped) == code
    line = capsys.readouterr().err
    assert line.startswith(f"fastmoco: error: {message}") and line.count("\n") == 1


def test_a_process_in_the_place_of_another_knows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the failed rank was another machine's, which torchrun does not count here."""
    monkeypatch.setenv("FASTMOCO_LAUNCH", str(tmp_path))
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert not is_restart() and not is_restart()
    monkeypatch.setattr("os.getpid", lambda: -1)
    assert is_restart() and is_restart()
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert not is_restart()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert is_restart()
