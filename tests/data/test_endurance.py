"""A loader that runs for long grows nowhere, and one that is interrupted leaves nothing running."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastmoco.data import files, manifest
from fastmoco.data.loader import Loader
from fastmoco.data.manifest import Manifest, scan
from fastmoco.data.plan import Plan
from fastmoco.recipe import PRESETS

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
    found = scan(tmp_path / "data", cache=False)
    place = SimpleNamespace(rank=0, world=1, device=torch.device("cpu"))
    seen = []
    with Loader(found, Plan(RECIPE, found.sizes), RECIPE, place, stop_step=3000, threads=1) as loader:
        for batch in loader:
            if batch.step % 100 == 99:
                seen.append((resident(), descriptors(tmp_path), threading.active_count()))
    memory, opened, threads = (np.array(column) for column in zip(*seen, strict=True))
    print(f"memory {memory[4] / MIB:.1f} to {memory[-1] / MIB:.1f} MiB")
    assert len(seen) == 30 and len(set(opened[4:])) == 1 and len(set(threads[4:])) == 1
    assert memory[5:].max() <= 1.02 * memory[4]


RUN = """
import dataclasses, signal, sys
from types import SimpleNamespace
import torch
from fastmoco.data.loader import Loader
from fastmoco.data.manifest import scan
from fastmoco.data.plan import Plan
from fastmoco.recipe import Recipe
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit it ignored
torch.set_num_threads(1)
manifest, recipe = scan(sys.argv[1], cache=False), Recipe(crop_size=16, batch_size=32)
alone = SimpleNamespace(rank=0, world=1, device=torch.device("cpu"))
print("ready", flush=True)
with Loader(manifest, Plan(recipe, manifest.sizes), recipe, alone, stop_step=1 << 30, threads=2) as loader:
    for batch in loader:
        pass
"""


@pytest.mark.slow
def test_interrupted_at_ten_random_moments_nothing_is_left(
    tmp_path: Path, write_set: Callable[[Path, int], dict[str, str]]
) -> None:
    for name in write_set(tmp_path / "data", 200).values():
        (tmp_path / "data" / name).unlink()
    moments = np.random.default_rng(0).uniform(0, 2.5, 10)
    for moment in moments:
        process = subprocess.Popen(
            [sys.executable, "-c", RUN, str(tmp_path / "data")], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, start_new_session=True,
        )  # fmt: skip
        try:
            assert process.stdout.readline() == "ready\n"
            time.sleep(moment)
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=20)  # negative control: a thread that is not joined would hang here
        finally:
            process.kill()
        assert process.returncode in (130, -signal.SIGINT), said
        assert said.count("Traceback") == 1 and said.rstrip().endswith("KeyboardInterrupt"), said
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)


def listing(count: int) -> files.Files:
    found = files.Files("/data/train")
    classes = [f"n{number:08d}" for number in range(1000)]
    for number in range(count):
        label = classes[number % 1000]
        found.paths.append(f"{label}/{label}_{number:08d}.JPEG")
        found.labels.append(label)
        found.bytes.append(110_000 + number % 5000)
        found.times.append(1_600_000_000_000_000_000 + number)
    found.sort()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("part", ["build", "restart", "plan"])
def test_benchmark_as_many_images_as_imagenet(
    tmp_path: Path, benchmark: Callable, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """Building the manifest from a listing and cached headers, loading a run's copy, and planning the first batch."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(manifest, "find_files", lambda *_: listing(IMAGENET))
    monkeypatch.setattr(manifest, "probe", lambda *_: (375, 500, ""))
    before = resident()
    found = scan(tmp_path)
    assert len(found) == IMAGENET and resident() - before < 1000 * MIB
    found.save(tmp_path / "images.npz")
    work = {
        "build": lambda: scan(tmp_path),
        "restart": lambda: Manifest.load(tmp_path / "images.npz", tmp_path),
        "plan": lambda: Plan(RECIPE, found.sizes).samples(0),
    }[part]
    benchmark.extra_info["megabytes"] = (resident() - before) / MIB
    benchmark.pedantic(work, rounds=3)
    seconds = benchmark.stats.stats.min if benchmark.stats else 0.0
    assert seconds < 30
