"""Another way through a step, views of four channels: the same training, in float64."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from tiny import TINY

from fastmoco.contrast.step import Step
from fastmoco.encoder import BatchNormAct
from fastmoco.parallel import Parallel
from fastmoco.recipe import Recipe

RECIPE = Recipe(**TINY | {"arch": "resnet50"})


@pytest.fixture(autouse=True)
def twins(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64 what is left of a rounding is far below any other difference."""
    monkeypatch.setattr(BatchNormAct, "impl", "reference")


def assert_train_alike(plain: Step, other: Step, make_batch: Callable) -> None:
    for i in range(2):
        expected, actual = (step.step(make_batch(plain.recipe, i), 0.03).loss for step in (plain, other))
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=0)
    for name, value in plain.state().items():
        torch.testing.assert_close(other.state()[name], value, rtol=1e-7, atol=1e-9, msg=name)


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
def test_four_channels_change_nothing_but_rounding(stem: str, make_batch: Callable) -> None:
    recipe = replace(RECIPE, arch="resnet18", stem=stem, crop_size=32)
    three, four = (Step(recipe, Parallel(), "fp64", channels=channels) for channels in (3, 4))
    shapes = []
    four.encoder_q.register_forward_pre_hook(lambda _, views: shapes.append(views[0].shape[1]))
    assert_train_alike(three, four, make_batch)
    assert shapes == [4, 4]
