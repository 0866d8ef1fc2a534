"""Ctrl-C before there is anything to tidy up, and after: the process ends without a word.

Python would raise KeyboardInterrupt somewhere inside the imports, which take seconds, or while the interpreter leaves,
and show a stack of other people's code. Only while a command works is the exception of use.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


def end_silently() -> None:
    """Let SIGINT end this process as the system does, from here on; where it is ignored it stays so. For programs."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def raised() -> Iterator[None]:
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
