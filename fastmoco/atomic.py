"""Files and folders that appear whole or not at all, whatever ends the process or the machine meanwhile."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MARK = ".writing-"
READ_BYTES = 1 << 22


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the name of a draft; whatever the block writes there takes the place of `path` when the block ends.

    The draft stands in the same folder, ends like `path`, and is a file or a folder. It is synced before it is renamed,
    and the folder is synced after. If the block raises, the draft is removed and `path` is as it was. Raises OSError if
    the disk refuses.
    """
    draft = path.with_name(f"{MARK}{os.getpid()}-{path.name}")
    remove(draft)
    try:
        yield draft
        for each in [*draft.rglob("*"), draft]:
            sync(each)
        os.replace(draft, path)
    except BaseException:
        remove(draft)
        raise
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replace a UTF-8 text file; bytes of a file's name that are none become \\udcNN."""
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, data: Any) -> None:
    """Replace a JSON file."""
    write_text(path, json.dumps(data, indent=2) + "\n")


def sync(path: Path) -> None:
    """Return once the disk has a file's bytes or a folder's names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """SHA-256 of a file of any size, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def remove(path: Path) -> None:
    """Remove a file or a whole folder; nothing if there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
