"""What ended a job of several processes: one line that names the rank and the cause."""

from __future__ import annotations

import signal
import socket
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from fastmoco.train.watchdog import STUCK

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure


def report(failures: Mapping[int, ProcessFailure]) -> int:
    """Print `summary` and return the exit code of the job: that of the rank to blame, 1 where a signal killed it."""
    print(f"fastmoco: error: {summary(failures)}", file=sys.stderr, flush=True)
    return max(1, failures[first(failures)].exitcode)


def first(failures: Mapping[int, ProcessFailure]) -> int:
    """The rank to blame: one that a signal killed, else one that was stuck, else the first that failed.

    The others fail because of it, often within the same second.
    """

    def order(rank: int) -> tuple[int, int]:
        failure = failures[rank]
        killed = failure.exitcode < 0 and -failure.exitcode != signal.SIGTERM
        return (0 if killed else 1 if failure.exitcode == STUCK else 2, failure.timestamp)

    return min(failures, key=order)


def summary(failures: Mapping[int, ProcessFailure]) -> str:
    """One line on why a job ended, from torchrun's record of the failed processes of this machine, by rank."""
    rank = first(failures)
    others = sorted(set(failures) - {rank})
    after = f"; then rank{'s' if len(others) > 1 else ''} {', '.join(map(str, others))} failed too" if others else ""
    return f"rank {rank} (process {failures[rank].pid} on {socket.gethostname()}) {cause(failures[rank])}{after}"


def cause(failure: ProcessFailure) -> str:
    """How a process ended, in words."""
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        hint = ": perhaps the machine ran out of memory, which its kernel log tells" if name == "SIGKILL" else ""
        return f"was killed by {name}{hint}"
    if failure.exitcode == STUCK:
        return "made no progress for too long: its stacks are above"
    said = failure.message if failure.error_file_data.get("message") else ""
    what = said.strip().splitlines()[0] if said.strip() else f"exit code {failure.exitcode}, as it says above"
    return f"failed: {what}"
