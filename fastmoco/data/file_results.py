"""What is known of each file of a source, kept in the user's cache folder for as long as size and time are the same."""

from __future__ import annotations

import hashlib
import os
from typing import NamedTuple

import numpy as np

from fastmoco.data import cache as kept
from fastmoco.data.files import Files
from fastmoco.data.probe import VERSION, Header


class CheckResult(NamedTuple):
    """What decoding an image came to."""

    reason: str
    """Why it cannot be decoded, or ""."""
    span: int
    """Levels, of 255, between its darkest and its brightest pixels."""


class Results:
    """What is known of each file: columns beside those of `Files`, kept for as long as size and time stay the same."""

    COLUMNS = ("sizes", "codes", "decoded", "alpha", "spans")

    def __init__(self, files: Files, source: str, max_pixels: int, cache: bool) -> None:
        self.files, self.cache, self.changed = files, cache, False
        key = f"{VERSION}\n{max_pixels}\n{source}"
        self.path = kept.folder() / f"manifest-{hashlib.sha256(os.fsencode(key)).hexdigest()[:24]}.npz"
        self.sizes = np.zeros((len(files), 2), np.int32)
        self.codes = np.full(len(files), -1, np.int32)  # number of the reason, 0 for a good one, -1 for unknown
        self.decoded = np.zeros(len(files), bool)
        self.alpha = np.zeros(len(files), bool)
        self.spans = np.zeros(len(files), np.uint8)
        self.reasons = [""]
        self._names = kept.pack(files.paths)
        self._states = np.stack([files.bytes, files.times, _offsets(files)], 1)
        data = kept.load(self.path) if cache else None
        if data is not None:
            self._look_up(data)

    def note_header(self, index: int, header: Header) -> None:
        """Take over what the header of a file tells."""
        self.sizes[index], self.alpha[index] = header[:2], header.alpha
        self._judge(index, header.reason)

    def note_decoded(self, index: int, checked: CheckResult) -> None:
        """Take over what decoding a file came to."""
        self.decoded[index], self.spans[index] = True, checked.span
        self.sizes[index] = (0, 0) if checked.reason else self.sizes[index]
        self._judge(index, checked.reason)

    def _judge(self, index: int, reason: str) -> None:
        if reason not in self.reasons:
            self.reasons.append(reason)
        self.codes[index] = self.reasons.index(reason)
        self.changed = True

    def store(self) -> None:
        """Keep everything, where there is anything new."""
        if self.cache and self.changed:
            kept.save(
                self.path,
                names=self._names,
                states=self._states,
                reasons=kept.pack(self.reasons),
                **{name: getattr(self, name) for name in self.COLUMNS},
            )

    def _look_up(self, data: dict[str, np.ndarray]) -> None:
        rows = np.arange(len(self.files))
        if not np.array_equal(data["names"], self._names):
            row = {name: i for i, name in enumerate(kept.unpack(data["names"]))}
            rows = np.array([row.get(name, -1) for name in self.files.paths], np.int64)
            self.changed = True
        fresh = rows >= 0
        fresh[fresh] = (data["states"][rows[fresh]] == self._states[fresh]).all(1)
        for name in self.COLUMNS:
            getattr(self, name)[fresh] = data[name][rows[fresh]]
        self.reasons = kept.unpack(data["reasons"])


def _offsets(files: Files) -> np.ndarray:
    return files.places[:, 1] if files.archives else np.zeros(len(files), np.int64)
