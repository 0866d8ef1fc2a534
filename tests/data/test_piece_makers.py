"""Shards that are read by several processes give what one process finds, and what goes wrong is told in one line."""

from __future__ import annotations

import os
import signal
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from fastmoco.data import piece_makers, pieces, shard_set
from fastmoco.data.errors import DataError
from fastmoco.data.manifest import scan
from fastmoco.data.piece_makers import Makers, Task
from fastmoco.recipe import MOST_PIXELS


@pytest.fixture
def tars(photo_folder: Path, tmp_path: Path) -> list[Path]:
    """The photographs in three archives, and a fourth that is none."""
    paths = sorted(photo_folder.iterdir())
    for number in range(3):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as archive:
            for path in paths[number::3]:
                archive.add(path, f"class {number}/{path.name}")
    (tmp_path / "3.tar").write_bytes(b"no archive" * 100)
    return [tmp_path / f"{number}.tar" for number in range(4)]


def task(tar: Path) -> Task:
    return Task(str(tar), f"s3://bucket/{tar.name}", MOST_PIXELS, f"{tar}.npz", "1")


def test_children_find_what_this_process_finds(tars: list[Path]) -> None:
    with Makers(2) as makers, ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(makers.make, task(tar)) for tar in tars for _ in range(2)]
        told = {str(future.exception()) for future in futures if future.exception()}
    (reason,) = told
    assert reason.startswith("s3://bucket/3.tar: is no tar") and "\n" not in reason
    for tar in tars[:3]:
        made, own = pieces.load(Path(f"{tar}.npz"), "1", MOST_PIXELS), pieces.read(str(tar), tar.name, MOST_PIXELS)
        assert made is not None and made.digest() == own.digest() and made.left_out == own.left_out
    with Makers(0) as makers, pytest.raises(DataError, match="s3://bucket/3.tar: is no tar"):
        makers.make(task(tars[3]))


def test_a_child_that_dies_costs_one_line_and_another_goes_on(tars: list[Path], tmp_path: Path) -> None:
    with Makers(1) as makers:
        makers.make(task(tars[0]))
        os.kill(makers._children[0].pid, signal.SIGKILL)
        with pytest.raises(DataError, match=r"s3://bucket/1.tar: the process that read it ended with SIGKILL"):
            makers.make(task(tars[1]))
        makers.make(task(tars[2]))
        with pytest.raises(DataError, match="cannot be written"):
            makers.make(task(tars[2])._replace(target=str(tars[0] / "below a file.npz")))
    assert all(child.poll() is not None for child in makers._children) and not Path(f"{tars[1]}.npz").exists()


def test_a_large_set_is_read_by_several_processes(
    tars: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tars.pop().unlink()
    monkeypatch.setattr(shard_set, "LARGE_BYTES", 0)
    alone = scan(tmp_path, cache=False)
    monkeypatch.setattr(shard_set, "MANY_BYTES", 0)
    monkeypatch.setattr(piece_makers, "make", lambda _: pytest.fail("a shard was read by this process"))
    several = scan(tmp_path, cache=False)
    assert several.paths == alone.paths and several.labels.tolist() == alone.labels.tolist() and len(alone) == 104
    np.testing.assert_array_equal(several.sizes, alone.sizes)
