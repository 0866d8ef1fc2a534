"""The whole step on a CPU beside the published step, as pytest-benchmark entries (--benchmark-enable).

Ours starts from uint8 crops and augments them; the published step is given finished float views.
"""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from fastmoco.bench.baseline import PublishedStep
from fastmoco.contrast.step import Step
from fastmoco.parallel import Parallel
from fastmoco.presets import PRESETS
from fastmoco.recipe import Recipe

RECIPES = {
    "demo": replace(PRESETS["demo"][1], batch_size=32),
    "resnet50": replace(PRESETS["v2"][1], batch_size=32, queue_size=4096, crop_size=64),
}


def ours(recipe: Recipe, batch: SimpleNamespace) -> Callable[[], object]:
    step = Step(recipe, Parallel(), "fp32")
    return lambda: step.step(batch, 0.01).loss.item()


def published(recipe: Recipe, channels_last: bool) -> Callable[[], object]:
    step = PublishedStep(recipe, torch.device("cpu"), channels_last=channels_last)
    views = torch.randn(2, recipe.batch_size, 3, recipe.crop_size, recipe.crop_size)
    return lambda: step(*views)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("provider", ["published NCHW", "published channels-last", "fastmoco"])
def test_step(benchmark: Callable, name: str, provider: str, make_batch: Callable) -> None:
    recipe = RECIPES[name]
    benchmark.group = f"step {name}"
    if provider == "fastmoco":
        call = ours(recipe, make_batch(recipe, 0))
    else:
        call = published(recipe, channels_last=provider.endswith("channels-last"))
    assert torch.tensor(benchmark(call)).isfinite()
