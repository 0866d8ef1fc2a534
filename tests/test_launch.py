"""The launcher with two real processes: same result, same checkpoints, same exit codes."""

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
SMALL = "--width 0.125 --batch-size 32 --bn-group 8 --queue-size 100 --crop-size 16 --log-every 2 --no-knn --device cpu"
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
    for name, ranks in (("one", "1"), ("two", "2")):
        finish(start(folder, "--nproc", ranks, "pretrain", "demo", "--data", "images", "--stop-after", "6", "--out", name))
    one, two = (checkpoint.load(checkpoint.latest(folder / name)).state for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name].float(), value.float(), rtol=0, atol=2e-3, msg=lambda m: f"{name}: {m}")
    logs = [read_lines(folder / name / "log.jsonl") for name in ("one", "two")]
    assert [line["step"] for line in logs[0]] == [line["step"] for line in logs[1]] == [2, 4, 6]
    for line, other in zip(*logs):
        assert abs(line["loss"] - other["loss"]) < 1e-3
    assert json.loads((folder / "two/recipe.json").read_text())["ranks"] == 2


def test_a_signal_to_the_launcher_stops_all_ranks_at_one_step(folder):
    process = start(folder, "--nproc", "2", "pretrain", "demo", "--data", "images", "--epochs", "1000", "--out", "run")
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
    finish(start(folder, "--nproc", "2", "pretrain", "demo", "--data", "images", "--resume", "--out", "run", "--epochs", "1000",
                 "--stop-after", str(step + 2)))  # fmt: skip
    assert checkpoint.load(checkpoint.latest(folder / "run")).step == step + 2


def test_a_mistake_that_the_ranks_find_is_said_once_and_exits_2(folder):
    (folder / "empty").mkdir()
    process = start(folder, "--nproc", "2", "pretrain", "demo", "--data", "empty", "--out", "run")
    said = process.communicate(timeout=200)[0]
    assert process.returncode == 2, said
    assert said.count("no images in it") >= 1 and not (folder / "run").exists()
