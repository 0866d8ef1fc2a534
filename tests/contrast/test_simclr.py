"""Batch dictionaries against second implementations written here: the presets, and LARS as SimCLR has it.

Plain loops in float64, NCHW, nn.BatchNorm over the concatenated views (SimCLR) or over groups on four "GPUs" (MoCo's
end-to-end ablation), autograd through all of it. Nothing of the encoders or the step is used.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmoco.contrast.step import Step
from fastmoco.contrast.update import PRECISIONS, Update
from fastmoco.data.plan import Plan
from fastmoco.encoder import Encoder, build_encoder
from fastmoco.kernels import reference
from fastmoco.parallel import Parallel
from fastmoco.presets import PRESETS
from fastmoco.recipe import Recipe

SMALL = dict(arch="resnet18", width=0.125, stem="cifar", dim=16, batch_size=16, crop_size=12)
RECIPES = {
    "end-to-end": replace(PRESETS["end-to-end"][1], **SMALL, bn_group=4),
    "simclr": replace(PRESETS["simclr"][1], **SMALL),
    "simclr-cifar": replace(PRESETS["simclr-cifar"][1], **SMALL),
    "both directions": replace(PRESETS["end-to-end"][1], **SMALL, bn_group=4, symmetric=True, shuffle_bn=False),
}
STEPS = 10
RATES = [0.0, 0.1, 0.4, 0.2, 0.3, 0.1, 0.05, 0.2, 0.1, 0.02]  # that change, so that the two forms of LARS differ


class Block(nn.Module):
    def __init__(self, entry: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(entry, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        if stride > 1:
            self.downsample = nn.Sequential(nn.Conv2d(entry, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (self.downsample(x) if hasattr(self, "downsample") else x))


class ResNet18(nn.Module):
    def __init__(self, head: str) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)
        for stage, (entry, out) in enumerate([(8, 8), (8, 16), (16, 32), (32, 64)], start=1):
            blocks = nn.Sequential(Block(entry, out, 1 if stage == 1 else 2), Block(out, out, 1))
            setattr(self, f"layer{stage}", blocks)
        self.fc = nn.Linear(64, 16)
        if head == "mlp-bn":
            layers = nn.Linear(64, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 16, bias=False)
            self.fc = nn.Sequential(*layers, nn.BatchNorm1d(16))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        return self.fc(x.mean((2, 3)))


class Published:
    """The network, its statistics of one "GPU" after the other, the loss as it is written down, SGD or LARS."""

    def __init__(self, recipe: Recipe, start: dict[str, Tensor]) -> None:
        self.recipe = recipe
        self.net = ResNet18(recipe.head).double()
        weights = {name.removeprefix("encoder_q."): value for name, value in start.items() if name[:10] == "encoder_q."}
        self.net.load_state_dict(weights)
        self.trained = {name: value for name, value in self.net.named_parameters() if name != "fc.4.bias"}
        self.velocity = {name: torch.zeros_like(value) for name, value in self.trained.items()}

    def encode(self, images: Tensor) -> Tensor:
        if self.recipe.bn_group == 0:
            return F.normalize(self.net(images), dim=1)
        return F.normalize(torch.cat([self.net(group) for group in images.split(self.recipe.bn_group)]), dim=1)

    def loss(self, views: list[Tensor], order: Tensor) -> Tensor:
        if self.recipe.bn_group == 0:  # SimCLR's model.py concatenates the views
            a, b = self.encode(torch.cat(views)).chunk(2)
        else:
            a, shuffled = self.encode(views[0]), self.encode(views[1][order])
            b = shuffled[torch.argsort(order)]
        n, t = len(a), self.recipe.temperature
        target = torch.arange(n)
        if not self.recipe.symmetric:
            return F.cross_entropy(a @ b.T / t, target)
        losses = []
        for one, other in ((a, b), (b, a)):
            logits = [one @ other.T / t]
            if self.recipe.same_view_negatives:
                logits.append((one @ one.T / t).masked_fill(torch.eye(n, dtype=torch.bool), -math.inf))
            losses.append(F.cross_entropy(torch.cat(logits, 1), target))
        return sum(losses) / 2  # the mean over 2N rows

    def step(self, views: list[Tensor], order: Tensor, lr: float) -> Tensor:
        loss = self.loss(views, order)
        gradients = torch.autograd.grad(loss, list(self.trained.values()))
        with torch.no_grad():
            for (name, w), g in zip(self.trained.items(), gradients, strict=True):
                self.update(name, w, g, lr)
        return loss.detach()

    def update(self, name: str, w: Tensor, g: Tensor, lr: float) -> None:
        recipe, velocity = self.recipe, self.velocity
        if recipe.optimizer == "sgd":
            velocity[name] = recipe.sgd_momentum * velocity[name] + g + recipe.weight_decay * w
            w -= lr * velocity[name]
            return
        if w.dim() > 1:  # lars_optimizer.py: neither batch norm nor biases
            g = g + recipe.weight_decay * w
            ratio = 0.001 * w.norm() / g.norm() if w.norm() > 0 and g.norm() > 0 else 1.0
            g = ratio * g
        velocity[name] = 0.9 * velocity[name] + lr * g
        w -= velocity[name]


def views_of(recipe: Recipe, crops: np.ndarray, plan: Plan, step: int) -> list[Tensor]:
    mean, std = (np.array(value)[:, None, None] for value in (recipe.augmentation.mean, recipe.augmentation.std))
    views = []
    for view in (0, 1):
        flips = plan.photometric(plan.epoch(step), plan.samples(step), view)[:, reference.FLIP]
        pixels = [crops[sample, view].astype(np.float64).transpose(2, 0, 1) / 255 for sample in plan.samples(step)]
        turned = [image[:, :, ::-1] if flip else image for image, flip in zip(pixels, flips, strict=True)]
        views.append(torch.from_numpy(np.stack([(image - mean) / std for image in turned])))
    return views


def same(ours: Tensor, theirs: Tensor, what: str) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9, msg=lambda text: f"{what}: {text}")


@pytest.mark.parametrize("name", RECIPES)
def test_ten_steps_of_each_preset(name: str, make_batch: Callable, make_crops: Callable) -> None:
    """Loss, weights, velocity and running statistics, after every step."""
    recipe = RECIPES[name]
    ours, crops = Step(recipe, Parallel(), "fp64"), make_crops(recipe)
    theirs = Published(recipe, {key: value.clone() for key, value in ours.state().items()})
    plan = Plan(recipe, np.full((len(crops), 2), 64, np.int32))
    for step, lr in enumerate(RATES):
        order = torch.from_numpy(plan.shuffle(step, 1))
        loss = theirs.step(views_of(recipe, crops, plan, step), order, lr)
        same(ours.step(make_batch(recipe, step), lr).loss, loss, f"loss of step {step}")
        for key, value in theirs.trained.items():
            same(ours.update.q[key], value.detach(), f"{key} after step {step}")
            same(ours.update.velocity[key], theirs.velocity[key], f"velocity of {key} after step {step}")
        if recipe.bn_group == 0:
            for key, value in theirs.net.named_buffers():
                if "running" in key:
                    same(ours.encoder_q.get_buffer(key), value, key)
    assert ours.encoder_k is None and not any(key.startswith("encoder_k") for key in ours.state())


@pytest.mark.parametrize("change", [{"lars_momentum": "after"}, {"zero_init": False}, {"same_view_negatives": False}])
def test_a_recipe_that_lacks_a_part_is_another_run(change: dict, make_batch: Callable) -> None:
    """Controls of the test above, each within three steps."""
    recipe = RECIPES["simclr"]
    runs = [Step(each, Parallel(), "fp64") for each in (recipe, replace(recipe, **change))]
    for step, lr in enumerate(RATES[:4]):
        losses = [run.step(make_batch(recipe, step), lr).loss for run in runs]
    assert (losses[0] - losses[1]).abs() > 1e-5


# LARS with the rate inside the velocity, in closed form


def test_three_steps_of_lars_in_closed_form() -> None:
    """One matrix, gradients along it: every step is eta lr |w|, and the velocity sums them up as geometric series."""
    recipe = replace(RECIPES["simclr"], weight_decay=0.0)
    encoder: Encoder = build_encoder(recipe)
    update = Update(encoder, None, recipe, PRECISIONS["fp64"])
    name, rates = "layer1.0.conv1.weight", (0.5, 0.25, 1.0)
    w = update.q[name].clone()
    length, expected, velocity = 1.0, [], 0.0
    for lr in rates:  # gradient w: v = 0.9 v + lr eta |w|, and |w| falls by v
        velocity = 0.9 * velocity + lr * 0.001 * length
        length -= velocity
        expected.append(length)
    for lr, target in zip(rates, expected, strict=True):
        for key, parameter in encoder.named_parameters():
            parameter.grad = w.clone() * 7 if key == name else torch.zeros_like(parameter)
        update.lr.fill_(lr)
        assert bool(update.apply())
        torch.testing.assert_close(update.q[name], target * w, rtol=1e-12, atol=0)


def test_at_rate_zero_nothing_moves_and_a_bad_gradient_is_still_noticed(make_batch: Callable) -> None:
    step = Step(RECIPES["simclr"], Parallel())
    before = {key: value.clone() for key, value in step.update.q.items()}
    assert step.step(make_batch(step.recipe, 0), 0.0).nonfinite.item() == 0
    assert all(torch.equal(before[key], value) for key, value in step.update.q.items())
    for parameter in step.encoder_q.parameters():
        parameter.grad = torch.full_like(parameter, math.inf)
    assert not bool(step.update.apply())


# The update without a key encoder


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_without_keys_queries_move_as_with_them(precision: str, backend: str) -> None:
    recipe = replace(RECIPES["end-to-end"])
    encoders = [build_encoder(recipe) for _ in range(2)]
    key = copy.deepcopy(encoders[0]).requires_grad_(False)
    updates = [Update(encoders[0], key, recipe, PRECISIONS[precision], backend)]
    updates.append(Update(encoders[1], None, recipe, PRECISIONS[precision], backend))
    for encoder, update in zip(encoders, updates, strict=True):
        update.lr.fill_(0.1)
        generator = torch.Generator().manual_seed(0)
        for _ in range(2):
            for parameter in encoder.parameters():
                draws = torch.randn(parameter.shape, generator=generator)
                parameter.grad = torch.empty_like(parameter).copy_(draws)
            assert bool(update.apply())
    assert updates[1].k == {}
    for name in updates[0].q:
        assert torch.equal(updates[0].q[name], updates[1].q[name]), name
        assert torch.equal(updates[0].velocity[name], updates[1].velocity[name]), name
