"""What saving costs a run and how long resuming takes, at the published size: ResNet-50, 65,536 keys."""

import time

import pytest
import torch

from fastmoco.contrast.step import Step
from fastmoco.options import Options
from fastmoco.parallel import Parallel
from fastmoco.recipe import PRESETS
from fastmoco.train import checkpoint
from fastmoco.train.saver import Saver

V2 = PRESETS["v2"][1]
META = {"recipe": V2.as_dict(), "precision": "fp32"}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def step() -> Step:
    return Step(V2, Parallel(), "fp32")


def test_saving_costs_less_than_two_percent_at_the_default_interval(benchmark, step, tmp_path):
    """An upper bound: as if training stood still from the copy to the last sync. The copy alone is what stops it."""
    saver = Saver(tmp_path, 2, 0, print)
    steps, copies, whole = iter(range(1, 100)), [], []

    def save() -> None:
        began = time.perf_counter()
        saver.start(next(steps), step.state(), META)
        copies.append(time.perf_counter() - began)
        saver.finish()
        whole.append(time.perf_counter() - began)

    benchmark.pedantic(save, rounds=4, iterations=1)
    saver.close()
    interval = 60 * Options().save_minutes
    size = sum(file.stat().st_size for file in checkpoint.latest(tmp_path).iterdir())
    figures = {"MB": size / 1e6, "copy_s": min(copies), "whole_s": max(whole), "share": max(whole) / interval}
    benchmark.extra_info.update(figures)
    print(figures)
    assert max(whole) / interval < 0.02


def test_a_resnet50_run_resumes_in_five_seconds(benchmark, step, tmp_path):
    checkpoint.save(tmp_path, 1, step.state(), META)
    seconds = []

    def resume() -> None:
        began = time.perf_counter()
        path = checkpoint.latest(tmp_path)
        step.load(checkpoint.load(path, verified=True).state)
        seconds.append(time.perf_counter() - began)

    benchmark.pedantic(resume, rounds=3, iterations=1)
    print(seconds)
    assert min(seconds) < 5
    assert torch.equal(step.queue.keys, checkpoint.load(checkpoint.latest(tmp_path)).state["queue"])
