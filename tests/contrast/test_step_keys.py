"""The step with keys encoded forward only: the same training, and the queries' path as it was."""

from collections.abc import Callable

import pytest
import torch

import fastmoco.contrast.queue as queue_module
import fastmoco.contrast.step as step_module
from fastmoco.contrast.step import Step
from fastmoco.encoder import BatchNormAct, forward_only
from fastmoco.kernels import reference
from fastmoco.parallel import Parallel
from fastmoco.recipe import Recipe

RECIPE = Recipe(
    arch="resnet50", width=0.125, stem="cifar", dim=16, batch_size=16, bn_group=4, crop_size=12, queue_size=40,
    temperature=0.2,
)  # fmt: skip


def test_keys_forward_only_change_nothing_but_rounding(make_batch: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, where what is left of a rounding is far below any other difference; on the keys' side alone."""
    monkeypatch.setattr(BatchNormAct, "impl", "reference")
    monkeypatch.setattr(step_module, "info_nce", reference.info_nce)  # the twins do not refuse float64
    monkeypatch.setattr(queue_module, "enqueue", reference.enqueue)
    taken, path = [], forward_only.bottleneck
    monkeypatch.setattr(forward_only, "bottleneck", lambda block, x: (taken.append(block), path(block, x))[1])
    plain, ours = (Step(RECIPE, Parallel(), "fp64", encoder=encoder) for encoder in ("fused", "fused-key"))
    for i in range(2):
        expected, found = (step.step(make_batch(RECIPE, i), 0.03).loss for step in (plain, ours))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    assert len(taken) == 2 * 16 and set(taken) <= set(ours.encoder_k.modules())
    for name, value in plain.state().items():
        torch.testing.assert_close(ours.state()[name], value, rtol=1e-7, atol=1e-9, msg=name)
