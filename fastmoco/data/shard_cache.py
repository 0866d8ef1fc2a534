"""Whole shards on a local disk, up to a number of bytes, shared by all processes of a machine.

A shard appears under its name when it is complete. A lock per shard lets one process fetch it while others wait; the
system drops a killed process's locks. The shards that nobody used for longest go first. A file that is removed while
another process reads it stays there for that process, and who then misses it fetches it again.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from fastmoco import atomic
from fastmoco.data.errors import DataError

PART, LOCK = ".part", ".lock"


class ShardCache:
    """Files of `folder`, of `limit` bytes together at most; raises DataError if a single one is larger."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit

    def read(self, key: str, size: int, offset: int, count: int) -> np.ndarray | None:
        """Bytes of a kept shard of `size` bytes, uint8 [count]; None if it is not there."""
        try:
            if os.stat(self.folder / key).st_size != size:
                return None
            return self.read_from(self.folder / key, offset, count)
        except FileNotFoundError:
            return None

    @staticmethod
    def read_from(path: Path, offset: int, count: int) -> np.ndarray:
        """Bytes of a file, uint8 [count]."""
        with open(path, "rb", buffering=0) as file:
            return np.frombuffer(os.pread(file.fileno(), count, offset), np.uint8)

    def get(self, key: str, size: int, fetch: Callable[[BinaryIO], None]) -> Path:
        """The file of a shard of `size` bytes; where it is not there, `fetch` writes it to the file it is given.

        Raises DataError if it does not fit, or comes with another size.
        """
        if size > self.limit:
            raise DataError(
                f"a shard of {size / 1e9:.3g} GB does not fit the cache of {self.limit / 1e9:.3g} GB: give a larger "
                f"--cache-gb",
                exit_code=2,
            )
        path, part = self.folder / key, self.folder / (key + PART)
        if not self._is_whole(path, size):
            self.folder.mkdir(parents=True, exist_ok=True)
            with _locked(self.folder / (key + LOCK)):
                if not self._is_whole(path, size):
                    self._make_room(size, key)
                    with part.open("r+b") as file:
                        fetch(file)
                        if file.tell() != size:
                            raise DataError(f"{path}: {file.tell()} of {size} bytes came")
                    atomic.sync(part)  # it has had its length all along, and a machine that stops might leave no more
                    os.replace(part, path)
        with contextlib.suppress(FileNotFoundError):  # another process needed the room: who reads it fetches it again
            os.utime(path)
        return path

    @contextmanager
    def held(self, key: str, size: int, fetch: Callable[[BinaryIO], None]) -> Iterator[Path]:
        """The file that `get` gives; it is not removed while the context lasts."""
        while True:
            path = self.get(key, size, fetch)
            with _locked(self.folder / (key + LOCK), fcntl.LOCK_SH):
                if self._is_whole(path, size):
                    yield path
                    return

    def used(self) -> int:
        """Bytes that are taken."""
        return sum(size for _, size, _ in self._files())

    @staticmethod
    def _is_whole(path: Path, size: int) -> bool:
        return path.is_file() and path.stat().st_size == size

    def _files(self) -> list[tuple[float, int, str]]:
        """Time of the last use, bytes and name of each file that takes room."""
        entries = []
        with contextlib.suppress(FileNotFoundError):
            for entry in os.scandir(self.folder):
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat()
                    if not entry.name.endswith(LOCK):
                        entries.append((status.st_mtime, status.st_size, entry.name))
        return sorted(entries)

    def _make_room(self, size: int, key: str) -> None:
        # Under one lock, and with the room taken at once: a part has its shard's length before it has its bytes. So two
        # runs that come together do not use the same room.
        with _locked(self.folder / LOCK):
            files = self._files()
            total = sum(each for _, each, _ in files)
            for _, each, name in files:
                if total + size <= self.limit and not name.endswith(PART):
                    continue
                if name != key + PART and self._is_held(name):
                    continue
                (self.folder / name).unlink(missing_ok=True)
                total -= each
            with (self.folder / (key + PART)).open("wb") as file:
                file.truncate(size)

    def _is_held(self, name: str) -> bool:
        # By who fetches it, or reads all of it. A part without a holder is what a killed process has left.
        try:
            with _locked(self.folder / (name.removesuffix(PART) + LOCK), fcntl.LOCK_EX | fcntl.LOCK_NB):
                return False
        except BlockingIOError:
            return True


@contextmanager
def _locked(path: Path, how: int = fcntl.LOCK_EX) -> Iterator[None]:
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(handle, how)
        yield
    finally:
        os.close(handle)
