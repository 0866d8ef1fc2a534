"""What saving costs a run and how long resuming takes, at the published size: ResNet-50, 65,536 keys."""

import os
import statistics
import time
from pathlib import Path

import pytest
import torch

from fastmoco.contrast.step import Step
from fastmoco.options import Options
from fastmoco.parallel import Parallel
from fastmoco.presets import PRESETS
from fastmoco.runs import checkpoint
from fastmoco.train.saver import Saver

V2 = PRESETS["v2"][1]
META = {"recipe": V2.as_dict(), "precision": "fp32"}
ROUNDS = 5
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def step() -> Step:
    return Step(V2, Parallel(), "fp32")


def test_saving_costs_less_than_two_percent_at_the_default_interval(step, tmp_path):
    """An upper bound: as if training stood still from the copy to the last sync. The copy alone is what stops it."""
    saver = Saver(tmp_path, 2, 0, print)
    copies, whole = [], []
    for number in range(1, ROUNDS + 1):
        began = time.perf_counter()
        saver.start(number, step.state(), META)
        copies.append(time.perf_counter() - began)
        saver.finish()
        whole.append(time.perf_counter() - began)
    saver.close()
    share = max(whole) / (60 * Options().save_minutes)
    print(
        f"{megabytes(checkpoint.latest(tmp_path)):.0f} MB: copy {spread(copies)}, written {spread(whole)}, "
        f"at most {100 * share:.2f} % of the default interval"
    )
    assert share < 0.02


def megabytes(path: Path) -> float:
    return sum(file.stat().st_size for file in path.iterdir()) / 1e6


def spread(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.2f} s (at most {max(seconds):.2f})"


def forget(path: Path) -> None:
    """Take the files of a checkpoint out of the page cache, as after a night or on another machine."""
    for file in path.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.mark.parametrize("cache", ["warm", "cold"])
def test_a_resnet50_run_resumes_in_five_seconds(cache, step, tmp_path):
    """Find the newest, hash every byte, read it, take it over: all that stands between a new process and its run."""
    expected = {name: value.clone() for name, value in step.state().items()}
    folder = checkpoint.save(tmp_path, 1, expected, META)
    parts: dict[str, list[float]] = {"verify": [], "read": [], "take over": [], "resume": []}
    for _ in range(ROUNDS):
        for value in step.state().values():
            value.zero_()
        if cache == "cold":
            forget(folder)
        clocks = [time.perf_counter()]
        path = checkpoint.latest(tmp_path)
        clocks.append(time.perf_counter())
        content = checkpoint.load(path, verified=True)
        clocks.append(time.perf_counter())
        step.load(content.state)
        clocks.append(time.perf_counter())
        for part, begin, end in zip(parts, (*clocks[:3], clocks[0]), (*clocks[1:], clocks[3]), strict=True):
            parts[part].append(end - begin)
        assert all(torch.equal(value, expected[name]) for name, value in step.state().items())
    print(
        f"{cache} cache, {megabytes(folder):.0f} MB: "
        + ", ".join(f"{part} {spread(seconds)}" for part, seconds in parts.items())
    )
    assert statistics.median(parts["resume"]) < 5
