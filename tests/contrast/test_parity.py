"""Ten steps equal the published algorithm, written here a second time: plain loops, float64, NCHW, four "GPUs".

The order is the published one (momentum update, shuffle, key forward, unshuffle, loss, SGD, enqueue), with a
permutation `idx_shuffle` over all GPUs and nn.BatchNorm2d with statistics per GPU. Nothing of the encoders or the step
is used.
"""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import PlainResNet18, contrastive_loss, enqueue, momentum_update
from torch import Tensor, nn

from fastmoco.contrast.step import Step
from fastmoco.data.plan import Plan
from fastmoco.kernels import reference
from fastmoco.parallel import Parallel
from fastmoco.recipe import Recipe

GPUS, STEPS, LR = 4, 10, 0.03
TINY = dict(arch="resnet18", width=0.125, stem="cifar", dim=16, batch_size=16, bn_group=4, crop_size=12, queue_size=40)
METHODS = {
    "v1": dict(head="linear", temperature=0.07),
    "v2": dict(head="mlp", temperature=0.2),
    "symmetric": dict(head="linear", temperature=0.1, symmetric=True, ema_momentum=0.9),
}


class Published:
    """The algorithm over GPUS copies of a network; parameters shared, batch-norm buffers one set a GPU."""

    def __init__(self, recipe: Recipe, start: dict[str, Tensor], dtype: torch.dtype) -> None:
        self.recipe = recipe
        self.nets_q, self.nets_k = (replicas(recipe, start, side, dtype) for side in ("encoder_q.", "encoder_k."))
        self.q, self.k = (dict(nets[0].named_parameters()) for nets in (self.nets_q, self.nets_k))
        self.velocity = {name: torch.zeros_like(value) for name, value in self.q.items()}
        self.queue = start["queue"].to(dtype).T.clone()  # (C, K), as published
        self.pointer = int(start["queue_pointer"])

    def update_keys(self) -> None:
        momentum_update(self.k.values(), self.q.values(), self.recipe.ema_momentum)

    @torch.no_grad()
    def encode_keys(self, images: Tensor, idx_shuffle: Tensor) -> Tensor:
        idx_unshuffle = torch.argsort(idx_shuffle)
        per_gpu = []
        for gpu, net in enumerate(self.nets_k):
            per_gpu.append(F.normalize(net(images[idx_shuffle.view(GPUS, -1)[gpu]]), dim=1))
        gathered = torch.cat(per_gpu)
        return torch.stack([gathered[idx_unshuffle.view(GPUS, -1)[gpu]] for gpu in range(GPUS)]).flatten(0, 1)

    def loss(self, images: Tensor, keys: Tensor) -> Tensor:
        losses = []
        for net, im_q, k in zip(self.nets_q, images.chunk(GPUS), keys.chunk(GPUS), strict=True):
            q = F.normalize(net(im_q), dim=1)
            losses.append(contrastive_loss(q, k, self.queue, self.recipe.temperature))
        return sum(losses) / GPUS

    def sgd(self, loss: Tensor) -> None:
        self.gradients = dict(zip(self.q, torch.autograd.grad(loss, list(self.q.values())), strict=True))
        with torch.no_grad():
            for name, value in self.q.items():
                direction = self.gradients[name] + self.recipe.weight_decay * value
                self.velocity[name] = self.recipe.sgd_momentum * self.velocity[name] + direction
                value -= LR * self.velocity[name]

    def enqueue(self, keys: Tensor) -> None:
        self.pointer = enqueue(self.queue, self.pointer, keys)

    def forward(self, views: list[Tensor], shuffles: list[Tensor]) -> tuple[Tensor, Tensor]:
        """`views`: both views of the batch [B, 3, S, S]; `shuffles`: idx_shuffle of each key view."""
        if not self.recipe.symmetric:
            keys = self.encode_keys(views[1], shuffles[0])
            return self.loss(views[0], keys), keys
        k_1, k_2 = (self.encode_keys(view, order) for view, order in zip(views, shuffles, strict=True))
        return self.loss(views[0], k_2) + self.loss(views[1], k_1), torch.cat([k_1, k_2])

    def step(self, views: list[Tensor], shuffles: list[Tensor]) -> Tensor:
        self.update_keys()
        loss, keys = self.forward(views, shuffles)
        self.sgd(loss)
        self.enqueue(keys)
        return loss.detach()


def replicas(recipe: Recipe, start: dict[str, Tensor], side: str, dtype: torch.dtype) -> list[PlainResNet18]:
    net = PlainResNet18(8, 16, recipe.head).to(dtype)
    net.load_state_dict({name.removeprefix(side): value for name, value in start.items() if name.startswith(side)})
    nets = [net, *(copy.deepcopy(net) for _ in range(GPUS - 1))]
    for other in nets[1:]:
        for (name, shared), module in zip(net.named_parameters(), modules_of(other), strict=True):
            setattr(module, name.rpartition(".")[2], shared)
    return nets


def modules_of(net: nn.Module) -> list[nn.Module]:
    return [net.get_submodule(name.rpartition(".")[0]) for name, _ in net.named_parameters()]


def plain_views(recipe: Recipe, crops: np.ndarray, plan: Plan, step: int, dtype: torch.dtype) -> list[Tensor]:
    """Both views of the global batch, flipped as the plan says, normalised, NCHW, image by image."""
    mean, std = (np.array(value)[:, None, None] for value in (recipe.augmentation.mean, recipe.augmentation.std))
    views = []
    for view in (0, 1):
        flips = plan.photometric(plan.epoch(step), plan.samples(step), view)[:, reference.FLIP]
        images = []
        for sample, flip in zip(plan.samples(step), flips, strict=True):
            image = crops[sample, view].astype(np.float64).transpose(2, 0, 1) / 255
            images.append(((image[:, :, ::-1] if flip else image) - mean) / std)
        views.append(torch.from_numpy(np.stack(images)).to(dtype))
    return views


def inputs(recipe: Recipe, crops: np.ndarray, step: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    plan = Plan(recipe, np.full((len(crops), 2), 64, np.int32))
    shuffles = [torch.from_numpy(plan.shuffle(step, view)) for view in plan.key_views]
    return plain_views(recipe, crops, plan, step, dtype), shuffles


def start_of(ours: Step) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in ours.state().items()}


def same(ours: Tensor, theirs: Tensor, what: str) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9, msg=lambda text: f"{what}: {text}")


def same_state(ours: Step, theirs: Published) -> None:
    for name in theirs.q:
        same(ours.update.q[name], theirs.q[name].detach(), f"query {name}")
        same(ours.update.velocity[name], theirs.velocity[name], f"velocity {name}")
        same(dict(ours.encoder_q.named_parameters())[name].grad, theirs.gradients[name], f"gradient {name}")
    same(ours.dictionary.queue.keys, theirs.queue.T, "queue")
    assert int(ours.dictionary.queue.pointer) == theirs.pointer
    if ours.recipe.symmetric:
        return
    for net, encoder in ((theirs.nets_q, ours.encoder_q), (theirs.nets_k, ours.encoder_k)):
        buffers = dict(encoder.named_buffers())
        for name in buffers:
            if "running" in name:
                same(buffers[name], torch.stack([dict(n.named_buffers())[name] for n in net]).mean(0), name)


@pytest.mark.parametrize("method", METHODS)
def test_ten_steps_of_the_published_algorithm(method: str, make_batch: Callable, make_crops: Callable) -> None:
    """Loss, gradients, parameters, velocity, running statistics, queue and pointer, after every step.

    But for the running statistics when symmetric: the published code forwards the views one after the other and moves
    them twice a step, ours sees both at once and moves them once.
    """
    recipe = Recipe(**TINY, **METHODS[method])
    ours, crops = Step(recipe, Parallel(), "fp64"), make_crops(recipe)
    theirs = Published(recipe, start_of(ours), torch.float64)
    for step in range(STEPS):
        loss = theirs.step(*inputs(recipe, crops, step, torch.float64))
        same(ours.step(make_batch(recipe, step), LR).loss, loss, f"loss of step {step}")
        same_state(ours, theirs)
    # Ours has moved the keys after the last step already; the published order would before the next.
    theirs.update_keys()
    for name, value in theirs.k.items():
        same(ours.update.k[name], value.detach(), f"key {name}")


def test_without_the_shuffle_it_is_another_algorithm(make_batch: Callable, make_crops: Callable) -> None:
    recipe = Recipe(**TINY, **METHODS["v2"])
    plain_recipe = Recipe(**TINY, **METHODS["v2"], shuffle_bn=False)
    ours, plain = Step(recipe, Parallel(), "fp64"), Step(plain_recipe, Parallel(), "fp64")
    theirs, crops = Published(recipe, start_of(ours), torch.float64), make_crops(recipe)
    for step in range(3):
        views, shuffles = inputs(recipe, crops, step, torch.float64)
        loss = theirs.step(views, [torch.arange(len(order)) for order in shuffles])
        same(plain.step(make_batch(plain_recipe, step), LR).loss, loss, f"loss of step {step}")
        assert (ours.step(make_batch(recipe, step), LR).loss - loss).abs() > 1e-5 * loss


@pytest.mark.parametrize("method", METHODS)
def test_fp32_strays_no_further_than_plain_fp32(
    method: str, make_batch: Callable, make_crops: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error budget of loss and keys: with float64 as truth, ours in fp32 errs like the published code in fp32.

    Every step starts from the truth: over many, a ReLU that opens on one side only makes any two runs part.
    """
    recipe = Recipe(**TINY, **METHODS[method])
    truth, ours, crops = Step(recipe, Parallel(), "fp64"), Step(recipe, Parallel(), "fp32"), make_crops(recipe)
    errors, budget = torch.zeros(2), torch.zeros(2)
    for step in range(STEPS):
        start = start_of(truth)
        ours.load(start)
        mine = ours.step(make_batch(recipe, step), LR).loss
        theirs = Published(recipe, start, torch.float32)
        plain, plain_keys = theirs.forward(*inputs(recipe, crops, step, torch.float32))
        theirs.enqueue(plain_keys)
        exact = truth.step(make_batch(recipe, step), LR).loss
        keys = truth.dictionary.queue.keys
        errors += torch.stack([(mine - exact).abs(), (ours.dictionary.queue.keys - keys).abs().max()])
        budget += torch.stack([(plain.detach() - exact).abs(), (theirs.queue.T - keys).abs().max()])
    assert (errors <= 2 * budget + 1e-6).all(), f"{errors} against {budget}"


def test_winograds_algorithm_strays_no_further_either(
    make_batch: Callable, make_crops: Callable, monkeypatch: pytest.MonkeyPatch, by_winograd: None
) -> None:
    test_fp32_strays_no_further_than_plain_fp32("v2", make_batch, make_crops, monkeypatch)
