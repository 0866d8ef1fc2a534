"""A small run with a past: every tensor of its checkpoint is unlike its start."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastmoco.contrast.step import Step
from fastmoco.parallel import Parallel
from fastmoco.presets import PRESETS
from fastmoco.recipe import Recipe
from fastmoco.runs import checkpoint


def tiny(head: str = "mlp", **changes) -> Recipe:
    preset = "v2" if head == "mlp" else "v1"
    small = {
        "arch": "resnet18",
        "width": 0.125,
        "stem": "cifar",
        "dim": 16,
        "queue_size": 20,
        "batch_size": 8,
        "bn_group": 4,
        "crop_size": 12,
        "epochs": 4,
    }
    return replace(PRESETS[preset][1], **{**small, **changes})


def write_run(out: Path, recipe: Recipe, step: int = 7, queue_dtype: torch.dtype = torch.float32) -> dict:
    """A run in `out` whose checkpoint holds random but valid tensors; returns them."""
    generator = torch.Generator().manual_seed(5)
    state = {}
    for name, value in Step(recipe, Parallel(), "fp32").state().items():
        if value.is_floating_point():
            value = torch.rand(value.shape, generator=generator) + 0.1
        state[name] = value.to(queue_dtype) if name == "queue" else value.clone()
    state["queue"] = torch.nn.functional.normalize(state["queue"].float(), dim=1).to(queue_dtype)
    state["queue_pointer"].fill_(step * recipe.batch_size % recipe.queue_size)
    state["queue_count"].fill_(step * recipe.batch_size)
    for name in state:
        if name.endswith("num_batches_tracked"):
            state[name].fill_(step)
    out.mkdir(parents=True)
    checkpoint.save(out, step, state, {"recipe": recipe.as_dict(), "precision": "fp32"})
    facts = {
        "preset": "custom",
        "recipe": recipe.as_dict(),
        "options": {"data": "/data/flowers", "val": None},
        "steps": 5 * recipe.epochs,
        "images": 43,
        "device": "CPU",
        "versions": {"torch": "2.13"},
    }
    (out / "recipe.json").write_text(json.dumps(facts))
    return state


@pytest.fixture
def make_run():
    """make_run(folder, recipe, step, queue_dtype): a run, and the tensors of its checkpoint."""
    return write_run


@pytest.fixture
def make_recipe():
    """make_recipe(head, **changes): a recipe that runs in a moment."""
    return tiny
