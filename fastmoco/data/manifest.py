"""The manifest: which images there are, how large they are, and why the other files were left out.

A source is a folder with one sub-folder per class, a folder of images at any depth, tar archives in such a folder or
alone, or a text file with one path a line. Sizes come from the headers and are kept in the user's cache folder, never
beside the data.
"""

from __future__ import annotations

import bisect
import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fastmoco.data import cache as array_cache
from fastmoco.data import shard_set
from fastmoco.data.errors import DataError
from fastmoco.data.file_results import CheckResult, Results
from fastmoco.data.files import Files, find_sources, number_classes, with_members, without_strays
from fastmoco.data.image_table import ImageTable, Names
from fastmoco.data.order import ShardRows
from fastmoco.data.probe import Header, probe
from fastmoco.data.remote import RemoteShards
from fastmoco.data.shard_source import Fetching, LocalShards, Shard, Source, as_url, indexed
from fastmoco.data.tars import ENDING
from fastmoco.environment import share_of_cores
from fastmoco.recipe import TABLE_UP_TO, Recipe
from fastmoco.terminal import counted

NAME = "images.npz"  # of a run's own copy
TRAIN_NAMES, VAL_NAMES = ("train",), ("val", "valid", "validation", "test")
ONE_COLOUR, SMALL_RANGE = 8, 64  # levels, of 255, that such images span at most; 64 are 14 bits in 16
FEW = 8  # images, all over a set, that tell whether it is there and is the same
CHUNK_FILES = 256  # files per task of the header threads

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many files are done and how many there are."""


Decode = Callable[["Manifest", "int | None"], Iterable[CheckResult]]
"""Given images and a number of threads; says of each image in turn what decoding it came to."""


@dataclass
class Manifest:
    """The images of one source, sorted by path; the index of an image is its name everywhere else."""

    root: str
    """Folder that relative paths start from."""
    paths: list[str]
    """Path of each image, relative to the root or absolute, or its name inside its archive."""
    sizes: np.ndarray
    """int32 [n, 2]: height and width as stored, EXIF orientation ignored."""
    labels: np.ndarray | None = None
    """int64 [n]: class of each image, or None if the source tells of no classes."""
    classes: list[str] = field(default_factory=list)
    """Names of the classes."""
    rejected: list[tuple[str, str]] = field(default_factory=list)
    """Path and reason of everything left out."""
    bytes: int = 0
    """Size of all images as stored."""
    passed: dict[str, int] = field(default_factory=dict)
    """How many files a scan passed over: hidden ones, and of archives sidecars, by their ending."""
    archives: list[str] = field(default_factory=list)
    """Tar archives that hold images, relative to the root or absolute."""
    transparent: int = 0
    """How many of the images have transparency, where a scan looked."""
    fingerprints: tuple[np.ndarray, np.ndarray] = (np.empty(0, np.int64), np.empty((0, 32), np.uint8))
    """Indices of a few images and the SHA-256 of each, as they were when a loaded manifest was saved."""
    root_before: str = ""
    """The root of a loaded manifest when it was saved, where that is known."""
    spans: np.ndarray | None = None
    """uint8 [n]: levels between the darkest and the brightest pixels of each, where a scan has decoded them."""
    places: np.ndarray | None = None
    """int64 [n, 3]: archive (-1 for a file of its own), offset in it and bytes; None without archives."""
    source: Source | None = None
    """What reads the archives, where they are remote or many."""

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, index: int) -> str:
        """Full path of an image, for messages and, where it is a file of its own, for other readers."""
        number = -1 if self.places is None else self.places[index, 0]
        return os.path.join(self.root if number < 0 else self._archive(number), self.paths[index])

    def name(self, index: int) -> str:
        """What an image is called in records: its entry in `paths`, which is its own."""
        return self.paths[index]

    def find(self, path: str) -> int | None:
        """Index of the image of that name, or None."""
        index = bisect.bisect_left(self.paths, path)
        return index if index < len(self.paths) and self.paths[index] == path else None

    def read(self, index: int, place: Sequence[int] | None = None) -> np.ndarray:
        """The encoded bytes of an image, uint8 [size]; raises OSError if the file cannot be read.

        `place` is the image's row of `places`, where the caller has read many at once.
        """
        if place is None:
            place = (-1, 0, -1) if self.places is None else self.places[index].tolist()
        number, offset, size = place
        if number < 0:
            with open(self.path(index), "rb", buffering=0) as file:
                return np.frombuffer(file.read(), np.uint8)
        if self.source is not None:
            return self.source.read(self.archives[number], offset, size)
        with open(self._archive(number), "rb", buffering=0) as file:
            return np.frombuffer(os.pread(file.fileno(), size, offset), np.uint8)

    @cached_property
    def shards(self) -> ShardRows | None:
        """Which images each archive holds, in its order; None if some image is in none."""
        if self.places is None or (self.places[:, 0] < 0).any():
            return None
        counts = np.bincount(self.places[:, 0], minlength=len(self.archives))
        return ShardRows(np.concatenate([[0], np.cumsum(counts)]), np.lexsort((self.places[:, 1], self.places[:, 0])))

    def absence(self) -> str:
        """Why the images cannot be there at all: no folder, no archive, or none of a few can be read; or ""."""
        if as_url(self.root):
            return ""  # a read that fails says what is wrong
        if not os.path.isdir(self.root):
            return f"{self.root}: no such folder"
        archive = next((name for name in self.archives if not os.path.isfile(os.path.join(self.root, name))), None)
        if archive is not None:
            return f"{os.path.join(self.root, archive)}: no such archive"
        few = self._few()
        if any(map(self._is_readable, few)):
            return ""
        return f"{self.path(few[0])}: cannot be read, nor can any of {len(few)} images all over the set"

    def others(self) -> str:
        """Name of an image that is another than when the manifest was saved, among a few looked at; or ""."""
        for index, print_ in zip(self.fingerprints[0].tolist(), self.fingerprints[1], strict=True):
            if self._is_readable(index) and not np.array_equal(_print_of(self, index), print_):
                return self.path(index)
        return ""

    def _few(self) -> list[int]:
        return np.unique(np.linspace(0, len(self) - 1, min(FEW, len(self))).astype(int)).tolist()

    def _is_readable(self, index: int) -> bool:
        in_archive = self.places is not None and self.places[index, 0] >= 0
        try:
            # A pipe would block whoever opens it.
            return (in_archive or stat.S_ISREG(os.stat(self.path(index)).st_mode)) and self.read(index) is not None
        except OSError:
            return False

    def save(self, path: str | os.PathLike) -> None:
        """Write what `load` needs, and prints of a few images; raises OSError if it cannot be written."""
        optional = {"labels": self.labels, "places": self.places}
        few = [index for index in self._few() if self._is_readable(index)]
        optional["printed"] = np.array(few, np.int64)
        optional["prints"] = np.array([_print_of(self, index) for index in few], np.uint8).reshape(-1, 32)
        array_cache.write(
            Path(path),
            paths=array_cache.pack(self.paths),
            classes=array_cache.pack(self.classes),
            archives=array_cache.pack(self.archives),
            root=array_cache.pack([self.root]),
            sizes=self.sizes,
            **_rows_of(self.source),
            **{name: value for name, value in optional.items() if value is not None},
        )

    def content(self) -> Iterator[bytes]:
        """What two machines must agree on: names and sizes, or a digest of them."""
        yield os.fsencode("\n".join(self.paths))
        yield self.sizes.tobytes()

    @classmethod
    def load(cls, path: str | os.PathLike, source: str | os.PathLike, fetching: Fetching = Fetching()) -> Manifest:
        """A saved manifest of `source`, which may have been moved; raises DataError if the file is damaged."""
        data = array_cache.load(Path(path))
        if data is None:
            raise DataError(f"{path} is missing or damaged: restore it, or start another run")
        url = as_url(source)
        root = os.path.abspath(os.fspath(source))
        root = root if os.path.isdir(root) else os.path.dirname(root)
        reader: Source | None = None
        if url:
            reader = RemoteShards(url, fetching)
            root = reader.root
            reader.know(_shards_from(data))
        if "table" in data:
            reader = reader or LocalShards(root, array_cache.unpack(data["shards"]))
            manifest: Manifest = ShardManifest.opened(reader, data)
        else:
            names = {name: array_cache.unpack(data[name]) for name in ("paths", "classes", "archives")}
            optional = {name: data.get(name) for name in ("labels", "places")}
            manifest = cls(root=root, sizes=data["sizes"], source=reader, **optional, **names)
        if "prints" in data:  # runs of older versions have none
            manifest.fingerprints, manifest.root_before = (
                (data["printed"], data["prints"]),
                array_cache.unpack(data["root"])[0],
            )
        return manifest

    def take(self, indices: Iterable[int]) -> Manifest:
        """The images with these indices, in their order; `find` needs one that ascends."""
        rows = np.array(list(indices), np.int64)
        labels, places = (None if column is None else column[rows] for column in (self.labels, self.places))
        paths = [self.paths[row] for row in rows.tolist()]
        return replace(self, paths=paths, sizes=self.sizes[rows], labels=labels, places=places, spans=None)

    def in_memory(self) -> Manifest:
        """The same images, with every fact of all of them in a list or an array."""
        return self

    def _archive(self, number: int) -> str:
        return os.path.join(self.root, self.archives[number])


class ShardManifest(Manifest):
    """Images in a table that processes share, in the order of the shards and of their places in them.

    `paths` are the names of the members, which another shard may hold too; `name` tells shard and member.
    """

    @classmethod
    def of(cls, reader: Source, table: ImageTable, shards: Sequence[Shard], max_pixels: int) -> ShardManifest:
        """The images of `table`, read by `reader`."""
        manifest = cls(
            root=reader.root,
            paths=Names(table),
            sizes=table.sizes(),
            labels=table.labels(),
            classes=table.classes,
            rejected=table.left_out,
            bytes=table.bytes,
            archives=table.shards,
            transparent=table.transparent,
            places=table.places(),
            source=reader,
        )
        manifest.table, manifest.rows, manifest.max_pixels = table, list(shards), max_pixels
        return manifest

    @classmethod
    def opened(cls, reader: Source, data: dict[str, np.ndarray]) -> ShardManifest:
        """From what `save` wrote; raises DataError if the shards hold other images now."""
        shards, max_pixels = _shards_from(data), int(data["max_pixels"])
        table = shard_set.table_of(reader, shards, max_pixels)
        if table.digest != array_cache.unpack(data["table"])[0]:
            raise DataError(f"{reader.root}: its shards hold other images than when the run was started")
        return cls.of(reader, table, shards, max_pixels)

    @cached_property
    def shards(self) -> ShardRows:
        """Which images each shard holds: rows are images."""
        return ShardRows(self.table.starts)

    def name(self, index: int) -> str:
        """Shard and member."""
        return f"{self.archives[int(self.places[index][0])]}/{self.paths[index]}"

    def find(self, path: str) -> int | None:
        """Index of the image of that name, or None."""
        for number, archive in enumerate(self.archives):
            if path.startswith(f"{archive}/"):
                first, last = self.table.starts[number : number + 2].tolist()
                names = self.table.names_from(first, last)
                member = path[len(archive) + 1 :]
                return first + names.index(member) if member in names else None
        return None

    def path(self, index: int) -> str:
        """Full path of an image, for messages."""
        return os.path.join(self.root, self.name(index))

    def take(self, indices: Iterable[int]) -> Manifest:
        """The images with these indices, in their order, under the names of the members."""
        return Manifest(**self._fields()).take(indices)

    def in_memory(self) -> Manifest:
        """The same images in lists and arrays, some 300 bytes each: for those who look at all of them anyway."""
        whole = {"paths": list(self.paths), "sizes": self.sizes[:], "places": self.places[:]}
        return Manifest(**self._fields() | whole | {"labels": None if self.labels is None else self.labels[:]})

    def _fields(self) -> dict[str, Any]:
        return {each.name: getattr(self, each.name) for each in fields(Manifest)}

    def absence(self) -> str:
        """Why the images cannot be there at all: no folder, or none of a few shards is there; or ""."""
        if as_url(self.root) or any(map(self._is_readable, self._few())):
            return ""
        return f"{self.path(0)}: cannot be read, nor can any of a few images all over the set"

    def save(self, path: str | os.PathLike) -> None:
        """Write what `load` needs: the shards, the digest of their images, and prints of a few."""
        few = [index for index in self._few() if self._is_readable(index)]
        array_cache.write(
            Path(path),
            table=array_cache.pack([self.table.digest]),
            max_pixels=np.array(self.max_pixels),
            root=array_cache.pack([self.root]),
            printed=np.array(few, np.int64),
            prints=np.array([_print_of(self, index) for index in few], np.uint8).reshape(-1, 32),
            **_columns(self.rows),
        )

    def content(self) -> Iterator[bytes]:
        """The digest of the table."""
        yield bytes.fromhex(self.table.digest)


def _columns(shards: Sequence[Shard]) -> dict[str, np.ndarray]:
    return {
        "shards": array_cache.pack(shard.name for shard in shards),
        "shard_bytes": np.array([shard.bytes for shard in shards], np.int64),
        "shard_stamps": array_cache.pack(shard.stamp for shard in shards),
        "shard_digests": array_cache.pack(shard.digest for shard in shards),
    }


def _rows_of(reader: Source | None) -> dict[str, np.ndarray]:
    return _columns(list(reader.known.values())) if isinstance(reader, RemoteShards) else {}


def _shards_from(data: dict[str, np.ndarray]) -> list[Shard]:
    texts = (array_cache.unpack(data[name]) for name in ("shards", "shard_stamps", "shard_digests"))
    names, stamps, digests = texts
    return [Shard(*row) for row in zip(names, data["shard_bytes"].tolist(), stamps, digests, strict=True)]


def _print_of(images: Manifest, index: int) -> np.ndarray:
    try:
        data = images.read(index).tobytes()
    except OSError:
        data = b""
    return np.frombuffer(hashlib.sha256(data).digest(), np.uint8)


def split(path: str | os.PathLike) -> tuple[str, str | None]:
    """Training part and validation part (or None) of a folder that has `train/` and perhaps `val/` or `test/`."""
    if as_url(path):
        return str(as_url(path)), None
    folder = Path(path)
    train = next((folder / name for name in TRAIN_NAMES if (folder / name).is_dir()), None)
    if train is None:
        return str(path), None
    return str(train), next((str(folder / name) for name in VAL_NAMES if (folder / name).is_dir()), None)


def scan(
    path: str | os.PathLike,
    *,
    classes: Sequence[str] | None = None,
    max_pixels: int = Recipe.max_pixels,
    threads: int | None = None,
    cache: bool = True,
    decode: Decode | None = None,
    progress: Progress | None = None,
    fetching: Fetching = Fetching(),
) -> Manifest:
    """Manifest of a folder, a tar or a text list; raises DataError if nothing in it can be used.

    In a folder of sub-folders only, the first level names the classes (as torchvision's ImageFolder has it); a single
    class tells nothing and counts as none. A line of a list is a path, relative to the list, or path, tab, class. A
    tar stands for what it holds (`tars.py`). Hidden files and folders are passed over. `classes` fixes the numbering,
    so that a validation part agrees with its training part. Headers are read. `decode`
    (`full_scan.decode_apart`) is given the images whose headers are good, and says of each in turn what decoding it
    came to. Files that the cache knows are not opened. A URL names shards that `fetching` tells how to fetch; many
    shards are looked at one by one, and then share a table (`shard_set.py`).
    """
    if as_url(path):
        return _in_shards(RemoteShards(str(as_url(path)), fetching), classes, max_pixels, cache, progress)
    source = os.path.abspath(os.fspath(path))
    rejected: list[tuple[str, str]] = []
    shards = indexed(source)
    if shards:  # what else lies there is the index
        own, archives = Files(source), [os.path.join(source, name) for name in shards]
    else:
        own, archives = find_sources(source, str(path), rejected)
    if decode is None and (shards or archives and not own.paths and shard_set.is_large(archives)):
        return _in_shards(LocalShards.of(own.root, archives), classes, max_pixels, cache, progress)
    files = with_members(own, archives, rejected)
    results = Results(files, source, max_pixels, cache)
    _read_headers(files, results, max_pixels, threads, progress)
    if decode is not None:
        _decode(decode, files, results, threads, progress)
    results.store()
    bad = np.flatnonzero(results.codes)
    rejected += [(files.paths[i], results.reasons[results.codes[i]]) for i in bad.tolist()]
    good = np.flatnonzero(results.codes == 0)
    if os.path.isdir(source) or source.endswith(ENDING):
        good = without_strays(files, good, rejected)
    if not len(good):
        because = f"; {rejected[0][0]}: {rejected[0][1]}" if rejected else ""
        raise DataError(f"{path}: no images in it ({counted(len(rejected), 'file')} left out{because})", exit_code=2)
    labels = [files.labels[i] for i in good.tolist()]
    names, numbers = number_classes(labels, classes, str(path))
    paths = [files.paths[i] for i in good.tolist()] if len(good) < len(files) else files.paths
    manifest = Manifest(files.root, paths, results.sizes[good], numbers, names, sorted(rejected))
    manifest.passed = dict(+files.passed)
    manifest.bytes = int(files.bytes[good].sum())
    manifest.transparent = int(results.alpha[good].sum())
    manifest.spans = results.spans[good] if results.decoded[good].all() else None
    if files.archives:
        manifest.places = np.concatenate([files.places[good], files.bytes[good, None]], 1)
        manifest.archives = [os.path.relpath(archive, files.root) for archive in files.archives]
    return manifest


def _in_shards(
    reader: Source, classes: Sequence[str] | None, max_pixels: int, cache: bool, progress: Progress | None
) -> Manifest:
    shards = reader.shards()
    table = shard_set.table_of(reader, shards, max_pixels, progress, cache)
    if len(table) > TABLE_UP_TO:
        if classes is not None and table.classes and list(classes) != list(table.classes):
            other = "its classes are not those of the training part; so many labels are not numbered anew"
            raise DataError(f"{reader.root}: {other}")
        return ShardManifest.of(reader, table, shards, max_pixels)
    return _sorted_by_path(reader, table, classes)


def _sorted_by_path(reader: Source, table: ImageTable, classes: Sequence[str] | None) -> Manifest:
    """Few images in the order of their paths: the same from any source, however they are dealt out over shards."""
    rows, places = table.rows(np.arange(len(table))), table.places()[:]
    files = Files(reader.root, list(table.paths()), archives=table.shards)
    files.labels = [None if code < 0 else table.met[code] for code in rows["label"].tolist()]
    files.bytes, files.times, files.places = places[:, 2], np.arange(len(rows)), places[:, :2]
    files.sort()  # the times tell which row went where
    rejected = list(table.left_out)
    good = without_strays(files, np.arange(len(files)), rejected)
    names, numbers = number_classes([files.labels[i] for i in good.tolist()], classes, reader.root)
    paths = [files.paths[i] for i in good.tolist()]
    sizes = np.ascontiguousarray(rows["size"][files.times[good]])
    manifest = Manifest(files.root, paths, sizes, numbers, names, sorted(rejected), int(files.bytes[good].sum()))
    manifest.places = np.concatenate([files.places[good], files.bytes[good, None]], 1)
    manifest.archives, manifest.transparent, manifest.source = table.shards, table.transparent, reader
    return manifest


def _read_headers(
    files: Files, results: Results, max_pixels: int, threads: int | None, progress: Progress | None
) -> None:
    missing = np.flatnonzero(results.codes < 0).tolist()

    def read_chunk(chunk: list[int]) -> list[Header]:
        return [probe(*_where(files, i), max_pixels) for i in chunk]

    for i, header in _in_threads(read_chunk, missing, threads, "headers", progress):
        results.note_header(i, header)


def _where(files: Files, index: int) -> tuple[str, int, int | None]:
    number, offset = files.places[index].tolist() if files.archives else (-1, 0)
    if number < 0:
        return os.path.join(files.root, files.paths[index]), 0, None
    return files.archives[number], offset, int(files.bytes[index])


def _in_threads(
    work: Callable[[list[int]], list], indices: list[int], threads: int | None, what: str, progress: Progress | None
) -> Iterator[tuple[int, Header]]:
    chunks = [indices[at : at + CHUNK_FILES] for at in range(0, len(indices), CHUNK_FILES)]
    count = 0
    # More threads than cores, because a cold or remote disk answers many requests at once.
    with ThreadPoolExecutor(threads or 2 * share_of_cores()) as pool:
        for chunk, results in zip(chunks, pool.map(work, chunks), strict=True):
            yield from zip(chunk, results, strict=True)
            count += len(chunk)
            if progress:
                progress(what, count, len(indices))


def _decode(decode: Decode, files: Files, results: Results, threads: int | None, progress: Progress | None) -> None:
    missing = np.flatnonzero((results.codes == 0) & ~results.decoded)
    if not len(missing):
        return
    places = np.concatenate([files.places, files.bytes[:, None]], 1)[missing] if files.archives else None
    names = [files.paths[i] for i in missing.tolist()]
    part = Manifest(files.root, names, results.sizes[missing], archives=files.archives, places=places)
    for count, result in enumerate(decode(part, threads), 1):
        results.note_decoded(int(missing[count - 1]), result)
        if progress and (count % CHUNK_FILES == 0 or count == len(missing)):
            progress("decode", count, len(missing))
