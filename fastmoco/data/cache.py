"""Arrays kept in the user's cache folder, never beside the data. Whatever is wrong with them, they count as absent."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from fastmoco import atomic


def folder() -> Path:
    """Where the cache is: XDG_CACHE_HOME/fastmoco, or ~/.cache/fastmoco."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(home, "fastmoco")


def load(path: Path | BinaryIO) -> dict[str, np.ndarray] | None:
    """The arrays of a file, or None if it is missing or damaged."""
    try:
        with np.load(path, allow_pickle=False) as data:
            return {name: data[name] for name in data.files}
    except Exception:  # damage comes out of zip, zlib and numpy as errors of many kinds
        return None


def save(path: Path, **arrays: np.ndarray) -> None:
    """Replace a file of the cache; a folder that cannot be written to costs only the next scan's time."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, **arrays)


def write(path: Path, **arrays: np.ndarray) -> None:
    """Replace a file, whole or not at all; raises OSError if that fails."""
    with atomic.replacing(path) as draft, draft.open("wb") as file:  # NumPy adds .npz to a name
        np.savez(file, **arrays)  # type: ignore[arg-type]


def pack(names: Iterable[str]) -> np.ndarray:
    """Names without zero bytes as uint8, each one ended by a zero."""
    return np.frombuffer(os.fsencode("".join(f"{name}\0" for name in names)), np.uint8)


def unpack(names: np.ndarray) -> list[str]:
    """What `pack` was given."""
    return os.fsdecode(names.tobytes()).split("\0")[:-1]


def printable(name: str) -> str:
    """A file's name for people: bytes that are no UTF-8 as \\xNN, a dollar sign such that no formula begins."""
    return os.fsencode(name).decode("utf-8", "backslashreplace").replace("$", "\\$")
