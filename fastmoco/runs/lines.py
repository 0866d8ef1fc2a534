"""JSONL files of a run: one line for each logging interval (log.jsonl) and for each kNN evaluation (knn.jsonl)."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastmoco import atomic
from fastmoco.process import crash_points

LOG, KNN = "log.jsonl", "knn.jsonl"


class Lines:
    """A JSONL file to append to, each line on disk at once.

    A disk that refuses costs a warning, not the run: what it did not take is written before the next line.
    """

    def __init__(self, path: Path, report: Callable[[str], None]) -> None:
        self._path, self._report = path, report
        self._file = path.open("ab", buffering=0)
        self._rest = b""
        self._refused = False

    def append(self, line: Mapping[str, Any]) -> None:
        """Write one line, after those that are still to be written."""
        self._rest += (json.dumps(line) + "\n").encode()
        if crash_points.about_to_crash("half a log line"):
            self._file.write(self._rest[: len(self._rest) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        self._write()

    def close(self) -> None:
        """Try once more to write what is left, and close the file."""
        self._write()
        self._file.close()

    def _write(self) -> None:
        try:
            while self._rest:
                self._rest = self._rest[self._file.write(self._rest) :]
        except OSError as error:
            if not self._refused:
                self._report(f"warning: {self._path} takes no more lines ({error.strerror}); they are kept meanwhile")
        self._refused = bool(self._rest)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines of a JSONL file; a last line that was cut off by a kill is left out, and so is a missing file."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def truncate(path: Path, step: int) -> None:
    """Drop the lines after `step` and a last line that was cut off, so that a resumed log has no line twice."""
    if path.exists():
        lines = [line for line in read_lines(path) if line["step"] <= step]
        atomic.write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
