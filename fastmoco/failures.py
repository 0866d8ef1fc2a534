"""A job of several processes by torchrun, and what ended it: one line that names the rank and the cause."""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fastmoco.train.watchdog import STUCK

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure


def torchrun(argv: Sequence[str]) -> int:
    """Do as the command line `argv` of torchrun says; the exit code of the rank to blame, 143 after a signal, or 0."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser, run

    try:
        with tempfile.TemporaryDirectory() as folder:
            # Ranks that restart must know it, and must not read where the dead ones listened.
            os.environ |= {"FASTMOCO_LAUNCH": folder, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
            run(get_args_parser().parse_args(list(argv)))
    except SignalException:
        return 143
    except ChildFailedError as error:
        return report(error.failures)
    return 0


def report(failures: Mapping[int, ProcessFailure]) -> int:
    """Print `summary` and return the exit code of the job: that of the rank to blame, 1 where a signal killed it."""
    print(f"fastmoco: error: {summary(failures)}", file=sys.stderr, flush=True)
    return max(1, failures[first(failures)].exitcode)


def first(failures: Mapping[int, ProcessFailure]) -> int:
    """The rank to blame: one that a signal killed, else a stuck one, one with a message to the user, any other.

    The others fail because of it, often within the same second: their collectives do, or torchrun sends SIGTERM.
    """
    return min(failures, key=lambda rank: (_innocence(failures[rank].exitcode), failures[rank].timestamp))


def _innocence(code: int) -> int:
    if code == -signal.SIGTERM:
        return 4
    return 0 if code < 0 else 1 if code == STUCK else 2 if code > 1 else 3


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
    # A dict where the process left an exception, else a text that torchrun made up.
    left = failure.error_file_data.get("message")
    said = str(left.get("message", "")).split("\n")[0] if isinstance(left, dict) else ""
    return f"failed: {said or f'exit code {failure.exitcode}, told above or by the first rank'}"
