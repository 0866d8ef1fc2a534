"""A job of several processes by torchrun, and what ended it: one line that names the rank and the cause."""

from __future__ import annotations

import atexit
import gc
import math
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastmoco.process.stop import SAVED_MARK, STOPPED, unsaved_code
from fastmoco.process.watchdog import STUCK

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure


def torchrun(argv: Sequence[str], patience: float) -> int:
    """Do as the command line `argv` of torchrun says; the exit code of the rank to blame, or 0.

    After a signal it is 143 if the job has saved.

    A rank that is stopped (SIGSTOP) is killed after `patience` seconds, or when another rank fails.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import get_args_parser, run

    atexit.register(gc.freeze)  # as in cli.py
    saved = False
    try:
        with tempfile.TemporaryDirectory() as folder, _stopped_ranks(patience or math.inf) as stops:
            # Ranks that restart must know it, and must not read where the dead ones listened.
            os.environ |= {"FASTMOCO_LAUNCH": folder, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
            try:
                run(get_args_parser().parse_args(list(argv)))
            finally:
                saved = Path(folder, SAVED_MARK).exists()
    except SignalException as error:
        return _after_signal(error.sigval, saved)
    except ChildFailedError as error:
        for failure in error.failures.values():
            failure.exitcode = -signal.SIGSTOP if failure.pid in stops else failure.exitcode
        return report(error.failures)
    except RendezvousError as error:
        return report_parting(error, stops)
    return 0


def _after_signal(number: int, saved: bool) -> int:
    if saved:
        return STOPPED
    print(f"fastmoco: ended by {signal.Signals(number).name} before all ranks had saved", file=sys.stderr, flush=True)
    return unsaved_code(number)


@contextmanager
def _stopped_ranks(patience: float) -> Iterator[dict[int, int]]:
    # torchrun takes a stopped process for a working one; it takes no SIGTERM, and only 30 s later would be killed.
    from torch.distributed.elastic.multiprocessing.api import PContext

    stops: dict[int, int] = {}
    since: dict[int, float] = {}
    wait, close = PContext.wait, PContext.close

    def kill(pid: int) -> None:
        stops[pid] = _rank_of(pid)
        os.kill(pid, signal.SIGKILL)

    def look_and_wait(self: PContext, *args: Any, **kwargs: Any) -> object:
        now = time.monotonic()
        for pid in self.pids().values():
            if not _is_stopped(pid):
                since.pop(pid, None)
            elif now - since.setdefault(pid, now) > patience:
                kill(pid)
        return wait(self, *args, **kwargs)

    def close_all(self: PContext, *args: Any, **kwargs: Any) -> None:
        for pid in filter(_is_stopped, self.pids().values()):
            kill(pid)
        close(self, *args, **kwargs)

    PContext.wait, PContext.close = look_and_wait, close_all  # type: ignore[method-assign,assignment]
    try:
        yield stops
    finally:
        PContext.wait, PContext.close = wait, close  # type: ignore[method-assign]


def _is_stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


def _rank_of(pid: int) -> int:
    names = dict(each.partition("=")[::2] for each in Path(f"/proc/{pid}/environ").read_text().split("\0"))
    return int(names["RANK"])


def report_parting(error: Exception, stops: Mapping[int, int]) -> int:
    """Print why a job over machines ended here although no rank of this one failed, and return its exit code.

    `stops`: ranks of this machine, by process, that were found stopped.
    """
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    if stops:
        return report({rank: ProcessFailure(0, pid, -signal.SIGSTOP, "") for pid, rank in stops.items()})
    reason = str(error).split(". ")[0]
    print(
        f"fastmoco: error: the launchers of the other machines have ended or cannot be reached ({reason}): read their "
        "last lines, and check --rdzv-endpoint",
        file=sys.stderr,
        flush=True,
    )
    return 1


def report(failures: Mapping[int, ProcessFailure]) -> int:
    """Print `summary` and return the exit code of the job.

    That of the rank to blame; 1 where a signal killed it, STUCK where one stopped it (exit code -SIGSTOP here).
    """
    print(f"fastmoco: error: {summary(failures)}", file=sys.stderr, flush=True)
    code = failures[first(failures)].exitcode
    return STUCK if code == -signal.SIGSTOP else max(1, code)


def first(failures: Mapping[int, ProcessFailure]) -> int:
    """The rank to blame: one that a signal killed, else a stuck one, one with a message to the user, any other.

    The others fail because of it, often within the same second: their collectives do, or torchrun sends SIGTERM.
    """
    return min(failures, key=lambda rank: (_innocence(failures[rank].exitcode), failures[rank].timestamp))


def _innocence(code: int) -> float:
    if code == -signal.SIGTERM:
        return 4
    if code == -signal.SIGABRT:  # NCCL's watchdog ends the ranks that wait for another one
        return 2.5
    return 0 if code < 0 else 1 if code == STUCK else 2 if code > 1 else 3


def summary(failures: Mapping[int, ProcessFailure]) -> str:
    """One line on why a job ended, from torchrun's record of the failed processes of this machine, by rank."""
    rank = first(failures)
    others = sorted(set(failures) - {rank})
    after = f"; then rank{'s' if len(others) > 1 else ''} {', '.join(map(str, others))} failed too" if others else ""
    return f"rank {rank} (process {failures[rank].pid} on {socket.gethostname()}) {cause(failures[rank])}{after}"


def cause(failure: ProcessFailure) -> str:
    """How a process ended, in words."""
    if failure.exitcode == -signal.SIGSTOP:
        return "was stopped (SIGSTOP) while the others waited for it, and was killed"
    if failure.exitcode == -signal.SIGABRT:
        return "gave up waiting for another rank (SIGABRT, as NCCL's watchdog does), or a library aborted it"
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        hint = ": perhaps the machine ran out of memory, which its kernel log tells" if name == "SIGKILL" else ""
        return f"was killed by {name}{hint}"
    if failure.exitcode == STUCK:
        return "made no progress for too long: its stacks are above"
    # A dict where the process left an exception, else a text that torchrun made up.
    data = failure.error_file_data.get("message")
    reason = str(data.get("message", "")).split("\n")[0] if isinstance(data, dict) else ""
    return f"failed: {reason or f'exit code {failure.exitcode}, told above or by the first rank'}"
