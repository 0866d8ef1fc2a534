"""Shards behind a URL that fsspec reads: s3, gs, https, hf and others.

They are read whole, through a cache on a local disk, or range by range. What fails is tried again for as long as
`Fetching.patience` says; then the run stops, and no image is blamed.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np

from fastmoco.data import cache
from fastmoco.data.errors import DataError
from fastmoco.data.shard_cache import ShardCache
from fastmoco.data.shard_source import ENDING, INDEX, Fetching, Shard, as_url, expanded, read_index

BACKENDS = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub", "http": "aiohttp", "https": "aiohttp"}
PART_BYTES = 32 << 20  # of a shard, asked for at once
FIRST_WAIT, LONGEST_WAIT = 0.25, 20.0  # seconds between two tries, doubled each time
SILENCE = 30.0  # seconds without a byte after which an answer counts as lost
AHEAD = 4  # shards that are fetched at once before they are needed
LOOKERS = 16  # threads that ask for sizes

T = TypeVar("T")


class RemoteShards:
    """Tar archives behind a URL: a folder of them, one, or a pattern with {first..last}."""

    def __init__(self, url: str, fetching: Fetching = Fetching()) -> None:
        urls = expanded(url)
        single = url.endswith(ENDING)
        self.root = os.path.commonpath([os.path.dirname(each) for each in urls]) if single else url.rstrip("/")
        self.root = str(as_url(self.root))
        self._named = [each[len(self.root) + 1 :] for each in urls] if single else []
        self._fetching = fetching
        self._fs, self._path = _filesystem(self.root)
        folder = fetching.folder or cache.folder() / "shards"
        self.cache = ShardCache(folder, int(min(fetching.cache_gb * 1e9, sys.maxsize))) if fetching.cache_gb else None
        self.indexed = self.whole = False
        """Whether a shard is fetched whole when an image of it is wanted."""
        self.known: dict[str, Shard] = {}
        """Shards by name, once they were listed."""
        self._asked: set[str] = set()
        self._ahead: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()

    def shards(self) -> list[Shard]:
        """Name, size and stamp of each; from `shards.json` where the set has one."""
        shards = self._from_index()
        self.indexed = bool(shards)
        shards = shards or self._from_list()
        self.known = {shard.name: shard for shard in shards}
        return shards

    def know(self, shards: Iterable[Shard]) -> None:
        """Take over what is known of the shards, in place of asking the server."""
        self.known |= {shard.name: shard for shard in shards}

    def small_file(self, name: str) -> bytes | None:
        """A small file beside the shards; None if there is none."""
        try:
            return self._try(name, lambda: self._fs.cat_file(f"{self._path}/{name}"))
        except FileNotFoundError:
            return None

    def read(self, name: str, offset: int, size: int) -> np.ndarray:
        """Bytes of a shard, from the cache or from the server; raises DataError if the server fails for too long."""
        shard = self.known.get(name)
        while self.cache is not None and shard is not None:
            data = self.cache.read(self._key(shard), shard.bytes, offset, size)
            if data is not None:
                return data
            if not self.whole:
                break
            self._fetch(shard)  # and read it then; where room is short another process may have removed it by now
        return np.frombuffer(self._range(name, offset, size), np.uint8)

    @contextmanager
    def local(self, shard: Shard) -> Iterator[str]:
        """The shard in the cache, or in a file that lasts as long as the context."""
        if self.cache is not None and shard.bytes <= self.cache.limit:
            with self.cache.held(self._key(shard), shard.bytes, partial(self._download, shard)) as path:
                yield str(path)
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "shard.tar")
            with path.open("wb") as file:
                self._download(shard, file)
            yield str(path)

    def fetch_ahead(self, names: Sequence[str]) -> None:
        """Begin to fetch shards that will be wanted soon, in this order; what fails is tried again when it is wanted.

        What is left out is wanted no more, until it is named again.
        """
        if self.cache is None or not self.whole:
            return
        with self._lock:
            names_ahead, before = set(names), self._asked
            self._asked = names_ahead
            self._ahead = self._ahead or ThreadPoolExecutor(AHEAD, thread_name_prefix="fastmoco-shards")
            for name in dict.fromkeys(names):
                if name not in before:
                    self._ahead.submit(self._fetch_quietly, name)

    def close(self) -> None:
        """Fetch nothing more ahead."""
        with self._lock:
            ahead, self._ahead, self._asked = self._ahead, None, set()
        if ahead is not None:
            ahead.shutdown(wait=False, cancel_futures=True)

    def _fetch_quietly(self, name: str) -> None:
        with suppress(Exception):  # who wants it will say so
            self._fetch(self.known[name])

    def _key(self, shard: Shard) -> str:
        text = f"{self.root}/{shard.name}\n{shard.bytes}\n{shard.stamp}"
        return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:32]

    def _fetch(self, shard: Shard) -> None:
        assert self.cache is not None
        self.cache.get(self._key(shard), shard.bytes, partial(self._download, shard))

    def _download(self, shard: Shard, file: BinaryIO) -> None:
        whole = hashlib.sha256()
        for at in range(0, shard.bytes, PART_BYTES):
            part = self._range(shard.name, at, min(PART_BYTES, shard.bytes - at))
            whole.update(part)
            file.write(part)
        if shard.digest and whole.hexdigest() != shard.digest:
            raise DataError(f"{self.root}/{shard.name}: its SHA-256 is not the one of the index: pack or copy it again")

    def _range(self, name: str, offset: int, size: int) -> bytes:
        def ask() -> bytes:
            data = self._fs.cat_file(f"{self._path}/{name}", start=offset, end=offset + size)
            if len(data) != size:
                raise OSError(f"{len(data)} of {size} bytes came")
            return data

        try:
            return self._try(name, ask)
        except FileNotFoundError:
            raise DataError(f"{self.root}/{name}: is not there any more: no image was noted as bad") from None

    def _try(self, name: str, call: Callable[[], T]) -> T:
        """`call()`, again and again while it fails; FileNotFoundError at once, DataError at the end of patience."""
        began, wait = time.monotonic(), FIRST_WAIT
        while True:
            try:
                return call()
            except FileNotFoundError:
                raise
            except Exception as error:
                if isinstance(error, PermissionError) or time.monotonic() + wait - began > self._fetching.patience:
                    seconds = time.monotonic() - began
                    raise DataError(
                        f"{self.root}/{name}: {_cause(error)}, for {seconds:.0f} s: no image was noted as bad; "
                        f"repeat the command with --resume when the server is back"
                    ) from None
            # Not all ranks at once.
            time.sleep(wait * (0.5 + os.urandom(1)[0] / 256))
            wait = min(2 * wait, LONGEST_WAIT)

    def _from_index(self) -> list[Shard]:
        if self._named:
            return []
        data = self.small_file(INDEX)
        return [] if data is None else read_index(data, f"{self.root}/{INDEX}")

    def _from_list(self) -> list[Shard]:
        answer: dict[str, dict[str, Any]] = {name: {} for name in self._named} or self._try("", self._names)
        if not answer:
            raise DataError(f"{self.root}: no {ENDING} files there", exit_code=2)
        unknown = [name for name, facts in answer.items() if facts.get("size") is None]
        with ThreadPoolExecutor(LOOKERS) as pool:
            answers = dict(zip(unknown, pool.map(self._asked_for, unknown), strict=True))
        return [answers.get(name) or Shard(name, int(facts["size"]), _stamp(facts)) for name, facts in answer.items()]

    def _names(self) -> dict[str, dict[str, Any]]:
        """What a list of the folder tells of each shard, by name."""
        begin = self._path.rstrip("/") + "/"
        answer = {str(path): facts for path, facts in self._fs.find(self._path, detail=True).items()}
        return {path.removeprefix(begin): answer[path] for path in sorted(answer) if path.endswith(ENDING)}

    def _asked_for(self, name: str) -> Shard:
        def ask() -> Shard:
            facts = self._fs.info(f"{self._path}/{name}")
            if facts.get("size") is None:
                raise OSError("the server does not say how large it is")
            return Shard(name, int(facts["size"]), _stamp(facts))

        try:
            return self._try(name, ask)
        except FileNotFoundError:
            raise DataError(f"{self.root}/{name}: no such shard", exit_code=2) from None


def _stamp(facts: dict[str, Any]) -> str:
    names = ("ETag", "etag", "md5Hash", "blob_id", "LastModified", "Last-Modified", "updated", "mtime", "created")
    return next((str(facts[name]) for name in names if facts.get(name)), "")


def _filesystem(url: str) -> tuple[Any, str]:
    scheme = url.split("://", 1)[0]
    package = BACKENDS.get(scheme, scheme)
    try:
        import fsspec

        options: dict[str, Any] = {}
        if scheme in ("http", "https"):
            import aiohttp

            options["client_kwargs"] = {
                "timeout": aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=SILENCE)
            }
        return fsspec.core.url_to_fs(url, use_listings_cache=False, **options)
    except (ImportError, ValueError) as error:
        what = f"{scheme}:// needs fsspec and {package}: pip install -c constraints.txt -e '.[remote]'"
        raise DataError(f"{what} ({error})", exit_code=2) from None


def _cause(error: Exception) -> str:
    # The text of some errors holds signed URLs and headers: a status or the kind of the error tells enough.
    status = getattr(error, "status", None)
    if status is not None:
        return f"the server answers {status}"
    text = getattr(error, "strerror", None) or (str(error) if type(error) is OSError else "")
    return f"{type(error).__name__}" + (f" ({text})" if text and "://" not in text else "")
