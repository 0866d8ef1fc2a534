"""Tar archives with random access: an index of the members, made when an archive is first used and then kept.

The layout is WebDataset's (https://github.com/webdataset/webdataset): an image is a member, its class stands in the
member KEY.cls of the same archive, where KEY is the image's name up to the first dot, or is the first folder of its
name. Members with other sidecar endings are passed over. The name of a member inside its archive is its path.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastmoco.data import cache
from fastmoco.data.errors import DataError

ENDING = ".tar"
SIDECARS = {"cls", "json", "txt", "id", "index", "__key__"}
VERSION = 1  # raise it when `index` changes what it finds


class Members(NamedTuple):
    """The images of one archive, in its order."""

    names: list[str]
    offsets: np.ndarray
    """int64 [n]: where in the archive each begins."""
    sizes: np.ndarray
    """int64 [n]: bytes of each."""
    labels: list[str | None]
    time: int
    """Time of the archive's last change in ns."""


def index(path: str) -> Members:
    """Members of an archive, from the cache where size and time are still those; DataError where it is no sound tar."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise DataError(f"{path}: cannot read the archive: {error.strerror}") from None
    kept = _cache_path(path)
    state = np.array([VERSION, status.st_size, status.st_mtime_ns], np.int64)
    known = _kept(kept, state)
    if known is not None:
        return known
    members = _read(path, status)
    _keep(kept, state, members)
    return members


def _read(path: str, status: os.stat_result) -> Members:
    names, offsets, sizes, classes = [], [], [], {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                archive.members.clear()  # it would keep a kilobyte for each
                name = member.name.removeprefix("./")
                ending = _key(name)[1]
                if not member.isfile() or os.path.basename(name).startswith("."):
                    continue
                if ending == "cls":
                    classes[_key(name)[0]] = sys.intern(archive.extractfile(member).read().decode().strip())
                elif ending not in SIDECARS:
                    names.append(name)
                    offsets.append(member.offset_data)
                    sizes.append(member.size)
            end = archive.offset
    except (tarfile.TarError, OSError, UnicodeDecodeError, EOFError) as error:
        raise DataError(f"{path}: {_reason(path, error)}") from None
    _check_end(path, end, status.st_size)
    labels = [
        classes.get(_key(name)[0]) or (sys.intern(name.split("/", 1)[0]) if "/" in name else None) for name in names
    ]
    return Members(names, np.array(offsets, np.int64), np.array(sizes, np.int64), labels, status.st_mtime_ns)


def _key(name: str) -> tuple[str, str]:
    folder, slash, base = name.rpartition("/")
    stem, _, ending = base.partition(".")
    return folder + slash + stem, ending.lower()


def _reason(path: str, error: Exception) -> str:
    with open(path, "rb") as file:
        head = file.read(6)
    if head[:2] == b"\x1f\x8b" or head[:4] == b"\x28\xb5\x2f\xfd" or head[:3] == b"BZh" or head == b"\xfd7zXZ\0":
        return "is compressed, which allows no random access: unpack it to a plain tar"
    if "unexpected end" in str(error):
        return "is cut short: copy it again"
    return f"is no tar that can be read ({error}): make it again"


def _check_end(path: str, end: int, size: int) -> None:
    # tarfile takes a header that is cut or damaged for the end; a whole archive has a block of zeros there.
    with open(path, "rb") as file:
        file.seek(end)
        block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise DataError(f"{path}: is cut short after {size} bytes: copy it again")
    if any(block):
        raise DataError(f"{path}: is damaged at byte {end}: make it again")


def _cache_path(path: str) -> Path:
    return cache.folder() / f"tar-{hashlib.sha256(os.fsencode(path)).hexdigest()[:24]}.npz"


def _kept(path: Path, state: np.ndarray) -> Members | None:
    found = cache.load(path)
    if found is None or not np.array_equal(found.get("state"), state):
        return None
    names, classes = cache.unpacked(found["names"]), cache.unpacked(found["classes"])
    labels = [classes[code] if code >= 0 else None for code in found["labels"].tolist()]
    if not len(names) == len(labels) == len(found["offsets"]) == len(found["sizes"]):
        return None
    return Members(names, found["offsets"], found["sizes"], labels, int(state[2]))


def _keep(path: Path, state: np.ndarray, members: Members) -> None:
    classes = sorted(set(members.labels) - {None})
    number = {name: code for code, name in enumerate(classes)}
    cache.save(
        path,
        state=state,
        names=cache.packed(members.names),
        classes=cache.packed(classes),
        labels=np.array([number.get(label, -1) for label in members.labels], np.int32),
        offsets=members.offsets,
        sizes=members.sizes,
    )
