"""Millions of images in files that all processes of a machine share: records of 32 bytes, and names.

A table is a folder of four files. `records` holds one RECORD for each image, shard by shard; `names` their names, each
ended by a zero byte; `shards.npz` what is known of each shard; `left_out.npz` what is no image. Opening it takes the
same time and memory whatever n is: rows are read where they are asked for, and the system keeps their pages for all
processes. They are read, not mapped: a page fault holds Python's lock until the disk has answered, a read does not.
"""

from __future__ import annotations

import hashlib
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np

from fastmoco import atomic
from fastmoco.data import cache
from fastmoco.data.errors import DataError

RECORD = np.dtype([("offset", "<i8"), ("name_end", "<i8"), ("bytes", "<u4"), ("label", "<i4"), ("size", "<i4", (2,))])
"""Where an image begins in its shard, where its name ends in `names`, its bytes, class, height and width."""
ROW = RECORD.itemsize
VERSION = 1
CHUNK = 1 << 16  # names that are read at once where all are wanted; rows that are kept at most
READ_BYTES = 1 << 24  # read at once at most


class Piece(NamedTuple):
    """What one shard holds, with names that end where `name_end` says, counted from the first one's beginning."""

    records: np.ndarray
    """RECORD [m], in the order of the shard; labels are indices of `classes`, -1 for none."""
    names: np.ndarray
    """uint8, each name ended by a zero."""
    classes: list[str]
    left_out: list[tuple[str, str]]
    """Name and reason of what cannot be used."""
    facts: Mapping[str, int]
    """Counts of its images and of what is none: "transparent", and others that a scan tells."""

    def digest(self) -> bytes:
        """SHA-256 of the images: names, places, sizes and classes."""
        whole = hashlib.sha256(self.records.tobytes())
        for part in (self.names.tobytes(), "\0".join(self.classes).encode(errors="surrogateescape")):
            whole.update(len(part).to_bytes(8, "little") + part)
        return whole.digest()


class Column:
    """One field of a table's images, as an array that is read where it is asked for: [n, ...]."""

    def __init__(self, length: int, width: tuple[int, ...], rows: Callable[[np.ndarray], np.ndarray]) -> None:
        self.shape, self._rows = (length, *width), rows

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, tuple):
            rows, column = key
            return self[rows][..., column]
        if isinstance(key, slice):
            return self._rows(np.arange(*key.indices(len(self))))
        asked = np.asarray(key)
        if asked.dtype == bool:
            asked = np.flatnonzero(asked)
        return self._rows(np.atleast_1d(asked))[0] if asked.ndim == 0 else self._rows(asked)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        whole = self[:]
        return whole if dtype is None else whole.astype(dtype)


class Names(Sequence[str]):
    """Names of a table's images, each made where it is asked for."""

    def __init__(self, table: ImageTable) -> None:
        self._table = table

    def __len__(self) -> int:
        return len(self._table)

    @overload
    def __getitem__(self, key: int) -> str: ...
    @overload
    def __getitem__(self, key: slice) -> list[str]: ...
    def __getitem__(self, key: int | slice) -> str | list[str]:
        if isinstance(key, slice):
            rows = range(len(self))[key]
            return self._table.names_from(rows.start, rows.stop) if rows.step == 1 else [self[i] for i in rows]
        return self._table.between(*self._table.name_bounds(range(len(self))[key]))[0]

    def __iter__(self) -> Iterator[str]:
        for first in range(0, len(self), CHUNK):  # a page at a time would be slow
            yield from self._table.names_from(first, min(first + CHUNK, len(self)))


class LeftOut(Sequence[tuple[str, str]]):
    """Name and reason of everything left out; read from the table's file when one is asked for."""

    def __init__(self, path: Path, count: int) -> None:
        self._path, self._count = path, count

    @cached_property
    def _all(self) -> list[tuple[str, str]]:
        data = cache.load(self._path)
        if data is None:
            raise DataError(f"{self._path} is missing or damaged: remove its folder, and it is made again")
        return list(zip(cache.unpack(data["names"]), cache.unpack(data["reasons"]), strict=True))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, key: Any) -> Any:
        return self._all[key]


class _LastRows(threading.local):
    """What each thread asked for last: the sizes of a step are wanted for one view after the other, and its places."""

    indices, rows = np.empty(0, np.int64), np.empty(0, RECORD)


class ImageTable:
    """A table that is there; DataError where its files are missing, cut short or of another version.

    `met` are the names of classes in the order in which they were met, `classes` those in use, sorted; none where some
    image has no class.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        data = cache.load(folder / "shards.npz")
        if data is None or int(data["version"]) != VERSION:
            raise DataError(f"{folder} is no table of images of this version: remove it, and it is made again")
        self.digest = data["digest"].tobytes().hex()
        self.shards, self.met = cache.unpack(data["shards"]), cache.unpack(data["classes"])
        self.starts, self.shard_bytes, self.piece_digests = data["starts"], data["shard_bytes"], data["piece_digests"]
        self.bytes, self.transparent, left_out, names, unlabelled = data["totals"].tolist()
        # A single class tells nothing and counts as none, as in any other source.
        self.classes = [] if unlabelled or len(self.met) < 2 else sorted(self.met, key=natural)
        number = {name: i for i, name in enumerate(self.classes)}
        self._numbers = np.array([number[name] for name in self.met] if number else [], np.int64)
        self.left_out = LeftOut(folder / "left_out.npz", left_out)
        self._count = int(self.starts[-1])
        self._last = _LastRows()
        self._records = self._opened("records", self._count * ROW)
        self._names = self._opened("names", names)

    def __len__(self) -> int:
        return self._count

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """RECORD [m] of images int64 [m]; IndexError where there are not so many, DataError where the disk fails."""
        if not len(indices):
            return np.empty(0, RECORD)
        first, last = int(indices.min()), int(indices.max()) + 1
        if first < 0 or last > len(self):
            raise IndexError(f"images {first} to {last - 1} of {len(self)}")
        if last - first == len(indices) and (np.diff(indices) == 1).all():
            return np.frombuffer(self._read(self._records, first * ROW, last * ROW), RECORD)
        last_asked = self._last
        if np.array_equal(last_asked.indices, indices):
            return last_asked.rows
        places = (indices * ROW).tolist()
        self._ask_for(places)
        try:
            content = b"".join(os.pread(self._records, ROW, place) for place in places)
        except OSError as error:
            raise self._failure(error.strerror) from None
        if len(content) < len(indices) * ROW:
            raise self._failure("a file was cut short")
        rows = np.frombuffer(content, RECORD)
        if len(rows) <= CHUNK:
            last_asked.indices, last_asked.rows = indices.copy(), rows
        return rows

    def _ask_for(self, places: list[int]) -> None:
        """Have the system begin to read all these rows, so that one wait is enough where they are not in memory."""
        with suppress(OSError):  # it is advice
            for place in places:
                os.posix_fadvise(self._records, place, ROW, os.POSIX_FADV_WILLNEED)

    def paths(self) -> Names:
        """Names of the images."""
        return Names(self)

    def sizes(self) -> Column:
        """Height and width, int32 [n, 2]."""
        return Column(len(self), (2,), lambda indices: np.ascontiguousarray(self.rows(indices)["size"], np.int32))

    def labels(self) -> Column | None:
        """Class of each image, int64 [n]; None where some image has none."""
        if not self.classes:
            return None
        return Column(len(self), (), lambda indices: self._numbers[self.rows(indices)["label"]])

    def places(self) -> Column:
        """Shard, offset in it and bytes, int64 [n, 3]."""
        return Column(len(self), (3,), self._places)

    def _places(self, indices: np.ndarray) -> np.ndarray:
        rows, shards = self.rows(indices), np.searchsorted(self.starts, indices, side="right") - 1
        return np.stack([shards, rows["offset"], rows["bytes"].astype(np.int64)], -1)

    def name_bounds(self, index: int) -> tuple[int, int]:
        """Where the name of an image begins and ends in `names`."""
        first = max(index - 1, 0)
        ends = self.rows(np.arange(first, index + 1))["name_end"].tolist()
        return (ends[0] if index else 0), ends[-1]

    def between(self, begin: int, end: int) -> list[str]:
        """Names that stand there."""
        return cache.unpack(np.frombuffer(self._read(self._names, begin, end), np.uint8))

    def names_from(self, first: int, last: int) -> list[str]:
        """Names of the images from `first` to before `last`."""
        return self.between(self.name_bounds(first)[0], self.name_bounds(last - 1)[1]) if first < last else []

    def _opened(self, name: str, size: int) -> int:
        try:
            handle = os.open(self.folder / name, os.O_RDONLY)
        except OSError as error:
            raise self._failure(f"{name}: {error.strerror}") from None
        weakref.finalize(self, os.close, handle)
        if os.fstat(handle).st_size != size:
            raise self._failure(f"{name} was cut short")
        return handle

    def _read(self, handle: int, begin: int, end: int) -> bytes:
        parts = []
        while begin < end:
            try:
                parts.append(os.pread(handle, min(READ_BYTES, end - begin), begin))
            except OSError as error:
                raise self._failure(error.strerror) from None
            if not parts[-1]:
                raise self._failure("a file was cut short")
            begin += len(parts[-1])
        return b"".join(parts)

    def _failure(self, why: str | None) -> DataError:
        return DataError(f"{self.folder} cannot be read ({why}): remove it, and it is made again")


def write(folder: Path, shards: Iterable[tuple[str, int, Piece]]) -> None:
    """Write the table of `shards` (name, bytes, images), whole or not at all; DataError where there is no image.

    Memory: one shard's images, and 100 bytes for each shard.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic.replacing(folder) as draft:
        draft.mkdir()
        written = _Written()
        with (draft / "records").open("wb") as records, (draft / "names").open("wb") as names:
            for name, size, piece in shards:
                written.add(name, size, piece)
                rows = piece.records.copy()
                rows["name_end"] += written.names - len(piece.names)
                rows["label"] = written.labels(piece)
                records.write(rows.data)
                names.write(piece.names.data)
        if not written.counts or not sum(written.counts):
            raise DataError("no images in the shards", exit_code=2)
        written.save(draft)
        atomic.remove(folder)  # a damaged one: a folder that is not empty cannot be replaced


class _Written:
    """What is known of the shards written so far."""

    def __init__(self) -> None:
        self.shards: list[str] = []
        self.counts: list[int] = []
        self.shard_bytes: list[int] = []
        self.digests: list[bytes] = []
        self.left_out: list[tuple[str, str]] = []
        self.codes: dict[str, int] = {}
        self.names = self.bytes = self.transparent = 0
        self.unlabelled = False

    def add(self, name: str, size: int, piece: Piece) -> None:
        self.shards.append(name)
        self.shard_bytes.append(size)
        self.counts.append(len(piece.records))
        self.digests.append(piece.digest())
        self.left_out += [(f"{name}/{member}", reason) for member, reason in piece.left_out]
        self.names += len(piece.names)
        self.bytes += int(piece.records["bytes"].sum())
        self.transparent += piece.facts.get("transparent", 0)

    def labels(self, piece: Piece) -> np.ndarray:
        """Classes numbered as they are met."""
        codes = [self.codes.setdefault(name, len(self.codes)) for name in piece.classes]
        labels = piece.records["label"]
        self.unlabelled |= bool((labels < 0).any())
        return np.array([*codes, -1], np.int32)[labels]

    def save(self, folder: Path) -> None:
        digests = np.frombuffer(b"".join(self.digests), np.uint8).reshape(-1, 32)
        cache.write(
            folder / "shards.npz",
            version=np.array(VERSION),
            digest=np.frombuffer(self._digest(), np.uint8),
            shards=cache.pack(self.shards),
            classes=cache.pack(self.codes),
            starts=np.concatenate([[0], np.cumsum(self.counts)]),
            shard_bytes=np.array(self.shard_bytes, np.int64),
            piece_digests=digests,
            totals=np.array([self.bytes, self.transparent, len(self.left_out), self.names, self.unlabelled], np.int64),
        )
        columns = [[row[i] for row in self.left_out] for i in (0, 1)]
        cache.write(folder / "left_out.npz", names=cache.pack(columns[0]), reasons=cache.pack(columns[1]))

    def _digest(self) -> bytes:
        whole = hashlib.sha256(str(VERSION).encode())
        for name, digest in zip(self.shards, self.digests, strict=True):
            whole.update(name.encode(errors="surrogateescape") + b"\0" + digest)
        return whole.digest()


def natural(name: str) -> tuple[bool, int, str]:
    """Key by which classes are numbered: numbers by their value, before words."""
    return (False, int(name), name) if name.isdecimal() else (True, 0, name)
