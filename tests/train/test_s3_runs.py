"""A run on shards in an object store, killed and resumed while requests fail, ends as one on a disk, and tells nobody
its credentials."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("s3fs")
pytest.importorskip("moto.server")

from data import test_s3
from data.test_s3 import SECRET, Store

from fastmoco.runs import checkpoint

store = test_s3.store
KEY = "AKIAEXAMPLE"


@pytest.fixture
def own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def shards(images: Path, tmp_path: Path) -> Path:
    """The training images of both classes, dealt out over five archives."""
    (tmp_path / "shards").mkdir()
    paths = sorted((images / "train").rglob("*.jpg"))
    for number in range(5):
        with tarfile.open(tmp_path / "shards" / f"{number}.tar", "w") as archive:
            for path in paths[number::5]:
                archive.add(path, path.relative_to(images / "train"))
    return tmp_path / "shards"


def run(flags: list[str], data: object, out: Path, *more: str, crash: str = "") -> int:
    """Exit code of `pretrain` in a process of its own, whose output goes to a file beside the run's folder."""
    command = [sys.executable, "-m", "fastmoco", "pretrain", "demo", "--out", str(out), "--device", "cpu", *more]
    if "--resume" not in more:
        command += ["--data", str(data), *flags, "--order", "windows", "--window-shards", "2"]
    command += ["--threads", "1", "--log-every", "1", "--save-every", "1", "--no-knn", "--stop-after", "8"]
    environment = os.environ | ({"FASTMOCO_CRASH_AT": crash} if crash else {})
    with out.with_suffix(".out").open("ab") as said:
        return subprocess.run(command, stdout=said, stderr=said, env=environment, timeout=200).returncode


def weights(out: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(checkpoint.latest(out)).state


def holding(folder: Path, *secrets: str) -> list[str]:
    """Files of a folder that hold one of `secrets`, also those that are archives of compressed ones."""
    found = []
    for path in sorted(each for each in folder.rglob("*") if each.is_file()):
        contents = [str(path).encode(), path.read_bytes()]
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                contents += [archive.read(name) for name in archive.namelist()]
        if any(secret.encode() in content for content in contents for secret in secrets):
            found.append(str(path.relative_to(folder)))
    return found


@pytest.mark.slow
def test_a_killed_run_on_an_object_store_goes_on_and_ends_as_one_on_a_disk(
    flags: list[str], store: Store, tmp_path: Path
) -> None:
    assert run(flags, store.shards, tmp_path / "near") == 0
    far, url = tmp_path / "far", "s3://bucket/set"
    store.fault = lambda number: "503 SlowDown" if number % 4 == 3 else ""
    assert run(flags, url, far, crash="latest set:2") == -9
    assert checkpoint.latest(far).name < checkpoint.latest(tmp_path / "near").name
    assert run(flags, url, far, "--resume") == 0
    one, other = weights(tmp_path / "near"), weights(far)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert store.asked.total() > 5 and holding(tmp_path, url)  # the control: what a run is given stands there
    assert holding(tmp_path, SECRET, KEY) == []


def test_a_secret_is_found_where_it_is_hidden(tmp_path: Path) -> None:
    """The control of the test above."""
    (tmp_path / "log").write_text(f"... {SECRET} ...")
    np.savez_compressed(tmp_path / "images.npz", root=np.frombuffer(SECRET.encode(), np.uint8))
    (tmp_path / "none").write_text(SECRET[:-1])
    assert SECRET.encode() not in (tmp_path / "images.npz").read_bytes()
    assert holding(tmp_path, SECRET) == ["images.npz", "log"]
