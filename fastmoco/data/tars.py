"""Tar archives with random access: an index of the members, made when an archive is first used and then kept.

The layout is WebDataset's (https://github.com/webdataset/webdataset): an image is a member, its class stands in the
member KEY.cls of the same archive, where KEY is the image's name up to the first dot, or is the first folder of its
name; KEY.output.cls beside KEY.input.jpg will do. The name of a member inside its archive is its path. Links are
followed inside the archive. Archives that were joined by `cat` are read to the end of the last one. Members with other
sidecar endings, and hidden ones, are passed over and counted; every other member that is no image is named.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tarfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastmoco.data import cache
from fastmoco.data.errors import DataError

ENDING = ".tar"
READ_BYTES = 1 << 20
# Folders that systems leave beside images: thumbnails, waste baskets.
BY_A_SYSTEM = "left by a system beside the images"
LITTER = {"@eaDir", "__MACOSX", "#recycle", "@Recycle", "@__thumb", "$RECYCLE.BIN", "lost+found", "#snapshot"}
SIDECARS = {"cls", "json", "txt", "id", "index", "__key__"}
HIDDEN = "hidden"
REPLACED = "replaced by a later member of the same name"
VERSION = 3  # raise it when `index` changes what it finds


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
    rejected: list[tuple[str, str]]
    """Name and reason of each member that is neither an image nor says something about one."""
    passed: Counter[str]
    """How many members were passed over, by their ending, or HIDDEN."""


def index(path: str) -> Members:
    """Members of an archive, from the cache if size and time are as noted there. Raises DataError if it is no tar."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise DataError(f"{path}: cannot read the archive: {error.strerror}") from None
    cache_file = _cache_path(path)
    state = np.array([VERSION, status.st_size, status.st_mtime_ns], np.int64)
    cached = _from_cache(cache_file, state)
    if cached is not None:
        return cached
    members = _read(path, status)
    _keep(cache_file, state, members)
    return members


def contents(path: str) -> Members:
    """Members of an archive, read now and not kept. Raises DataError if it is no tar."""
    return _read(path, os.stat(path))


class _Contents:
    """What is found in an archive, member by member; of two with the same name the later one counts, as for tar."""

    def __init__(self) -> None:
        self.places: dict[str, tuple[int, int]] = {}
        self.links: dict[str, str] = {}
        self.classes: dict[str, dict[str, str]] = {}
        self.rejected: list[tuple[str, str]] = []
        self.passed: Counter[str] = Counter()

    def add(self, member: tarfile.TarInfo, archive: tarfile.TarFile) -> None:
        """Take a member over."""
        name = member.name.removeprefix("./")
        if member.isdir():
            return
        parts = name.split("/")
        if any(part.startswith(".") and part not in (".", "..") for part in parts):
            self.passed[HIDDEN] += 1
            return
        if not parts[-1]:
            self.rejected.append((name, "a member without a name"))
            return
        if any(part in LITTER for part in parts):
            self.rejected.append((name, BY_A_SYSTEM))
            return
        if name in self.places or name in self.links:
            self.places.pop(name, None)
            self.links.pop(name, None)
            self.rejected.append((name, REPLACED))
        key, ending = _key(name)
        last = ending.rpartition(".")[2]
        if member.issym() or member.islnk():
            folder = os.path.dirname(name) if member.issym() else ""
            self.links[name] = os.path.normpath(os.path.join(folder, member.linkname))
        elif not member.isfile() or member.sparse is not None:
            self.rejected.append((name, "not a regular file" if not member.isfile() else "stored sparsely"))
        elif last == "cls":
            file = archive.extractfile(member)
            assert file is not None, "a regular file"
            text = file.read().decode(errors="surrogateescape").strip()
            if ending in self.classes.setdefault(key, {}):
                self.rejected.append((name, REPLACED))
            self.classes[key][ending] = sys.intern(text)
            if not text:
                self.rejected.append((name, "an empty class"))
        elif last in SIDECARS:
            self.passed[f".{last}"] += 1
        else:
            self.places[name] = member.offset_data, member.size

    def follow_links(self) -> None:
        """Give each link the place of what it leads to."""
        for name, target in self.links.items():
            for _ in range(len(self.links)):
                target = self.links.get(target, target)
            place = self.places.get(target)
            last = _key(name)[1].rpartition(".")[2]
            if last in SIDECARS:
                self.passed[f".{last}"] += 1
                continue
            if place is None:
                self.rejected.append((name, f"link to {target}, which the archive does not hold"))
            else:
                self.places[name] = place

    def count_idle_classes(self) -> None:
        """Name the classes of no image."""
        keys = {_key(name)[0] for name in self.places}
        for key, classes in self.classes.items():
            if key not in keys:
                self.rejected += [
                    (f"{key}.{ending}", "the class of no image") for ending, text in classes.items() if text
                ]

    def label(self, name: str, path: str) -> str | None:
        """The class of an image; raises DataError if members of its key give it several."""
        classes = self.classes.get(_key(name)[0], {})
        if len(set(classes.values())) > 1 and "cls" not in classes:
            raise DataError(f"{path}: {_key(name)[0]} has several classes ({', '.join(sorted(classes))}): leave one")
        choice = classes.get("cls") or next(iter(classes.values()), None)
        folder = name.split("/", 1)[0] if "/" in name else ""
        return choice or (sys.intern(folder) if folder not in ("", "..") else None)


def _read(path: str, status: os.stat_result) -> Members:
    contents = _Contents()
    at: int | None = 0
    try:
        with open(path, "rb") as file:
            while at is not None:
                file.seek(at)
                with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as archive:
                    for member in archive:
                        archive.members.clear()  # type: ignore[attr-defined]  # it would keep a kilobyte for each
                        contents.add(member, archive)
                    end = archive.offset
                _check_end(path, end, status.st_size)
                at = _next_archive(path, end, status.st_size, contents)
    except DataError:
        raise
    except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError) as error:  # the last two: a size beyond all
        raise DataError(f"{path}: {_reason(path, error)}") from None
    contents.follow_links()
    contents.count_idle_classes()
    names = list(contents.places)
    offsets, sizes = (np.array([place[i] for place in contents.places.values()], np.int64) for i in (0, 1))
    labels = [contents.label(name, path) for name in names]
    return Members(names, offsets, sizes, labels, status.st_mtime_ns, contents.rejected, contents.passed)


def _next_archive(path: str, end: int, size: int, contents: _Contents) -> int | None:
    """Where the archive begins that was appended to the one that ends at `end`, or None."""
    with open(path, "rb") as file:
        file.seek(end)
        while block := file.read(READ_BYTES):
            text = len(block.lstrip(b"\0"))
            if text:
                at = file.tell() - text
                at -= at % tarfile.BLOCKSIZE
                file.seek(at)
                try:
                    tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
                    return at
                except tarfile.HeaderError:
                    contents.rejected.append(
                        (os.path.basename(path), f"{size - at} bytes after its end are no archive")
                    )
                    return None
    return None


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


def _from_cache(path: Path, state: np.ndarray) -> Members | None:
    data = cache.load(path)
    if data is None or not np.array_equal(data.get("state", ()), state):
        return None
    names, classes = cache.unpack(data["names"]), cache.unpack(data["classes"])
    labels = [classes[code] if code >= 0 else None for code in data["labels"].tolist()]
    rejected = list(zip(*(cache.unpack(data[each]) for each in ("left_names", "left_reasons")), strict=True))
    if not len(names) == len(labels) == len(data["offsets"]) == len(data["sizes"]):
        return None
    passed = Counter(dict(zip(cache.unpack(data["passed"]), data["passed_counts"].tolist(), strict=True)))
    return Members(names, data["offsets"], data["sizes"], labels, int(state[2]), rejected, passed)


def _keep(path: Path, state: np.ndarray, members: Members) -> None:
    classes = sorted({label for label in members.labels if label is not None})
    number = {name: code for code, name in enumerate(classes)}
    cache.save(
        path,
        state=state,
        names=cache.pack(members.names),
        classes=cache.pack(classes),
        labels=np.array([-1 if label is None else number[label] for label in members.labels], np.int32),
        offsets=members.offsets,
        sizes=members.sizes,
        left_names=cache.pack(name for name, _ in members.rejected),
        left_reasons=cache.pack(reason for _, reason in members.rejected),
        passed=cache.pack(members.passed),
        passed_counts=np.array([*members.passed.values()], np.int64),
    )
