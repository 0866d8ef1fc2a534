"""Bad samples of a run: found while it trains, named, replaced, and left out from then on.

A record says that from its step on a sample cannot be used. Its place is taken by the next sample in index order that
has no record of its own by then, whose pixels and boxes it shows; the photometric parameters stay those of the sample
that was asked for. So what a step sees is a pure function of the plan and the records: a run that is given the records
at its start, or resumes with them, is bit-equal to the one that made them, and no rank needs to tell another.
"""

from __future__ import annotations

import json
import os
from collections import deque
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastmoco.data.manifest import DataError, Manifest

NAME = "quarantine.jsonl"


class Record(NamedTuple):
    """One line of the file."""

    step: int
    """First step that does without the sample."""
    file: str
    """Name of the sample in the manifest."""
    reason: str
    """Why it cannot be used."""
    substitute: str
    """Name of the sample that took its place in that step."""


class Quarantine:
    """The bad samples of one manifest, kept in a file of one JSON line each, or in memory where `path` is None.

    Records that the file holds count from the start. `max_share` of the samples may be bad, and always one: DataError
    at the next. All ranks append to one file and count what the others wrote.
    """

    def __init__(self, manifest: Manifest, path: str | os.PathLike | None = None, max_share: float = 0.001) -> None:
        self.manifest, self.path = manifest, None if path is None else Path(path)
        self.max_share = max_share
        self.limit = max(1, int(max_share * len(manifest)))
        self.news: deque[Record] = deque()
        """Records made since someone last looked, oldest first; whoever reports them takes them out."""
        self._first_step: dict[int, int] = {}
        for record in self.records():
            index = manifest.find(record.file)
            if index is not None:
                self._note(index, record.step)

    def __len__(self) -> int:
        return len(self._first_step)

    def records(self) -> list[Record]:
        """What the file holds by now; raises DataError if it is damaged anywhere but at a line cut short at its end."""
        if self.path is None or not self.path.exists():
            return []
        lines = self.path.read_bytes().split(b"\n")
        try:
            return [Record(**json.loads(line)) for line in lines[:-1] if line.strip()]
        except (ValueError, TypeError) as error:
            raise DataError(f"{self.path} is damaged ({error}): repair or remove it") from None

    def replace(self, step: int, samples: np.ndarray) -> np.ndarray:
        """`samples` int64 [m] with every sample that is bad by `step` replaced by its substitute."""
        if not self._first_step:
            return samples
        bad = [i for i, sample in enumerate(samples.tolist()) if self._is_bad(sample, step)]
        result = samples.copy()
        for i in bad:
            result[i] = self._substitute(int(samples[i]), step)
        return result

    def add(self, step: int, sample: int, reason: str) -> int:
        """Note that `sample` is bad from `step` on, and return its substitute; raises DataError if too many are bad.

        One that is known from a later step on gets a second record: headers are read ahead of what is decoded.
        """
        is_known = self._is_bad(sample, step)
        self._note(sample, step)
        substitute = self._substitute(sample, step)
        record = Record(step, self.manifest.name(sample), reason, self.manifest.name(substitute))
        if not is_known and not self._is_written(record):
            self._append(record)
            self.news.append(record)
            self._check_share(record)
        return substitute

    def _is_bad(self, sample: int, step: int) -> bool:
        return self._first_step.get(sample, step + 1) <= step

    def _note(self, sample: int, step: int) -> None:
        self._first_step[sample] = min(step, self._first_step.get(sample, step))

    def _substitute(self, sample: int, step: int) -> int:
        count = len(self.manifest)
        following = ((sample + distance) % count for distance in range(1, count))
        good = next((candidate for candidate in following if not self._is_bad(candidate, step)), None)
        if good is None:
            raise DataError(f"{self.manifest.root}: all {count} images are bad: check the disk and the path")
        return good

    def _is_written(self, record: Record) -> bool:
        # By another rank, which found the sample in an earlier epoch.
        return any(other.file == record.file and other.step <= record.step for other in self.records())

    def _append(self, record: Record) -> None:
        if self.path is None:
            return
        # One write to a file opened for appending, so that lines of several ranks do not mix; and on the disk before
        # anything is trained on the substitute.
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            end = os.fstat(handle).st_size
            if end and os.pread(handle, 1, end - 1) != b"\n":  # a line that a crash cut short
                os.ftruncate(handle, end - len(self.path.read_bytes().rpartition(b"\n")[2]))
            os.write(handle, (json.dumps(record._asdict()) + "\n").encode())
            os.fsync(handle)
        finally:
            os.close(handle)

    def _check_share(self, last: Record) -> None:
        count = len({record.file for record in self.records()} if self.path else self._first_step)
        if count > self.limit:
            where = f"; all are listed in {self.path}" if self.path else ""
            raise DataError(
                f"{count} of {len(self.manifest)} images are bad, and max_bad_share {self.max_share:g} allows "
                f"{self.limit}; the last one is {last.file}: {last.reason}{where}: check the disk and the files "
                f"(fastmoco data scan --full finds all of them, and they are then left out), or let pretrain allow "
                f"more with --max-bad-share"
            )
