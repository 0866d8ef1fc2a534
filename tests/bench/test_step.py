"""The step's benchmark times the step that trains, against bounds in the right order."""

import dataclasses

import pytest
import torch

from fastmoco.bench import step
from fastmoco.bench.timing import Machine
from fastmoco.recipe import PRESETS

CPU = torch.device("cpu")
V2 = PRESETS["v2"][1]
SMALL = dataclasses.replace(V2, arch="resnet18", width=0.125, batch_size=32, crop_size=16, queue_size=100)


def test_every_provider_runs_also_where_the_queue_is_no_multiple_of_the_batch():
    for name, provider in step.providers(SMALL, CPU).items():
        call = provider.start()
        call(), call()
        assert provider.precision in name


def test_the_bound_of_an_h100_is_the_known_one():
    assert step.pairs_bound(V2, Machine("h100", 3e12, 790e12), 2) == pytest.approx(6024, rel=1e-3)
    assert step.pairs_bound(V2, Machine("h100", 3e12, 790e12), 4) < 3200
    assert step.pairs_bound(V2, Machine("h100", 3e12, 790e12), 2, "key") == pytest.approx(6383, rel=1e-3)
    assert step.flops_bound(V2, Machine("h100", 3e12, 790e12)) == pytest.approx(24337, rel=1e-3)


def test_a_gpu_has_the_published_step_in_every_form_and_ours_by_backend():
    names = set(step.providers(SMALL, torch.device("cuda", 0)))
    assert {"published tf32", "published fp16 autocast", "channels-last fp16 autocast"} <= names
    assert {"compiled channels-last fp16 autocast", "published bf16 autocast", "fastmoco bf16"} <= names
    encoders = ("eager encoder", "compiled encoder", "fused key encoder")
    assert {f"fastmoco bf16, {how}" for how in ("no graph", *encoders)} <= names
