"""The manifest: which images there are, how large they are, and why the other files were left out.

A source is a folder with one sub-folder per class, a folder of images at any depth, or a text file with one path a
line. Sizes come from the headers and are cached under the user's cache folder, never beside the data.
"""

from __future__ import annotations

import bisect
import hashlib
import io
import os
import struct
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "JPEG2000", "PPM")  # Pillow's names of what DALI decodes
MAX_PIXELS = 100_000_000  # 300 MB once decoded
TRAIN_NAMES, VAL_NAMES = ("train",), ("val", "valid", "validation", "test")
HEAD_BYTES = 16 * 1024  # one read that holds nearly every header
CHUNK_FILES = 256  # files per task of the header threads
CACHE_VERSION = 1  # raise it when `probe` changes its mind about any file


class DataError(ValueError):
    """The data cannot be used: 3 where it is bad, 2 where the wrong thing was asked for (`exit_code`)."""

    def __init__(self, message: str, exit_code: int = 3) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass
class Manifest:
    """The images of one source, sorted by path; the index of an image is its name everywhere else."""

    root: str
    """Folder that relative paths start from."""
    paths: list[str]
    """Path of each image, relative to the root or absolute."""
    sizes: np.ndarray
    """int32 [n, 2]: height and width as stored, EXIF orientation ignored."""
    labels: np.ndarray | None = None
    """int64 [n]: class of each image, or None where the source tells of no classes."""
    classes: list[str] = field(default_factory=list)
    """Names of the classes."""
    rejected: list[tuple[str, str]] = field(default_factory=list)
    """Path and reason of everything left out."""

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, index: int) -> str:
        """Full path of an image, for messages and for other readers."""
        return os.path.join(self.root, self.paths[index])

    def find(self, path: str) -> int | None:
        """Index of the image with that entry in `paths`, or None."""
        index = bisect.bisect_left(self.paths, path)
        return index if index < len(self.paths) and self.paths[index] == path else None

    def read(self, index: int) -> np.ndarray:
        """The encoded bytes of an image, uint8 [size]; OSError where the file cannot be read."""
        with open(self.path(index), "rb", buffering=0) as file:
            return np.frombuffer(file.read(), np.uint8)


class Found(NamedTuple):
    """A file of a source, before its header is read."""

    path: str
    bytes: int
    mtime_ns: int
    label: str | None


Probe = tuple[int, int, str]  # height, width and reason


def split(path: str | os.PathLike) -> tuple[str, str | None]:
    """Training part and validation part (or None) of a folder that has `train/` and perhaps `val/` or `test/`."""
    folder = Path(path)
    train = next((folder / name for name in TRAIN_NAMES if (folder / name).is_dir()), None)
    if train is None:
        return str(path), None
    return str(train), next((str(folder / name) for name in VAL_NAMES if (folder / name).is_dir()), None)


def scan(
    path: str | os.PathLike,
    *,
    classes: Sequence[str] | None = None,
    max_pixels: int = MAX_PIXELS,
    threads: int | None = None,
    cache: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Manifest of a folder or a text list; DataError where nothing in it can be used.

    In a folder of sub-folders only, the first level names the classes (as torchvision's ImageFolder has it); a single
    class tells nothing and counts as none. A line of a list is a path, relative to the list, or path, tab, class.
    Hidden files and folders are passed over. `classes` fixes the numbering, so that a validation part agrees with its
    training part. `progress(done, all)` is called as headers are read; files that the cache knows are not opened.
    """
    source = os.path.abspath(os.fspath(path))
    rejected: list[tuple[str, str]] = []
    if os.path.isdir(source):
        root, found = source, _walk(source, rejected)
    elif os.path.isfile(source):
        root, found = os.path.dirname(source), _listed(source, rejected)
    else:
        raise DataError(f"{path}: no such folder or list of files", exit_code=2)
    found.sort()
    probed = _probe_all(root, found, Cache(source, max_pixels) if cache else None, max_pixels, threads, progress)
    rejected += [(file.path, reason) for file, (_, _, reason) in zip(found, probed, strict=True) if reason]
    good = [i for i, (_, _, reason) in enumerate(probed) if not reason]
    if not good:
        because = f"; {rejected[0][0]}: {rejected[0][1]}" if rejected else ""
        raise DataError(f"{path}: no images in it ({len(rejected)} files left out{because})", exit_code=2)
    sizes = np.array([probed[i][:2] for i in good], np.int32)
    names, labels = _number([found[i].label for i in good], classes, str(path))
    return Manifest(root, [found[i].path for i in good], sizes, labels, names, sorted(rejected))


def probe(path: str, max_pixels: int = MAX_PIXELS) -> tuple[int, int, str]:
    """Height, width and "" of an image file, from its header; or 0, 0 and the reason why it cannot be used."""
    try:
        with open(path, "rb", buffering=0) as file:
            head = file.read(HEAD_BYTES)
            if not head:
                return 0, 0, "empty file"
            if head[:4] == b"GIF8":
                return 0, 0, "GIF, which DALI cannot decode"
            if not _is_complete(file, head):
                return 0, 0, "truncated"
            try:
                height, width = _header_size(head)
            except (OSError, SyntaxError, ValueError, struct.error):
                file.seek(0)
                height, width = _header_size(file)  # a long header: let Pillow read as far as it needs
            if height * width > max_pixels:
                return 0, 0, f"{width} x {height} pixels, over the limit of {max_pixels}"
            return height, width, ""
    except Image.DecompressionBombError:
        return 0, 0, f"over the limit of {max_pixels} pixels"
    except Image.UnidentifiedImageError:
        return 0, 0, "not an image"
    except OSError as error:
        return 0, 0, f"unreadable: {error.strerror}" if error.errno else "broken header"
    except (SyntaxError, ValueError, struct.error):  # what Pillow raises on damaged headers
        return 0, 0, "broken header"


def _header_size(head: bytes | io.RawIOBase) -> tuple[int, int]:
    with Image.open(io.BytesIO(head) if isinstance(head, bytes) else head, formats=FORMATS) as image:
        if image.format == "TIFF":  # Pillow swaps the sides of a TIFF that is to be shown rotated
            return image.tag_v2[257], image.tag_v2[256]
        return image.height, image.width


def _is_complete(file: io.RawIOBase, head: bytes) -> bool:
    end = file.seek(0, os.SEEK_END)
    file.seek(max(end - 12, 0))
    tail = file.read(12)
    if head[:2] == b"\xff\xd8":
        return tail[-2:] == b"\xff\xd9" or _ends_before_garbage(file)
    if head[:4] == b"\x89PNG":
        return tail[4:8] == b"IEND" or b"IEND\xae\x42\x60\x82" in _whole(file)
    if head[:4] == b"RIFF":
        return int.from_bytes(head[4:8], "little") + 8 <= end
    return not is_cut_bmp(head, end)


def is_cut_bmp(head: bytes, size: int) -> bool:
    """Whether a file of `size` bytes that starts with `head` is a BMP without all its rows.

    It decodes to garbage without an error. Compressed ones, which nobody writes, are not judged.
    """
    if head[:2] != b"BM" or len(head) < 34:
        return False
    start, header_size, width, height, _, bits, compression = struct.unpack_from("<IIiiHHI", head, 10)
    if header_size < 40 or compression not in (0, 3):
        return False
    return start + (abs(width) * bits + 31) // 32 * 4 * abs(height) > size


def _ends_before_garbage(file: io.RawIOBase) -> bool:
    data, at = _whole(file), 2
    # Skip the segments before the first scan: a thumbnail in one of them has an end of its own.
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        at += 1 if marker == 0xFF else 2 + length
        if marker == 0xDA:
            return data.find(b"\xff\xd9", at) >= 0
    return False


def _whole(file: io.RawIOBase) -> bytes:
    file.seek(0)
    return file.read()


def _walk(root: str, rejected: list[tuple[str, str]]) -> list[Found]:
    found: list[Found] = []
    entered: set[tuple[int, int]] = set()
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
        if (status.st_dev, status.st_ino) in entered:
            rejected.append((folder, "folder already entered by another path"))
            continue
        entered.add((status.st_dev, status.st_ino))
        below = [f"{folder}/{entry.name}" if folder else entry.name for entry in entries]
        visible = [(entry, name) for entry, name in zip(entries, below, strict=True) if entry.name[0] != "."]
        pending += [name for entry, name in reversed(visible) if _is_folder(entry)]
        found += filter(None, (_file(entry, name, rejected) for entry, name in visible if not _is_folder(entry)))
    return found


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _file(entry: os.DirEntry, name: str, rejected: list[tuple[str, str]]) -> Found | None:
    try:
        status = entry.stat()
    except OSError:
        rejected.append((name, "broken link" if entry.is_symlink() else "unreadable"))
        return None
    if not entry.is_file():  # a pipe would block whoever opens it
        rejected.append((name, "not a regular file"))
        return None
    return Found(name, status.st_size, status.st_mtime_ns, sys.intern(name.split("/", 1)[0]) if "/" in name else None)


def _listed(source: str, rejected: list[tuple[str, str]]) -> list[Found]:
    try:
        text = Path(source).read_bytes()
    except OSError as error:
        raise DataError(f"{source}: cannot read the list: {error.strerror}", exit_code=2) from None
    if b"\0" in text:
        raise DataError(f"{source}: neither a folder nor a text file with one path a line", exit_code=2)
    lines = os.fsdecode(text.removeprefix(b"\xef\xbb\xbf")).split("\n")
    entries = [line.rstrip("\r").partition("\t") for line in lines if line.strip()]
    found = []
    for name, tab, label in entries:
        try:
            status = os.stat(os.path.join(os.path.dirname(source), name))
        except OSError as error:
            rejected.append((name, f"unreadable: {error.strerror}"))
            continue
        found.append(Found(name, status.st_size, status.st_mtime_ns, sys.intern(label.strip()) if tab else None))
    return found


def _number(
    labels: list[str | None], classes: Sequence[str] | None, source: str
) -> tuple[list[str], np.ndarray | None]:
    present = set(labels)
    if None in present or (classes is None and len(present) == 1):
        return [], None
    names = list(classes) if classes is not None else sorted(present, key=_natural)
    unknown = sorted(present.difference(names))
    if unknown:
        raise DataError(f"{source}: class {unknown[0]!r} is not among the {len(names)} classes of the training part")
    number = {name: i for i, name in enumerate(names)}
    return names, np.array([number[label] for label in labels], np.int64)


def _natural(name: str) -> tuple[bool, int, str]:
    return (False, int(name), name) if name.isdecimal() else (True, 0, name)


def _probe_all(
    root: str,
    found: list[Found],
    cache: Cache | None,
    max_pixels: int,
    threads: int | None,
    progress: Callable[[int, int], None] | None,
) -> list[Probe]:
    probed = cache.look_up(found) if cache else [None] * len(found)
    missing = [i for i, result in enumerate(probed) if result is None]
    chunks = [missing[at : at + CHUNK_FILES] for at in range(0, len(missing), CHUNK_FILES)]

    def probe_chunk(chunk: list[int]) -> list[Probe]:
        return [probe(os.path.join(root, found[i].path), max_pixels) for i in chunk]

    done = 0
    # More threads than cores, because a cold or remote disk answers many requests at once.
    with warnings.catch_warnings(), ThreadPoolExecutor(threads or 2 * (os.cpu_count() or 1)) as pool:
        warnings.simplefilter("ignore")  # Pillow's, on headers that are odd but readable
        for chunk, results in zip(chunks, pool.map(probe_chunk, chunks), strict=True):
            for i, result in zip(chunk, results, strict=True):
                probed[i] = result
            done += len(chunk)
            if progress:
                progress(done, len(missing))
    if cache and missing:
        cache.store(found, probed)
    return probed


class Cache:
    """What `probe` said of each file of one source, trusted for as long as the file's size and time stay the same.

    One `.npz` file, written under a temporary name and renamed. A file that is missing, damaged or of another version
    counts as empty, and a folder that cannot be written to costs nothing but the next scan's time.
    """

    def __init__(self, source: str, max_pixels: int) -> None:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        key = f"{CACHE_VERSION}\n{max_pixels}\n{source}"
        self.path = Path(home, "fastmoco", f"manifest-{hashlib.sha256(os.fsencode(key)).hexdigest()[:24]}.npz")

    def look_up(self, found: list[Found]) -> list[Probe | None]:
        """The known result for each file, or None."""
        try:
            with np.load(self.path, allow_pickle=False) as data:
                names = os.fsdecode(data["names"].tobytes()).split("\0")
                reasons = os.fsdecode(data["reasons"].tobytes()).split("\0")
                states, results = data["states"].tolist(), data["results"].tolist()
                rows = {name: row for row, name in enumerate(names)}
                if not len(names) == len(states) == len(results):
                    raise ValueError("columns of different lengths")
                return [_known(rows.get(file.path), file, states, results, reasons) for file in found]
        except Exception:  # damage comes out of zip, zlib and numpy as errors of many kinds
            return [None] * len(found)

    def store(self, found: list[Found], probed: list[Probe]) -> None:
        """Replace the file's content."""
        reasons = sorted({reason for _, _, reason in probed})
        number = {reason: i for i, reason in enumerate(reasons)}
        temporary = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.path.parent, suffix=".partial", delete=False) as file:
                temporary = file.name
                np.savez(
                    file,
                    names=_packed(entry.path for entry in found),
                    states=np.array([(entry.bytes, entry.mtime_ns) for entry in found], np.int64),
                    results=np.array([(h, w, number[reason]) for h, w, reason in probed], np.int64),
                    reasons=_packed(reasons),
                )
            os.replace(temporary, self.path)
        except OSError:
            if temporary:
                Path(temporary).unlink(missing_ok=True)


def _known(row: int | None, file: Found, states: list, results: list, reasons: list[str]) -> Probe | None:
    if row is None or states[row] != [file.bytes, file.mtime_ns]:
        return None
    height, width, reason = results[row]
    return height, width, reasons[reason]


def _packed(names: Iterable[str]) -> np.ndarray:
    return np.frombuffer(os.fsencode("\0".join(names)), np.uint8)
