"""Times a CPU decides, as pytest-benchmark entries (--benchmark-enable): starting the command line, checkpoints."""

import dataclasses
import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from fastmoco.contrast.step import Step
from fastmoco.parallel import Parallel
from fastmoco.presets import PRESETS
from fastmoco.runs import checkpoint


@pytest.mark.parametrize("words", ["--help", "pretrain v2 --help", "bench --help"])
def test_benchmark_of_the_command_line(benchmark, words):
    command = [sys.executable, "-m", "fastmoco", *words.split()]
    result = benchmark(lambda: subprocess.run(command, capture_output=True, check=True))
    assert b"usage" in result.stdout


@pytest.fixture(scope="module")
def state():
    recipe = dataclasses.replace(PRESETS["v2"][1], arch="resnet18", queue_size=4096)
    return Step(recipe, Parallel()).state(), {"recipe": recipe.as_dict(), "precision": "fp32"}


def test_benchmark_of_saving(benchmark, state, tmp_path):
    steps = itertools.count(1)
    benchmark(lambda: checkpoint.save(tmp_path, next(steps), *state, keep=2))
    assert checkpoint.latest(tmp_path) is not None


def test_benchmark_of_loading(benchmark, state, tmp_path):
    checkpoint.save(tmp_path, 7, *state, keep=2)
    path: Path = checkpoint.latest(tmp_path)
    assert benchmark(lambda: checkpoint.load(path)).step == 7
