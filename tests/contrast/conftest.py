"""Batches of random crops, made by hand from the plan, without images or threads; and each way to update."""

import importlib.util
import sys
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from fastmoco.data.plan import FLIP, GRAY, ORDER, SIGMA, Plan, route
from fastmoco.kernels import convolution
from fastmoco.recipe import Recipe

IMAGES = 48


def crops_of(recipe: Recipe, images: int = IMAGES) -> np.ndarray:
    """Two uint8 crops of each image [images, 2, S, S, 3]: smooth colours, unlike each other, the views alike."""
    random = np.random.default_rng(1)
    coarse = random.integers(0, 256, (images, 1, 4, 4, 3)) + random.integers(-20, 21, (images, 2, 4, 4, 3))
    repeat = -(-recipe.crop_size // 4)
    fine = coarse.repeat(repeat, 2).repeat(repeat, 3)[:, :, : recipe.crop_size, : recipe.crop_size]
    return np.clip(fine, 0, 255).astype(np.uint8)


def flips_only(plan: Plan, epoch: int, samples: np.ndarray, view: int) -> np.ndarray:
    """The plan's photometric parameters, less all but the flip."""
    parameters = plan.photometric(epoch, samples, view)
    parameters[:, [GRAY, SIGMA]], parameters[:, ORDER] = 0, -1
    assert set(np.unique(parameters[:, FLIP])) <= {0.0, 1.0}
    return parameters


def batch_of(recipe: Recipe, step: int, world: int = 1, rank: int = 0, shuffles: list | None = None) -> SimpleNamespace:
    """What the loader would give `rank` of `world` for `step`; `shuffles` replaces the plan's permutations."""
    plan = Plan(recipe, np.full((IMAGES, 2), 64, np.int32), world, rank)
    crops, samples, epoch = crops_of(recipe), plan.samples(step), plan.epoch(step)
    if shuffles is None:
        shuffles = [plan.shuffle(step, view) for view in plan.key_views]
    way = route(shuffles, world, rank)
    mine = samples[rank * plan.per_rank : (rank + 1) * plan.per_rank]
    keys = [(samples[slot], plan.key_views[view]) for slot, view in zip(way.slots, way.views, strict=True)]
    queries = [(sample, view) for view in plan.query_views for sample in mine]

    def gather(pairs: list) -> tuple[torch.Tensor, torch.Tensor]:
        if not pairs:
            return torch.empty(0, *crops.shape[2:], dtype=torch.uint8), torch.empty(0, 8)
        parameters = [flips_only(plan, epoch, np.array([sample]), view) for sample, view in pairs]
        return (
            torch.from_numpy(np.stack([crops[sample, view] for sample, view in pairs])),
            torch.from_numpy(np.concatenate(parameters)),
        )

    query_crops, query_parameters = gather(queries)
    key_crops, key_parameters = gather(keys)
    return SimpleNamespace(
        step=step,
        epoch=epoch,
        sample=mine,
        query_crops=query_crops,
        query_parameters=query_parameters,
        key_crops=key_crops,
        key_parameters=key_parameters,
        key_rows=torch.from_numpy(way.key_rows),
        unshuffle=torch.from_numpy(way.unshuffle),
        origins=torch.from_numpy(mine),
    )


@pytest.fixture
def make_batch() -> Callable[..., SimpleNamespace]:
    return batch_of


@pytest.fixture
def make_crops() -> Callable[..., np.ndarray]:
    return crops_of


@pytest.fixture(params=["fused", "torch", "apex"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each way to update; apex by a stand-in with its interface, where it is not installed."""
    if request.param == "apex" and importlib.util.find_spec("amp_C") is None:
        for name, module in fake_apex().items():
            monkeypatch.setitem(sys.modules, name, module)
    return request.param


def fake_apex() -> dict[str, SimpleNamespace]:
    """What we use of apex, in plain torch: a fused SGD, and lists of tensors for out = a x + b y."""

    def multi_tensor_axpby(overflow: Tensor, lists: list[list[Tensor]], a: float, b: float, check: int) -> None:
        assert check == -1 and overflow.dtype == torch.int32
        for x, y, out in zip(*lists, strict=True):
            out.copy_(a * x + b * y)

    class FusedSGD(torch.optim.SGD):
        def step(self) -> None:
            assert isinstance(self.param_groups[0]["lr"], float)
            assert {p.dtype for p in self.param_groups[0]["params"]} == {torch.float32}  # it skips bf16 silently
            super().step()

    applier = SimpleNamespace(multi_tensor_applier=lambda operation, overflow, *rest: operation(overflow, *rest))
    return {
        "apex": SimpleNamespace(),
        "apex.optimizers": SimpleNamespace(FusedSGD=FusedSGD),
        "apex.multi_tensor_apply": applier,
        "amp_C": SimpleNamespace(multi_tensor_axpby=multi_tensor_axpby),
    }


@pytest.fixture
def by_winograd(monkeypatch: pytest.MonkeyPatch):
    """Every 3x3 convolution of stride 1 by Winograd's algorithm, of whole columns of 16 channels, on any CPU."""
    pytest.importorskip("numba")

    def whole_columns(layer: convolution.Layer, *_: object) -> bool:
        return layer[2:5] == (3, 1, 1) and layer.inputs % 16 == layer.outputs % 16 == 0

    monkeypatch.setattr(convolution, "_by_winograd", whole_columns)
    convolution._ways.cache_clear()
    yield
    convolution._ways.cache_clear()
