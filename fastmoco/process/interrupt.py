"""Signals before there is anything to tidy up, and after: Ctrl-C ends the process without a word.

Python would raise KeyboardInterrupt somewhere inside the imports, which take seconds, or while the interpreter leaves,
and show a stack of other people's code. Only while a command works is the exception of use.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT)
"""Signals that ask a run to stop. The launcher passes on all of them: of those that torchrun does not handle, it would
die and leave its workers."""
LEFT_IGNORED = (signal.SIGHUP, signal.SIGQUIT)
"""Signals that stay ignored where whoever started the process has them ignored: nohup does, to outlive a terminal."""
UNSAVED = 1
"""Exit code where SIGTERM ended a process before it had saved: a shell would show 143, the code for saved."""


def not_ignored(signals: Iterable[int]) -> list[int]:
    """Those of `signals` that this process shall answer: not what nohup has it ignore."""
    return [n for n in signals if n not in LEFT_IGNORED or signal.getsignal(n) is not signal.SIG_IGN]


def _end_unsaved(number: int, frame: FrameType | None) -> None:
    os.write(2, b"fastmoco: ended by SIGTERM, nothing was saved\n")
    os._exit(UNSAVED)


def end_silently() -> None:
    """Let SIGINT end this process as the system does, from here on; where it is ignored it stays so. For programs.

    SIGTERM ends it with code UNSAVED until work that can save takes the signal over.
    """
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _end_unsaved)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def as_exceptions() -> Iterator[None]:
    """While the block lasts SIGINT raises KeyboardInterrupt, where `end_silently` was in force."""
    silent = signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    if not silent or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
