"""Ctrl-C: silent before and after a command, an exception while it works, and never where SIGINT is ignored."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

import pytest

HEAD = "import signal, sys, os\nfrom fastmoco.process import interrupt\n"
KILL = "os.kill(os.getpid(), signal.SIGINT)\nprint('still here')\n"
SILENT = "interrupt.end_silently()\n"
CAUGHT = "try:\n    with interrupt.as_exceptions():\n        os.kill(os.getpid(), signal.SIGINT)\n"
CAUGHT += "except KeyboardInterrupt:\n    print('raised')\n"


def end(code: str, first: signal.Handlers = signal.SIG_DFL) -> tuple[int, str, bool]:
    """Exit code, output, and whether a stack was shown."""
    process = subprocess.run(
        [sys.executable, "-c", HEAD + code],
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, first),
    )
    return process.returncode, process.stdout.strip(), "Traceback" in process.stderr


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (KILL, (-signal.SIGINT, "", True)),  # the control: Python's own way
        (SILENT + KILL, (-signal.SIGINT, "", False)),
        (SILENT + CAUGHT, (0, "raised", False)),
        (SILENT + CAUGHT + KILL, (-signal.SIGINT, "", False)),
        (CAUGHT + KILL, (-signal.SIGINT, "raised", True)),  # a library's caller keeps what it had
    ],
)
def test_when_it_ends_the_process_and_how(code: str, expected: tuple[int, str, bool]) -> None:
    code, output, spilled = end(code)
    # What was printed before is lost with the buffer where the signal ends the process.
    assert (code, spilled) == (expected[0], expected[2]) and (output == expected[1] or not spilled)


def test_ignored_it_stays_ignored() -> None:
    assert end(SILENT + KILL, signal.SIG_IGN) == (0, "still here", False)


def test_another_thread_changes_no_handler() -> None:
    from fastmoco.process import interrupt

    def work() -> None:
        with interrupt.as_exceptions():
            records.append(signal.getsignal(signal.SIGINT))

    before, records = signal.getsignal(signal.SIGINT), []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert records == [before]
