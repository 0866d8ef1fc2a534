"""The launcher with two real processes: the run of one, one common step at a signal, the exit codes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastmoco.train import checkpoint
from fastmoco.train.monitor import read_lines

ROOT = Path(__file__).parent.parent
SMALL = "--width 0.125 --batch-size 32 --bn-group 8 --queue-size 100 --crop-size 16 --no-knn --device cpu"
pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working folder with 128 noisy images in it."""
    (tmp_path / "images").mkdir()
    random = np.random.RandomState(0)
    for number in range(128):
        pixels = random.randint(0, 256, (5, 5, 3)).astype(np.uint8)
        Image.fromarray(pixels).resize((24, 24)).save(tmp_path / "images" / f"{number}.jpg")
    return tmp_path


def start(folder: Path, *argv: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, ROOT / "launch.py", *argv, *SMALL.split()], cwd=folder, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def finish(process: subprocess.Popen) -> str:
    said = process.communicate(timeout=240)[0]
    assert process.returncode == 0, said
    return said


def test_two_ranks_give_the_run_of_one(folder):
    """Up to rounding, which training amplifies: two steps are compared. A different seed is the control."""
    states = {}
    for name, ranks, seed in (("one", "1", "0"), ("two", "2", "0"), ("other", "1", "1")):
        flags = ("--data", "images", "--out", name, "--stop-after", "2", "--log-every", "1", "--seed", seed)
        finish(start(folder, "--nproc", ranks, "pretrain", "demo", *flags))
        states[name] = checkpoint.load(checkpoint.latest(folder / name)).state
    assert states["one"].keys() == states["two"].keys()
    for name, value in states["one"].items():
        torch.testing.assert_close(states["two"][name].float(), value.float(), rtol=0, atol=1e-4, msg=name)
    assert (states["one"]["queue"] - states["other"]["queue"]).abs().max() > 0.1
    one, two = (read_lines(folder / name / "log.jsonl") for name in ("one", "two"))
    assert [line["step"] for line in one] == [line["step"] for line in two] == [1, 2]
    assert all(abs(line["loss"] - other["loss"]) < 1e-5 for line, other in zip(one, two))
    assert json.loads((folder / "two/recipe.json").read_text())["ranks"] == 2


def test_a_signal_to_the_launcher_stops_all_ranks_at_one_step(folder):
    flags = ("--data", "images", "--epochs", "1000", "--log-every", "2", "--out", "run")
    process = start(folder, "--nproc", "2", "pretrain", "demo", *flags)
    log, began = folder / "run/log.jsonl", time.monotonic()
    while len(read_lines(log)) < 2:
        assert process.poll() is None and time.monotonic() - began < 200
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 143, said
    newest = checkpoint.latest(folder / "run")
    step = checkpoint.load(newest).step
    assert step == read_lines(log)[-1]["step"] and f"saved after step {step}" in said
    flags += ("--resume", "--stop-after", str(step + 2))
    finish(start(folder, "--nproc", "2", "pretrain", "demo", *flags))
    assert checkpoint.load(checkpoint.latest(folder / "run")).step == step + 2


def test_a_mistake_that_the_ranks_find_is_said_once_and_exits_2(folder):
    (folder / "empty").mkdir()
    process = start(folder, "--nproc", "2", "pretrain", "demo", "--data", "empty", "--out", "run")
    said = process.communicate(timeout=200)[0]
    assert process.returncode == 2, said
    assert said.count("no images in it") >= 1 and not (folder / "run").exists()
