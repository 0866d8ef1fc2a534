"""Which files a source has: a folder, a text list, or tar archives, as columns sorted by path."""

from __future__ import annotations

import os
import stat
import sys
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastmoco.data import tars
from fastmoco.data.errors import DataError
from fastmoco.data.image_table import natural

STRAY_SHARE = 20  # at most one of so many images may stand beside the class folders as a stray

Rejected = list[tuple[str, str]]
COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".rar", ".lz4")
NO_SOURCE = "neither a folder nor a tar nor a text file with one path a line"


@dataclass
class Files:
    """n files, before their headers are read. Columns, because there may be millions.

    The columns of numbers are arrays that grow, and NumPy arrays once they are sorted.
    """

    root: str
    """Folder that relative paths start from."""
    paths: list[str] = field(default_factory=list)
    """Path of each, or its name inside its archive."""
    bytes: Any = field(default_factory=lambda: array("q"))
    times: Any = field(default_factory=lambda: array("q"))
    """Time of the last change in ns, of the archive where it is in one."""
    labels: list[str | None] = field(default_factory=list)
    """Name of the class, where the source tells."""
    archives: list[str] = field(default_factory=list)
    """Full paths of the archives."""
    places: Any = field(default_factory=lambda: array("q"))
    """Two numbers for each file: archive and offset in it; empty where there is no archive."""
    passed: Counter[str] = field(default_factory=Counter)
    """How many were passed over: hidden ones, and of archives sidecars, by their ending."""

    def __len__(self) -> int:
        return len(self.paths)

    def add(self, path: str, status: os.stat_result, label: str | None) -> None:
        """Append a file of its own."""
        self.paths.append(path)
        self.bytes.append(status.st_size)
        self.times.append(status.st_mtime_ns)
        self.labels.append(label)

    def add_archive(self, path: str, rejected: Rejected) -> None:
        """Append what an archive holds, and to `rejected` what is left out; raises DataError if it is no sound tar."""
        members = tars.index(path)
        rejected += members.rejected
        self.passed += members.passed
        # Plain files before and after have no archive.
        self.places.extend([-1] * (2 * len(self.paths) - len(self.places)))
        number = len(self.archives)
        self.archives.append(path)
        self.paths += members.names
        self.bytes.extend(members.sizes.tolist())
        self.times.extend([members.time] * len(members.names))
        self.labels += members.labels
        self.places.extend(np.stack([np.full_like(members.offsets, number), members.offsets], 1).ravel().tolist())

    def sort(self) -> None:
        """Order by path, so that the same files give the same samples from a folder and from archives.

        Raises DataError if two archives hold the same name.
        """
        self.places = np.array(self.places, np.int64).reshape(-1, 2)
        self.bytes, self.times = np.array(self.bytes, np.int64), np.array(self.times, np.int64)
        if self.archives:
            missing = len(self.paths) - len(self.places)
            self.places = np.concatenate([self.places, np.full((missing, 2), -1)])
        order = sorted(range(len(self.paths)), key=self.paths.__getitem__)
        self.paths, self.labels = [self.paths[i] for i in order], [self.labels[i] for i in order]
        self.bytes, self.times = self.bytes[order], self.times[order]
        if self.archives:
            self.places = self.places[order]
            self._refuse_duplicates()

    def _refuse_duplicates(self) -> None:
        twice = next((i for i in range(1, len(self)) if self.paths[i] == self.paths[i - 1]), None)
        if twice is not None:
            where = [self.archives[number] if number >= 0 else self.root for number in self.places[twice - 1 :, 0][:2]]
            raise DataError(f"{self.paths[twice]} is there twice, in {where[0]} and in {where[1]}: remove one of them")


def find_files(source: str, label: str, rejected: Rejected) -> Files:
    """The files of `source`, an absolute path that messages call `label`; what is no file goes to `rejected`."""
    return with_members(*find_sources(source, label, rejected), rejected)


def find_sources(source: str, label: str, rejected: Rejected) -> tuple[Files, list[str]]:
    """Files of their own in `source`, and the paths of its archives, sorted, which are not looked into."""
    if os.path.isdir(source):
        files, archives = _walk(source, rejected)
    elif source.endswith(tars.ENDING) and os.path.isfile(source):
        files, archives = Files(os.path.dirname(source)), [source]
    elif os.path.isfile(source):
        files, archives = _from_list(source, rejected)
    else:
        raise DataError(f"{label}: no such folder, list of files or tar", exit_code=2)
    return files, sorted(archives)


def with_members(files: Files, archives: list[str], rejected: Rejected) -> Files:
    """`files` and what the archives hold, sorted by path; raises DataError if an archive is no sound tar."""
    for archive in archives:
        files.add_archive(archive, rejected)
    files.sort()
    return files


def _walk(root: str, rejected: Rejected) -> tuple[Files, list[str]]:
    files = Files(root)
    archives: list[str] = []
    visits: set[tuple[int, int]] = set()
    pending = [""]
    while pending:
        folder = pending.pop()
        full = os.path.join(root, folder)
        try:
            status = os.stat(full)
            entries = sorted(os.scandir(full), key=lambda entry: entry.name)
        except OSError as error:
            if not folder:
                raise DataError(f"{root}: cannot read the folder: {error.strerror}", exit_code=2) from None
            rejected.append((folder, f"unreadable folder: {error.strerror}"))
            continue
        if (status.st_dev, status.st_ino) in visits:
            rejected.append((folder, "folder already entered by another path"))
            continue
        visits.add((status.st_dev, status.st_ino))
        below = [f"{folder}/{entry.name}" if folder else entry.name for entry in entries]
        rejected += [
            (name, tars.BY_A_SYSTEM) for entry, name in zip(entries, below, strict=True) if entry.name in tars.LITTER
        ]
        hidden = {entry.name for entry in entries if entry.name[0] == "."}
        files.passed[tars.HIDDEN] += len(hidden)
        skip = tars.LITTER | hidden
        visible = [(entry, name) for entry, name in zip(entries, below, strict=True) if entry.name not in skip]
        pending += [name for entry, name in reversed(visible) if _is_folder(entry)]
        for entry, name in visible:
            if not _is_folder(entry):
                _add_entry(files, archives, entry, name, rejected)
    return files, archives


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _add_entry(files: Files, archives: list[str], entry: os.DirEntry, name: str, rejected: Rejected) -> None:
    try:
        status = entry.stat()
    except OSError:
        rejected.append((name, "broken link" if entry.is_symlink() else "unreadable"))
        return
    if not entry.is_file():  # a pipe would block whoever opens it
        rejected.append((name, "not a regular file"))
    elif name.endswith(tars.ENDING):
        archives.append(entry.path)
    else:
        files.add(name, status, sys.intern(name.split("/", 1)[0]) if "/" in name else None)


def _from_list(source: str, rejected: Rejected) -> tuple[Files, list[str]]:
    try:
        text = Path(source).read_bytes()
    except OSError as error:
        raise DataError(f"{source}: cannot read the list: {error.strerror}", exit_code=2) from None
    if b"\0" in text:
        how = "is compressed: unpack it to a plain tar" if source.endswith(COMPRESSED) else NO_SOURCE
        raise DataError(f"{source}: {how}", exit_code=2)
    lines = os.fsdecode(text.removeprefix(b"\xef\xbb\xbf")).split("\n")
    files, archives, missing = Files(os.path.dirname(source)), [], []
    classes: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        name, tab, label = line.rstrip("\r").partition("\t")
        if not line.strip():
            continue
        label = label.strip()
        if tab and (not label or classes.setdefault(name, label) != label):
            why = "no class after its tab" if not label else f"another class than before ({classes[name]})"
            raise DataError(f"{source}: line {number}, {name}: {why}")
        full = os.path.join(files.root, name)
        try:
            status = os.stat(full)
        except OSError as error:
            missing.append((name, f"unreadable: {error.strerror}"))
            continue
        if not stat.S_ISREG(status.st_mode):  # a pipe would block whoever opens it
            rejected.append((name, "not a regular file"))
        elif name.endswith(tars.ENDING):
            archives.append(full)
        else:
            files.add(name, status, sys.intern(label) if tab else None)
    if missing and not files.paths and not archives and (hint := _in_another_form(missing[0][0], files.root)):
        raise DataError(f"{source}: {hint}")
    rejected += missing
    return files, archives


def _in_another_form(line: str, root: str) -> str:
    """What to do with a list whose lines are "path class" or "path,class"; or ""."""
    for separator in (",", ";", " "):
        name, split, _ = line.rpartition(separator)
        if split and os.path.isfile(os.path.join(root, name)):
            return f"a class stands behind a tab, not behind {separator!r}: {name}<tab>CLASS"
    return ""


def without_strays(files: Files, good: np.ndarray, rejected: list[tuple[str, str]]) -> np.ndarray:
    """The images `good`, int64 [m], but for a few in no class beside many in classes; those are added to `rejected`."""
    # One picture beside class folders must not take all the others their classes.
    labels = [files.labels[i] for i in good.tolist()]
    strays = [i for i, label in zip(good.tolist(), labels, strict=True) if label is None]
    classes = len(set(labels) - {None})
    if not strays or classes < 2 or len(strays) > max(classes, len(good) // STRAY_SHARE):
        return good
    rejected += [(files.paths[i], "in no class, where the others are") for i in strays]
    return np.setdiff1d(good, strays)


def number_classes(
    labels: list[str | None], classes: Sequence[str] | None, source: str
) -> tuple[list[str], np.ndarray | None]:
    """Names of the classes, as given or sorted, and the number of each label, int64 [n]; none where a label is missing.

    Raises DataError if `classes` lacks one that `source` has.
    """
    known = [label for label in labels if label is not None]
    present = set(known)
    if len(known) < len(labels) or (classes is None and len(present) == 1):
        return [], None
    names = list(classes) if classes is not None else sorted(present, key=natural)
    unknown = sorted(present.difference(names))
    if unknown:
        raise DataError(f"{source}: class {unknown[0]!r} is not among the {len(names)} classes of the training part")
    number = {name: i for i, name in enumerate(names)}
    return names, np.array([number[label] for label in known], np.int64)
