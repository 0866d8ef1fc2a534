"""Processes that make the pieces of shards: reading a tar is Python code, of which a process runs one line at a time.

A child is started by its command, as for `full_scan.py`. To fork a process that has threads is not safe, and where
`multiprocessing` spawns one it runs the user's script again.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

from fastmoco.data import pieces
from fastmoco.data.errors import DataError

CHILD = [sys.executable, "-m", "fastmoco.data.piece_makers"]


class Task(NamedTuple):
    """A local tar, and where its piece is kept."""

    path: str
    shown: str
    """What messages call the tar."""
    max_pixels: int
    target: str
    stamp: str


class Makers:
    """Up to `count` children, which are started when they are wanted and end with the context; 0 is this process."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._children: list[subprocess.Popen] = []
        self._idle: SimpleQueue[subprocess.Popen | None] = SimpleQueue()
        for _ in range(count):
            self._idle.put(None)

    def make(self, task: Task) -> None:
        """Do a task, in a child that is free; threads may call it together.

        Raises DataError if the tar is not sound, if its piece cannot be kept, or if the child dies of it.
        """
        if not self.count:
            make(task)
            return
        child = self._idle.get() or self._started()
        try:
            reason = _reason(child, task)
        finally:
            self._idle.put(child if child.poll() is None else None)
        if reason:
            raise DataError(reason)

    def _started(self) -> subprocess.Popen:
        child = subprocess.Popen(CHILD, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._children.append(child)
        return child

    def __enter__(self) -> Makers:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        for child in self._children:
            if kind is not None:
                child.kill()
            child.communicate()  # closes its input, which ends it


def make(task: Task) -> None:
    """Do a task in this process."""
    piece = pieces.read(task.path, task.shown, task.max_pixels)
    try:
        pieces.save(Path(task.target), piece, task.stamp, task.max_pixels)
    except OSError as error:
        raise DataError(f"{task.target}: cannot be written: {error.strerror}") from None


def _reason(child: subprocess.Popen, task: Task) -> str:
    """What a child says against a task, or ""."""
    assert child.stdin is not None and child.stdout is not None
    try:
        child.stdin.write(json.dumps(task) + "\n")
        child.stdin.flush()
        answer = child.stdout.readline()
    except BrokenPipeError:
        answer = ""
    if answer:
        return json.loads(answer)
    code = child.wait()
    how = signal.Signals(-code).name if code < 0 else f"code {code}"
    return f"{task.shown}: the process that read it ended with {how}"


def main() -> None:
    """The child: a task in each line of its input, and what is to be said against it in each line of its output."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C is the parent's to report
    for line in sys.stdin:
        reason = ""
        try:
            make(Task(*json.loads(line)))
        except DataError as error:
            reason = str(error)
        print(json.dumps(reason), flush=True)


if __name__ == "__main__":
    main()
