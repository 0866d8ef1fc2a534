"""LARS against its equation in float64, step by step; what is not finite; the step with it."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastmoco.contrast.backends import FusedUpdate
from fastmoco.contrast.lars import Lars
from fastmoco.contrast.step import Step
from fastmoco.contrast.update import PRECISIONS, Update
from fastmoco.encoder import Encoder, build_encoder
from fastmoco.parallel import Parallel
from fastmoco.recipe import Recipe

RECIPE = Recipe(
    arch="resnet18",
    width=0.125,
    stem="cifar",
    head="mlp",
    dim=16,
    precision="fp32",
    batch_size=8,
    bn_group=8,
    crop_size=12,
    queue_size=40,
    ema_momentum=0.9,
    weight_decay=0.05,
    optimizer="lars",
    lars_eta=0.02,
)
STEPS, LR = 10, 1.0
BOUND = {"rtol": 1e-5, "atol": 1e-6}
NO_WEIGHT, NO_GRADIENT = "fc.2.weight", "layer1.0.conv1.weight"


def make(precision: str, backend: str = "fused", recipe: Recipe = RECIPE) -> tuple[Encoder, Update]:
    encoder = build_encoder(recipe)
    update = Update(encoder, copy.deepcopy(encoder).requires_grad_(False), recipe, PRECISIONS[precision], backend)
    update.lr.fill_(LR)
    update.q[NO_WEIGHT].zero_()
    update.refresh()
    return encoder, update


def give_gradients(encoder: Encoder, seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    """What the parameters get, less the loss scale, in float64: between 1e-4 and 1 in size, and once all zero."""
    generator, gradients = torch.Generator().manual_seed(seed), {}
    for name, parameter in encoder.named_parameters():
        size = 10 ** -(4 * float(torch.rand((), generator=generator)))
        draws = torch.randn(parameter.shape, generator=generator) * size * (name != NO_GRADIENT)
        parameter.grad = torch.empty_like(parameter).copy_(draws * scale)
        gradients[name] = parameter.grad.double() / scale
    return gradients


class Equation:
    """Equation 6 in float64, a weight at a time. The controls leave out a part of it, by name."""

    def __init__(self, update: Update, without: str = "") -> None:
        self.q = {name: value.double() for name, value in update.q.items()}
        self.v = {name: torch.zeros_like(value) for name, value in self.q.items()}
        self.k = {name: value.double() for name, value in update.k.items()}
        self.without = without

    def advance(self, gradients: dict[str, Tensor]) -> None:
        for name, g in gradients.items():
            w = self.q[name]
            if w.dim() > 1:
                step = self.ratio(w, g) * (g + RECIPE.weight_decay * w)
            else:
                step = g + (RECIPE.weight_decay * w if self.without == "exception of vectors" else 0)
            self.v[name] = RECIPE.sgd_momentum * self.v[name] + step
            self.q[name] = w - LR * self.v[name]
            self.k[name] = RECIPE.ema_momentum * self.k[name] + (1 - RECIPE.ema_momentum) * self.q[name]

    def ratio(self, w: Tensor, g: Tensor) -> float:
        size, slope = math.sqrt(float((w * w).sum())), math.sqrt(float((g * g).sum()))
        if self.without == "trust" or size == 0 or slope == 0:
            return 1.0
        return RECIPE.lars_eta * size / (slope + (self.without != "decay") * RECIPE.weight_decay * size)

    def parts_from(self, update: Update) -> list[str]:
        """Names of the tensors that are not `update`'s within BOUND."""
        pairs = {"q": (update.q, self.q), "velocity": (update.velocity, self.v), "k": (update.k, self.k)}
        return [
            f"{kind}.{name}"
            for kind, (ours, theirs) in pairs.items()
            for name in theirs
            if not torch.allclose(ours[name].double(), theirs[name], **BOUND)
        ]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_ten_steps_follow_the_equation(precision: str, backend: str) -> None:
    encoder, update = make(precision, backend)
    equation = Equation(update)
    for seed in range(STEPS):
        scale = 1.0 if update.scale is None else 1024.0
        if update.scale is not None:
            update.scale.value.fill_(scale)
        equation.advance(give_gradients(encoder, seed, scale))
        assert bool(update.apply())
    assert equation.parts_from(update) == []
    for name, work in encoder.named_parameters():
        assert torch.equal(work, update.q[name].to(work.dtype)), name


@pytest.mark.parametrize("without", ["trust", "decay", "exception of vectors"])
def test_an_equation_that_lacks_a_part_is_noticed(without: str) -> None:
    """Controls of the test above: of 10 steps, 2 are enough."""
    encoder, update = make("fp32")
    equation = Equation(update, without)
    for seed in range(2):
        equation.advance(give_gradients(encoder, seed))
        assert bool(update.apply())
    vectors = [f"q.{name}" for name, value in update.q.items() if value.dim() == 1]
    wrong = equation.parts_from(update)
    if without == "exception of vectors":
        assert set(wrong) & set(vectors) and "q.conv1.weight" not in wrong
    else:
        assert "q.conv1.weight" in wrong and not set(wrong) & set(vectors)


def test_sgd_has_nothing_of_it() -> None:
    _, sgd = make("fp32", recipe=replace(RECIPE, optimizer="sgd"))
    assert isinstance(sgd._advance, FusedUpdate) and sgd._advance.recipe.weight_decay == 0.05
    assert isinstance(make("fp32")[1]._advance, Lars)


@pytest.mark.parametrize("poison", [math.inf, -math.inf, math.nan, 1e30])
@pytest.mark.parametrize("place", ["conv1.weight", "fc.2.bias"])
def test_one_bad_gradient_stops_the_whole_update(poison: float, place: str, backend: str) -> None:
    """1e30 is finite, but its square is not: in a matrix, where the ratio would hide it, it counts as diverged."""
    encoder, update = make("fp32", backend)
    give_gradients(encoder, 0)
    assert bool(update.apply())
    groups = (update.q, update.velocity, update.k)
    before = [{name: value.clone() for name, value in group.items()} for group in groups]
    give_gradients(encoder, 1)
    encoder.get_parameter(place).grad[3] = poison
    if poison == 1e30 and place == "fc.2.bias":
        assert bool(update.apply())
        return
    assert not bool(update.apply())
    for old, group in zip(before, groups, strict=True):
        assert all(torch.equal(old[name], value) for name, value in group.items())
    give_gradients(encoder, 2)
    assert bool(update.apply())
    assert not torch.equal(before[0]["conv1.weight"], update.q["conv1.weight"])


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_no_tensor_that_persists_moves(precision: str, make_batch: Callable) -> None:
    step = Step(RECIPE, Parallel(), precision)
    if step.update.scale is not None:
        step.update.scale.value.fill_(256)  # at the first scale these gradients overflow
    tensors = [*step.state().values(), *step.update._advance._grads]
    before, start = [value.data_ptr() for value in tensors], step.update.q["conv1.weight"].clone()
    for i in range(3):
        metrics = step.step(make_batch(RECIPE, i), LR)
    tensors = [*step.state().values(), *step.update._advance._grads]
    assert [value.data_ptr() for value in tensors] == before
    assert metrics.loss.isfinite() and not torch.equal(step.update.q["conv1.weight"], start)


def test_a_layers_step_is_as_long_as_lr_times_eta_of_its_weights(make_batch: Callable) -> None:
    """Whatever the size of the gradients: the first step, without decay, has no velocity behind it."""
    recipe = replace(RECIPE, weight_decay=0.0)
    step = Step(recipe, Parallel())
    before = {name: value.clone() for name, value in step.update.q.items()}
    step.step(make_batch(recipe, 0), LR)
    for name, value in before.items():
        if value.dim() > 1:
            moved = (step.update.q[name] - value).norm() / value.norm()
            assert moved.item() == pytest.approx(LR * recipe.lars_eta, rel=1e-4), name


def train(parallel: Parallel, make_batch: Callable) -> dict[str, Tensor]:
    recipe = replace(RECIPE, bn_group=4)
    step = Step(recipe, parallel)
    for i in range(3):
        step.step(make_batch(recipe, i, parallel.world, parallel.rank), LR)
    return {name: value.clone() for name, value in step.update.q.items()}


def test_two_ranks_are_one_run(run_ranks: Callable, make_batch: Callable) -> None:
    """Norms are those of the gradients that ranks have summed."""
    alone, ranks = train(Parallel(), make_batch), run_ranks(2, train, make_batch)
    for name, value in alone.items():
        assert torch.equal(ranks[0][name], ranks[1][name]), name
        torch.testing.assert_close(ranks[0][name], value, rtol=1e-3, atol=1e-4, msg=name)
