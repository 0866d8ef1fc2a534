"""Shards on a local disk: within their limit, whole or not at all, and fetched once by all processes together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pytest

from fastmoco.data import shard_cache
from fastmoco.data.errors import DataError
from fastmoco.data.shard_cache import ShardCache

SIZE = 1000


def filled_with(key: str, asked: list[str] | None = None) -> Callable[[BinaryIO], None]:
    def fetch(file: BinaryIO) -> None:
        if asked is not None:
            asked.append(key)
        file.write(key.encode() * (SIZE // len(key)))

    return fetch


def test_a_shard_is_fetched_once_and_read_from_then_on(tmp_path: Path) -> None:
    cache, asked = ShardCache(tmp_path, 10 * SIZE), []
    assert cache.read("ab", SIZE, 0, 4) is None
    for _ in range(3):
        assert cache.get("ab", SIZE, filled_with("ab", asked)).stat().st_size == SIZE
    assert asked == ["ab"] and cache.read("ab", SIZE, 1, 4).tobytes() == b"baba"
    assert cache.read("ab", SIZE + 1, 0, 4) is None  # of another size: what is there is not what is meant


def test_the_limit_holds_and_who_was_used_last_stays(tmp_path: Path) -> None:
    cache, asked = ShardCache(tmp_path, 3 * SIZE), []
    for time, key in enumerate(["aa", "bb", "cc"]):
        os.utime(cache.get(key, SIZE, filled_with(key, asked)), (time, time))
    reader = (tmp_path / "bb").open("rb")
    cache.get("aa", SIZE, filled_with("aa", asked))  # used again
    cache.get("dd", SIZE, filled_with("dd", asked))
    assert cache.used() == 3 * SIZE and cache.read("bb", SIZE, 0, 2) is None
    assert cache.read("aa", SIZE, 0, 2) is not None and asked == ["aa", "bb", "cc", "dd"]
    assert reader.read() == b"b" * SIZE  # who reads it goes on
    reader.close()
    with pytest.raises(DataError, match="a shard of 4e-06 GB does not fit the cache.*--cache-gb"):
        cache.get("ee", 4 * SIZE, filled_with("ee"))


def test_a_shard_that_is_read_from_end_to_end_is_not_removed_meanwhile(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 2 * SIZE)
    with cache.held("aa", SIZE, filled_with("aa")) as path:
        for key in ("bb", "cc"):
            cache.get(key, SIZE, filled_with(key))
        assert path.read_bytes() == b"aa" * 500 and cache.used() == 2 * SIZE
    cache.get("dd", SIZE, filled_with("dd"))  # the control: nobody needs it any more, and it is the oldest
    assert not path.exists()


def test_bytes_are_on_the_disk_before_a_shard_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part has its length from the first: after a loss of power the file would look whole."""
    seen = []
    monkeypatch.setattr(shard_cache.atomic, "sync", lambda path: seen.append((path.read_bytes(), path.name)))
    path = ShardCache(tmp_path, 2 * SIZE).get("aa", SIZE, filled_with("aa"))
    assert seen == [(b"aa" * 500, "aa.part")] and path.read_bytes() == b"aa" * 500


def test_what_comes_cut_short_or_fails_is_not_kept(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 10 * SIZE)
    with pytest.raises(DataError, match="5 of 1000 bytes came"):
        cache.get("ab", SIZE, lambda file: file.write(b"12345") and None)
    with pytest.raises(OSError):
        cache.get("ab", SIZE, lambda _: (_ for _ in ()).throw(OSError()))
    assert cache.read("ab", SIZE, 0, 1) is None
    assert cache.get("ab", SIZE, filled_with("ab")).read_bytes() == b"ab" * 500


PROGRAM = """
import sys, time
from pathlib import Path
from fastmoco.data.shard_cache import ShardCache
folder, log, wait = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
def fetch(key):
    def write(file):
        with log.open("a") as lines:
            lines.write(key + "\\n")
        file.write(b"x" * 500)
        file.flush()
        time.sleep(wait)
        file.write(b"y" * 500)
    return write
for number in range(8):
    key = f"k{number}"
    assert ShardCache(folder, 5000).get(key, 1000, fetch(key)).read_bytes() == b"x" * 500 + b"y" * 500
"""


def start(folder: Path, log: Path, wait: float) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", PROGRAM, str(folder), str(log), str(wait)])


def test_two_runs_at_once_fetch_a_shard_once_and_stay_within_the_limit(tmp_path: Path) -> None:
    folder, log = tmp_path / "kept", tmp_path / "log"
    runs = [start(folder, log, 0.05) for _ in range(2)]
    assert [run.wait(60) for run in runs] == [0, 0]
    assert log.read_text().split().count("k0") == 1 and len(log.read_text().split()) < 16
    assert ShardCache(folder, 5000).used() <= 5000


def test_a_killed_run_leaves_nothing_that_another_takes_for_a_shard(tmp_path: Path) -> None:
    folder, log = tmp_path / "kept", tmp_path / "log"
    run = start(folder, log, 60)
    while not log.exists() or not list(folder.glob("*.part")):
        assert run.poll() is None
    run.send_signal(signal.SIGKILL)
    run.wait()
    cache = ShardCache(folder, 2000)
    assert cache.read("k0", 1000, 0, 1) is None
    cache.get("zz", 1000, filled_with("zz"))  # what the killed one left takes no room for ever
    assert not list(folder.glob("*.part")) and start(folder, log, 0).wait(60) == 0
