"""`fastmoco data pack`: a folder of images becomes tar shards in WebDataset's layout, with an index beside them.

    OUT/000000.tar ...     FOLDER/NAME.jpg and, with the number of its class, FOLDER/NAME.cls of each image, by path
    OUT/shards.json, index/ what `pretrain` needs to open the set without reading the shards
    OUT/classes.txt        names of the classes, by number
    OUT/left_out.jsonl     file and reason of everything that is not in the shards
    OUT/packed.jsonl       what is done, a line for each shard: so a pack that was ended goes on

A shard is written under another name, synced, renamed, and read again before it counts.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from fastmoco import atomic
from fastmoco.data import manifest, pieces, tars
from fastmoco.data.draws import PACK_STREAM
from fastmoco.data.errors import DataError
from fastmoco.data.manifest import Manifest
from fastmoco.data.order import Permutation
from fastmoco.data.probe import Bytes, examine
from fastmoco.data.scan_report import Bar
from fastmoco.data.shard_source import Shard, piece_name, write_index
from fastmoco.environment import share_of_cores
from fastmoco.options import DataPack, UsageError
from fastmoco.terminal import counted

DONE, LEFT_OUT, CLASSES = "packed.jsonl", "left_out.jsonl", "classes.txt"
AHEAD = 64  # images read at once
BLOCK = tarfile.BLOCKSIZE
ENDINGS = {"jpeg": "jpg", "jpeg2k": "jp2", "pnm": "ppm", "tiff": "tif"}  # of nvImageCodec's names; others end as named
GB = 1e9


class _PackedShard(NamedTuple):
    """One line of packed.jsonl."""

    shard: str
    last: int
    """Position of the image that the next shard begins with, in the order of packing."""
    bytes: int
    digest: str
    left_out: list[tuple[str, str]]


def run(options: DataPack) -> None:
    """Pack the images in `options.path`, and those in the val/ beside its train/; say what is left out."""
    assert options.out is not None
    train, val = manifest.split(options.path)
    parts = [("train", train), ("val", val)] if val else [("", train)]
    classes = None
    for name, path in parts:
        assert path is not None
        with Bar() as bar:
            images = manifest.scan(path, classes=classes, max_pixels=options.max_pixels, progress=bar.show)
            shards = Packing(images, options.out / name, options).run(bar)
        classes = images.classes or None
        _report(options.out / name, images, shards)


def _report(out: Path, images: Manifest, shards: list[_PackedShard]) -> None:
    lost = sum(len(each.left_out) for each in shards)
    size = sum(each.bytes for each in shards)
    what = f"{counted(len(images) - lost, 'image')} in {counted(len(shards), 'shard')}"
    print(f"{what}, {size / GB:.3g} GB, each read again: {out}")
    if lost or images.rejected:
        print(f"  left out  {lost + len(images.rejected)}: {out / LEFT_OUT} lists them")


class Packing:
    """One set of images on its way into shards; raises UsageError if the folder holds something else."""

    def __init__(self, images: Manifest, out: Path, options: DataPack) -> None:
        self.images, self.out, self.options = images, out, options
        self.names = member_names(images)
        self._image: Callable[[np.ndarray], np.ndarray] = lambda positions: positions
        if options.shuffle and len(images):
            self._image = Permutation(len(images), PACK_STREAM)

    def run(self, bar: Bar) -> list[_PackedShard]:
        """Write what is not there yet, and the index."""
        self.out.mkdir(parents=True, exist_ok=True)
        shards = self._earlier_shards()
        at = shards[-1].last if shards else 0
        with ThreadPoolExecutor(share_of_cores()) as pool:
            while at < len(self.images):
                line = self._shard(f"{len(shards):06d}{tars.ENDING}", at, pool, bar)
                shards, at = [*shards, line], line.last
                self._note(line)
        self._finish(shards)
        return shards

    def _earlier_shards(self) -> list[_PackedShard]:
        """What an earlier pack of the same images did. Lines count up to the first whose shard is not there."""
        path, head = self.out / DONE, self._head()
        if not path.exists():
            if any(self.out.iterdir()):
                raise UsageError(f"{self.out} is not empty, and no pack was begun there: give --out another name")
            path.write_text(json.dumps(head) + "\n")
            return []
        lines = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
        if not lines or lines[0] != head:
            raise UsageError(f"{self.out} holds a pack of other images, or with other flags: give --out another name")
        shards = itertools.takewhile(self._is_there, (_PackedShard(**line) for line in lines[1:]))
        rows = [each._replace(left_out=[(file, reason) for file, reason in each.left_out]) for each in shards]
        atomic.write_text(path, "".join(json.dumps(line) + "\n" for line in (head, *(e._asdict() for e in rows))))
        return rows

    def _head(self) -> dict[str, Any]:
        whole = hashlib.sha256()
        for part in self.images.content():
            whole.update(part)
        names = ("shard_mb", "shorter_side", "quality")
        head = {"images": whole.hexdigest()} | {name: getattr(self.options, name) for name in names}
        return head | ({"shuffle": True} if self.options.shuffle else {})

    def _is_there(self, line: _PackedShard) -> bool:
        path = self.out / line.shard
        return path.is_file() and path.stat().st_size == line.bytes and (self.out / piece_name(line.shard)).is_file()

    def _note(self, line: _PackedShard) -> None:
        with (self.out / DONE).open("a") as file:
            file.write(json.dumps(line._asdict()) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _shard(self, name: str, first: int, pool: ThreadPoolExecutor, bar: Bar) -> _PackedShard:
        """Write one shard, which begins with the image at position `first`, and read it again."""
        left_out: list[tuple[str, str]] = []
        path = self.out / name
        with atomic.replacing(path) as draft, draft.open("wb") as file:
            last = self._fill(file, first, pool, left_out, bar)
        digest = atomic.sha256(path)
        piece = pieces.read(str(path), str(path), self.options.max_pixels)
        if piece.left_out or len(piece.records) != last - first - len(left_out):
            raise DataError(f"{path}: read again, it does not hold what was written: {piece.left_out[:1]}")
        pieces.save(self.out / piece_name(name), piece, digest, self.options.max_pixels)
        return _PackedShard(name, last, path.stat().st_size, digest, left_out)

    def _fill(
        self, file: BinaryIO, first: int, pool: ThreadPoolExecutor, left_out: list[tuple[str, str]], bar: Bar
    ) -> int:
        limit, position = self.options.shard_mb * 10**6, first
        with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT, errors="surrogateescape") as archive:
            for position, index, data in self._contents(first, pool):
                if isinstance(data, str):
                    left_out.append((self.images.name(index), data))
                    continue
                if archive.offset and archive.offset + len(data) + 4 * BLOCK > limit:
                    return position
                key, _, ending = self.names[index].rpartition(".")
                if self.options.shorter_side and data.startswith(b"\xff\xd8"):
                    ending = "jpg"
                _add(archive, f"{key}.{ending}", data)
                if self.images.labels is not None:
                    _add(archive, f"{key}.cls", str(int(self.images.labels[index])).encode())
                bar.show("images", position + 1, len(self.images))
        return position + 1

    def _contents(self, first: int, pool: ThreadPoolExecutor) -> Iterator[tuple[int, int, bytes | str]]:
        """Position and number of each image from position `first` on, and its bytes, or why it cannot be packed."""
        for at in range(first, len(self.images), AHEAD):
            positions = np.arange(at, min(at + AHEAD, len(self.images)))
            rows = self._image(positions).tolist()
            yield from zip(positions.tolist(), rows, pool.map(self._content, rows), strict=True)

    def _content(self, index: int) -> bytes | str:
        try:
            data = self.images.read(index)
        except OSError as error:
            return f"cannot be read: {error.strerror}"
        header = examine(Bytes.of(data), self.options.max_pixels)
        if header.reason:
            return header.reason
        side = self.options.shorter_side
        if side is None or min(header[:2]) <= side or header.alpha or header.pixel_type != "uint8":
            return data.tobytes()
        return resized(data.tobytes(), side, self.options.quality)

    def _finish(self, shards: list[_PackedShard]) -> None:
        left_out = [*self.images.rejected, *(row for line in shards for row in line.left_out)]
        lines = (json.dumps({"file": file, "reason": reason}) + "\n" for file, reason in left_out)
        atomic.write_text(self.out / LEFT_OUT, "".join(lines))
        if self.images.classes:
            atomic.write_text(self.out / CLASSES, "".join(f"{name}\n" for name in self.images.classes))
        write_index(self.out, [Shard(line.shard, line.bytes, line.digest, line.digest) for line in shards])


def member_names(images: Manifest) -> list[str]:
    """What images are called in the archives: each its own, and told apart by what stands before its first dot.

    That is WebDataset's key. So dots inside a name become underscores, and of two names that differ by their ending
    alone the later gets a number. A name whose ending says that it is no image gets one that says it is.
    """
    used: set[str] = set()
    names = []
    for index, path in enumerate(images.paths):
        parts = [part.lstrip(".") for part in path.split("/") if part.strip(".")]
        stem, dot, ending = parts[-1].rpartition(".")
        stem, ending = (stem, ending) if dot else (ending, "")
        if not ending or ending.lower() in tars.SIDECARS:
            codec = examine(Bytes.of(images.read(index))).codec
            ending = ENDINGS.get(codec, codec) or "jpg"
        key = "/".join([*parts[:-1], stem.replace(".", "_")])
        own = next(
            each for each in itertools.chain([key], (f"{key}_{n}" for n in itertools.count(2))) if each not in used
        )
        used.add(own)
        names.append(f"{own}.{ending}")
    return names


def resized(data: bytes, side: int, quality: int) -> bytes | str:
    """The image with a shorter side of `side` pixels as a JPEG in RGB, or why it cannot be decoded."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            scale = side / min(width, height)
            image.draft("RGB", (2 * side, 2 * side))  # a JPEG is decoded at a half, a quarter or an eighth
            whole = image.convert("RGB")
        size = (max(side, round(width * scale)), max(side, round(height * scale)))
        jpeg = io.BytesIO()
        whole.resize(size, Image.Resampling.LANCZOS).save(jpeg, "JPEG", quality=quality)
        return jpeg.getvalue()
    except Exception:  # damage comes out of Pillow as errors of many kinds
        return "damaged: cannot be decoded"


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)  # of no time and no owner, so that the same images make the same bytes
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))
