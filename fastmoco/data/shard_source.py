"""Where shards are: tar archives below one root, on this machine's disks or behind a URL (`remote.py`).

Beside them there may be an index, and who has it reads no shard to open the set. `data pack` writes one, and `data scan
--index` does for shards of others:

    shards.json         name, bytes, stamp and SHA-256 of each shard, in their order
    index/NAME.npz      the images of one shard, as `pieces.py` keeps them
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from fastmoco import atomic
from fastmoco.data.errors import DataError

URL = re.compile(r"([a-z][a-z0-9+.-]+):/+(.*)", re.DOTALL)
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
ENDING, INDEX = ".tar", "shards.json"
VERSION = 1  # of the index


class Fetching(NamedTuple):
    """How remote shards are fetched."""

    cache_gb: float = 50.0
    """GB of a local disk that may hold shards, for all runs of this machine; 0 is none."""
    folder: Path | None = None
    """Where they are kept; None is `shards` in the user's cache folder."""
    patience: float = 300.0
    """Seconds that a server may fail before a run stops."""


class Shard(NamedTuple):
    """One tar archive of a source."""

    name: str
    """Relative to the source's root."""
    bytes: int
    stamp: str
    """Changes when the archive does: its time, or what a server says (ETag)."""
    digest: str = ""
    """SHA-256, where an index tells."""


class Source(Protocol):
    """Shards below one root."""

    root: str
    indexed: bool
    """Whether an index beside the shards lists them; known once `shards` was called."""

    def shards(self) -> list[Shard]:
        """All of them, sorted by name; raises DataError if they cannot be listed."""

    def small_file(self, name: str) -> bytes | None:
        """A small file below the root; None if there is none."""

    def read(self, name: str, offset: int, size: int) -> np.ndarray:
        """Bytes of a shard, uint8 [size]."""

    def local(self, shard: Shard) -> Any:
        """Context that yields the path of a local file with the shard's bytes."""


def as_url(path: str | os.PathLike) -> str | None:
    """The URL that `path` is, also where pathlib has made one slash of two; None for a place on this machine.

    Raises DataError if it holds credentials: what a run is given stands in its records.
    """
    match = URL.fullmatch(os.fspath(path))
    if not match:
        return None
    scheme, rest = match.groups()
    if "@" in rest.split("/", 1)[0] or "?" in rest:
        raise DataError(
            f"{scheme}://...: a URL with credentials or a query would be written into the run's records: leave them "
            f"out, and give them to the backend (environment, ~/.aws, ~/.netrc)",
            exit_code=2,
        )
    return f"{scheme}://{rest.lstrip('/')}"


def expanded(pattern: str) -> list[str]:
    """`pattern` with its first {000..123} counted out, and the ones after it too; itself where there is none."""
    match = RANGE.search(pattern)
    if not match:
        return [pattern]
    first, last = match.groups()
    if int(last) < int(first):
        raise DataError(f"{pattern}: counts down from {first} to {last}: give the smaller one first", exit_code=2)
    width = len(first) if len(first) == len(last) else 0
    numbers = (f"{number:0{width}d}" for number in range(int(first), int(last) + 1))
    begin, end = pattern[: match.start()], pattern[match.end() :]
    return [f"{begin}{number}{rest}" for number in numbers for rest in expanded(end)]


def piece_name(shard: str) -> str:
    """Where the images of a shard are listed, relative to the set's root."""
    return f"index/{shard}.npz"


def write_index(folder: Path, shards: Iterable[Shard]) -> None:
    """Write `folder`/shards.json."""
    atomic.write_json(folder / INDEX, {"version": VERSION, "shards": [list(shard) for shard in shards]})


def read_index(data: bytes, shown: str) -> list[Shard]:
    """The shards that an index names; raises DataError if it is damaged or of another version."""
    try:
        facts = json.loads(data)
        if facts["version"] != VERSION:
            raise ValueError(f"version {facts['version']}")
        return [Shard(str(name), int(size), str(stamp), str(digest)) for name, size, stamp, digest in facts["shards"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{shown} is no index of shards that can be read ({error}): make it again") from None


def indexed(folder: str) -> list[str]:
    """Names of the shards in a folder with an index; none where it has none."""
    path = Path(folder, INDEX)
    return [shard.name for shard in read_index(path.read_bytes(), str(path))] if path.is_file() else []


class LocalShards:
    """Tar archives on this machine's disks."""

    def __init__(self, root: str, names: Iterable[str]) -> None:
        self.root, self._names, self.indexed = root, sorted(names), False

    @classmethod
    def of(cls, root: str, archives: Iterable[str]) -> LocalShards:
        """Those at the paths `archives`."""
        return cls(root, (os.path.relpath(archive, root) for archive in archives))

    def shards(self) -> list[Shard]:
        """Name, size and time of each; what an index says where it is newer than the archives."""
        data = self.small_file(INDEX)
        rows = {} if data is None else {row.name: row for row in read_index(data, os.path.join(self.root, INDEX))}
        written = os.stat(os.path.join(self.root, INDEX)).st_mtime_ns if rows else 0
        shards = []
        for name in self._names:
            try:
                status = os.stat(os.path.join(self.root, name))
            except OSError as error:
                raise DataError(f"{os.path.join(self.root, name)}: {error.strerror}") from None
            row = rows.get(name)
            listed = row is not None and row.bytes == status.st_size and status.st_mtime_ns <= written
            shards.append(row if row is not None and listed else Shard(name, status.st_size, str(status.st_mtime_ns)))
            self.indexed |= listed
        return shards

    def small_file(self, name: str) -> bytes | None:
        """A small file below the root; None if there is none."""
        try:
            return Path(self.root, name).read_bytes()
        except FileNotFoundError:
            return None

    def read(self, name: str, offset: int, size: int) -> np.ndarray:
        """Bytes of a shard."""
        with open(os.path.join(self.root, name), "rb", buffering=0) as file:
            return np.frombuffer(os.pread(file.fileno(), size, offset), np.uint8)

    @contextmanager
    def local(self, shard: Shard) -> Iterator[str]:
        """The shard itself."""
        yield os.path.join(self.root, shard.name)
