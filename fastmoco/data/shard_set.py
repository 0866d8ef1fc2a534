"""The table of a set of shards: made in pieces, in parallel, kept, and opened in a moment by all that come after.

Pieces are kept by shard, so that a build that was ended goes on, and shards that were added are the only ones that are
read. They come from the index beside the shards where there is one.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from fastmoco.data import cache, image_table, pieces, probe, tars
from fastmoco.data.errors import DataError
from fastmoco.data.files import find_sources
from fastmoco.data.image_table import ImageTable, Piece
from fastmoco.data.piece_makers import Makers, Task
from fastmoco.data.remote import RemoteShards
from fastmoco.data.shard_source import Fetching, LocalShards, Shard, Source, as_url, indexed, piece_name
from fastmoco.environment import cores

LARGE_BYTES = 1 << 38  # of local archives, from which on they are looked at shard by shard: some millions of images
MANY_BYTES = 1 << 30  # of archives, from which on several processes read them: starting these takes half a second

Progress = Callable[[str, int, int], None]


def is_large(archives: Sequence[str]) -> bool:
    """Whether local archives are so many that their images belong in a table."""
    return sum(os.path.getsize(archive) for archive in archives) >= LARGE_BYTES


def source_of(path: str, fetching: Fetching = Fetching()) -> Source | None:
    """The shards at `path`, a URL, a folder of archives alone, one of them, or a list; None if other images are there.

    Raises DataError if there is nothing.
    """
    url = as_url(path)
    if url:
        return RemoteShards(url, fetching)
    root = os.path.abspath(path)
    listed = indexed(root)
    if listed:
        return LocalShards(root, listed)
    files, archives = find_sources(root, path, [])
    return LocalShards.of(files.root, archives) if archives and not files.paths else None


def table_of(
    source: Source, shards: Sequence[Shard], max_pixels: int, progress: Progress | None = None, cached: bool = True
) -> ImageTable:
    """The table of `shards`, from the user's cache folder, or made there; raises DataError if a shard is no sound tar.

    One process of a machine makes it while the others wait. Without `cached` all shards are read.
    """
    folder = folder_of(source, shards, max_pixels)
    with _locked(folder.with_suffix(".lock")):
        if cached:
            with suppress(DataError):
                return ImageTable(folder)
        build(source, shards, max_pixels, progress, cached)
        rows = ((shard.name, shard.bytes, piece(source, shard, max_pixels)) for shard in shards)
        image_table.write(folder, rows)
    return ImageTable(folder)


def folder_of(source: Source, shards: Sequence[Shard], max_pixels: int) -> Path:
    """Where the table of these very shards is."""
    whole = hashlib.sha256(f"{image_table.VERSION} {tars.VERSION} {probe.VERSION} {max_pixels}\n{source.root}".encode())
    for shard in shards:
        whole.update("\0".join(map(str, shard)).encode(errors="surrogateescape") + b"\n")
    return cache.folder() / "tables" / whole.hexdigest()[:32]


def build(
    source: Source,
    shards: Sequence[Shard],
    max_pixels: int,
    progress: Progress | None = None,
    cached: bool = True,
    index: Path | None = None,
    processes: int | None = None,
) -> None:
    """Make the pieces that are missing, several shards at a time; keep them in the folder `index` too.

    `processes` children read the shards, and with 0 this process does; None is one for each core where it pays.
    """

    def make(shard: Shard) -> None:
        if cached and known(source, shard, max_pixels, index) is not None:
            return
        with source.local(shard) as path:
            task = Task(path, f"{source.root}/{shard.name}", max_pixels, str(_kept(source, shard)), shard.stamp)
            makers.make(task)
        if index is not None:
            pieces.save(index / piece_name(shard.name), piece(source, shard, max_pixels), shard.stamp, max_pixels)

    # All cores, because the other processes of this machine wait for the table; and more threads than cores, because a
    # disk or a server answers many requests at once.
    if processes is None:
        processes = cores() if sum(shard.bytes for shard in shards) >= MANY_BYTES else 0
    with Makers(processes) as makers, ThreadPoolExecutor(2 * max(cores(), processes)) as pool:
        waiting = [pool.submit(make, shard) for shard in shards]
        try:
            for done, each in enumerate(waiting, 1):
                each.result()
                if progress:
                    progress("shards", done, len(shards))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def known(source: Source, shard: Shard, max_pixels: int, index: Path | None = None) -> Piece | None:
    """The piece of a shard that is kept here, in `index`, or beside the shards; and then here, too."""
    piece = pieces.load(_kept(source, shard), shard.stamp, max_pixels)
    copied = None if index is None else index / piece_name(shard.name)
    if piece is not None:
        if copied is not None and not copied.exists():
            pieces.save(copied, piece, shard.stamp, max_pixels)
        return piece
    piece = None if copied is None else pieces.load(copied, shard.stamp, max_pixels)
    if piece is None and source.indexed:
        data = source.small_file(piece_name(shard.name))
        piece = None if data is None else pieces.load(io.BytesIO(data), shard.stamp, max_pixels)
    if piece is not None:
        keep(source, shard, piece, max_pixels, index)
    return piece


def keep(source: Source, shard: Shard, piece: Piece, max_pixels: int, index: Path | None = None) -> None:
    """Keep the piece of a shard here, and in the folder `index`; raises OSError if the disk refuses."""
    pieces.save(_kept(source, shard), piece, shard.stamp, max_pixels)
    if index is not None:
        pieces.save(index / piece_name(shard.name), piece, shard.stamp, max_pixels)


def piece(source: Source, shard: Shard, max_pixels: int) -> Piece:
    """A piece that was built; raises DataError if it is gone meanwhile."""
    result = pieces.load(_kept(source, shard), shard.stamp, max_pixels)
    if result is None:
        raise DataError(f"{_kept(source, shard)} is gone or damaged: start again, and it is made again")
    return result


def _kept(source: Source, shard: Shard) -> Path:
    text = f"{source.root}/{shard.name}\n{shard.stamp}"
    name = hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:24]
    return cache.folder() / "pieces" / name[:2] / f"{name}.npz"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
