"""Whom the launcher blames, and how it says so."""

import signal
from types import SimpleNamespace

import pytest

from fastmoco import failures
from fastmoco.train.watchdog import STUCK


def failure(code: int, message: str = "", timestamp: int = 0) -> SimpleNamespace:
    """As torchrun records it; without a message of the process torchrun makes one up."""
    data = {"message": message} if message else {}
    return SimpleNamespace(exitcode=code, pid=7, message=message or "made up", error_file_data=data, timestamp=timestamp)


LOST = failure(1, "RuntimeError: Connection closed by peer\nand more", 5)


@pytest.mark.parametrize(
    ("other", "blamed", "code", "said"),
    [
        (failure(-signal.SIGKILL, timestamp=9), 1, 1, "was killed by SIGKILL: perhaps the machine ran out of memory"),
        (failure(-signal.SIGSEGV, timestamp=9), 1, 1, "was killed by SIGSEGV"),
        (failure(STUCK, timestamp=9), 1, STUCK, "made no progress for too long: its stacks are above"),
        (failure(1, "ValueError: first", 4), 1, 1, "failed: ValueError: first"),
        (failure(1, "ValueError: later", 6), 0, 1, "failed: RuntimeError: Connection closed by peer"),
        (failure(3, timestamp=4), 1, 3, "failed: exit code 3, as it says above"),
        (failure(-signal.SIGTERM, timestamp=1), 1, 1, "was killed by SIGTERM"),
    ],
)  # fmt: skip
def test_the_cause_is_told_from_its_consequences(
    other: SimpleNamespace, blamed: int, code: int, said: str, capsys: pytest.CaptureFixture
) -> None:
    both = {0: LOST, 1: other}
    assert failures.first(both) == blamed and failures.report(both) == code
    line = capsys.readouterr().err
    assert line.startswith(f"fastmoco: error: rank {blamed} (process 7 on ") and line.count("\n") == 1
    assert said in line and line.endswith(f"; then rank {1 - blamed} failed too\n")


def test_one_rank_alone() -> None:
    assert failures.summary({3: LOST}).endswith("failed: RuntimeError: Connection closed by peer")
