"""A loader that runs for long grows nowhere, and a run that is interrupted leaves nothing running."""

from __future__ import annotations

import dataclasses
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastmoco.data import files, manifest
from fastmoco.data.loader import Loader, Loading
from fastmoco.data.manifest import Manifest, scan
from fastmoco.data.plan import Plan
from fastmoco.data.probe import Header
from fastmoco.presets import PRESETS

RECIPE = dataclasses.replace(PRESETS["v2"][1], batch_size=32, bn_group=4, crop_size=16)
IMAGENET = 1_281_167
MIB = 2**20


def descriptors(besides: Path) -> int:
    """Open files of this process, but for those the readers are reading just now."""
    links = (Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd"))
    return sum(link.is_symlink() and not str(link.resolve()).startswith(str(besides)) for link in links)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_3000_batches_grow_nothing(tmp_path: Path, write_set: Callable[[Path, int], dict[str, str]]) -> None:
    for name in write_set(tmp_path / "data", 200).values():
        (tmp_path / "data" / name).unlink()
    images = scan(tmp_path / "data", cache=False)
    place = SimpleNamespace(rank=0, world=1, device=torch.device("cpu"))
    records = []
    # It goes on behind the last figure: a loader that has made its last batch ends its threads.
    with Loader(images, Plan(RECIPE, images.sizes), place, range(4000), Loading(threads=1)) as loader:
        for batch in itertools.islice(loader, 3000):
            if batch.step % 100 == 99:
                records.append((resident(), descriptors(tmp_path), threading.active_count()))
    memory, files, threads = (np.array(column) for column in zip(*records, strict=True))
    print(f"memory {memory[4] / MIB:.1f} to {memory[-1] / MIB:.1f} MiB")
    # One more may be open at the moment of looking, so the fewest of many looks are compared.
    assert len(records) == 30 and files[-10:].min() <= files[4:14].min() and len(set(threads[4:])) == 1
    assert memory[5:].max() <= 1.02 * memory[4]


ENDS = {0: "done: ", 143: "asked to stop: saved after step", 130: "", -signal.SIGINT: ""}
"""Exit codes of an interrupted run and what it says last: too late to stop, stopped and saved, nothing to save."""


def command(data: Path, out: Path) -> list[str]:
    flags = {
        "data": data,
        "out": out,
        "device": "cpu",
        "threads": 1,
        "width": 0.125,
        "crop-size": 16,
        "epochs": 4,
        "batch-size": 32,
        "bn-group": 8,
        "queue-size": 64,
    }
    words = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    return [sys.executable, "-m", "fastmoco", "pretrain", "demo", "--no-knn", *words]


def start(data: Path, out: Path) -> subprocess.Popen:
    scratch = data.parent / "scratch"
    scratch.mkdir(exist_ok=True)
    here = {"OMP_NUM_THREADS": "1", "TMPDIR": str(scratch), "XDG_CACHE_HOME": str(data.parent / "cache")}
    # A shell's background jobs ignore SIGINT, and so would what they start.
    restore = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(
        command(data, out),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | here,
        preexec_fn=restore,
    )


def left_behind(process: subprocess.Popen, scratch: Path) -> list[str]:
    """Processes of its session, shared memory and temporary files, but for a compiler's cache."""
    shared = [name for name in os.listdir("/dev/shm") if str(process.pid) in name]
    alive = [name for name in os.listdir("/proc") if name.isdigit() and session(name) == process.pid]
    return shared + alive + [name for name in os.listdir(scratch) if not name.startswith("torchinductor")]


def session(process: str) -> int:
    try:
        return os.getsid(int(process))
    except ProcessLookupError:
        return -1


@pytest.mark.slow
def test_ctrl_c_at_ten_random_moments_of_the_command_leaves_nothing(
    tmp_path: Path, write_set: Callable[[Path, int], dict[str, str]]
) -> None:
    for name in write_set(tmp_path / "data", 200).values():
        (tmp_path / "data" / name).unlink()
    began = time.monotonic()
    whole = start(tmp_path / "data", tmp_path / "whole")
    assert left_behind(whole, tmp_path / "scratch") == [str(whole.pid)]  # the control: it is seen while it runs
    assert "done: " in whole.communicate(timeout=120)[1] and whole.returncode == 0
    life, codes = time.monotonic() - began, []
    for number, share in enumerate(np.random.default_rng(0).uniform(size=10)):  # one in each tenth of its life
        process = start(tmp_path / "data", tmp_path / f"run{number}")
        try:
            time.sleep(life * (number + share) / 10)
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does; one that has ended waits to be collected
            _, output = process.communicate(timeout=60)
        finally:
            process.kill()
        codes.append(process.returncode)
        # While it reads its own first modules, before any of ours, Python itself ends with a stack.
        spilled = "Traceback" in output
        assert not spilled or "fastmoco/" not in output, (number, output)
        if not spilled:
            assert output.rstrip().split("\n")[-1].startswith(ENDS[process.returncode]), (number, output)
        assert left_behind(process, tmp_path / "scratch") == []
        assert not list((tmp_path / f"run{number}").rglob("*.writing"))
    assert {143, -signal.SIGINT} <= set(codes), codes


def listing(count: int) -> files.Files:
    table = files.Files("/data/train")
    classes = [f"n{number:08d}" for number in range(1000)]
    for number in range(count):
        label = classes[number % 1000]
        table.paths.append(f"{label}/{label}_{number:08d}.JPEG")
        table.labels.append(label)
        table.bytes.append(110_000 + number % 5000)
        table.times.append(1_600_000_000_000_000_000 + number)
    table.sort()
    return table


@pytest.mark.slow
@pytest.mark.parametrize("part", ["build", "restart", "plan"])
def test_benchmark_as_many_images_as_imagenet(
    tmp_path: Path, benchmark: Callable, growth: Callable, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """Building the manifest from a listing and cached headers, loading a run's copy, and planning the first batch."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(manifest, "find_sources", lambda *_: (listing(IMAGENET), []))
    monkeypatch.setattr(manifest, "with_members", lambda found, *_: found)
    monkeypatch.setattr(manifest, "probe", lambda *_: Header(375, 500))
    with growth() as growth_of:
        images = scan(tmp_path)  # headers and all, the cache still empty
    assert len(images) == IMAGENET and growth_of() < 1000 * MIB
    images.save(tmp_path / "images.npz")
    work = {
        "build": lambda: scan(tmp_path),
        "restart": lambda: Manifest.load(tmp_path / "images.npz", tmp_path),
        "plan": lambda: Plan(RECIPE, images.sizes).samples(0),
    }[part]
    with growth() as growth_of:
        work()
    assert growth_of() < 1000 * MIB
    benchmark.extra_info["megabytes"] = growth_of() / MIB
    benchmark.pedantic(work, rounds=3)
    seconds = benchmark.stats.stats.min if benchmark.stats else 0.0
    assert seconds < 30
