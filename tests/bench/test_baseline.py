"""The baseline is the published algorithm, so that beating it means something."""

import dataclasses

import pytest
import torch

from fastmoco.bench.baseline import BankStep, BatchStep, Lars, PlainResNet, PublishedStep, plain_step
from fastmoco.contrast.step import Step
from fastmoco.data.noise import noise_images
from fastmoco.parallel import Parallel
from fastmoco.presets import PRESETS
from fastmoco.recipe import Recipe

CPU = torch.device("cpu")

SMALL = dataclasses.replace(
    PRESETS["v2"][1], arch="resnet18", width=0.125, stem="cifar", batch_size=8, bn_group=8, queue_size=32, crop_size=16
)


@pytest.mark.parametrize("preset, count", [("v1", 23_770_304), ("v2", 27_966_656)])
def test_the_encoder_has_the_published_number_of_parameters(preset, count):
    assert sum(p.numel() for p in PlainResNet(PRESETS[preset][1]).parameters()) == count


def test_the_keys_of_a_step_stand_in_the_queue_and_the_key_encoder_follows_by_momentum():
    torch.manual_seed(0)
    step = PublishedStep(SMALL, torch.device("cpu"))
    before = step.queue.clone()
    x = torch.randn(8, 3, 16, 16)
    step(x, x)
    assert torch.equal(step.queue[:, 8:], before[:, 8:]) and not torch.equal(step.queue[:, :8], before[:, :8])
    assert torch.allclose(step.queue[:, :8].norm(dim=0), torch.ones(8), atol=1e-5)
    query, key = (next(e.parameters()).clone() for e in (step.encoder_q, step.encoder_k))
    step(x, x)
    expected = key * SMALL.ema_momentum + query * (1 - SMALL.ema_momentum)
    assert torch.equal(next(step.encoder_k.parameters()), expected)


def test_the_variants_compute_the_same_loss():
    losses = []
    for options in ({}, {"channels_last": True}, {"autocast": torch.bfloat16}):
        torch.manual_seed(0)
        step = PublishedStep(SMALL, torch.device("cpu"), **options)
        x = torch.randn(8, 3, 16, 16)
        losses.append(step(x, x.flip(3)))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[2] == pytest.approx(losses[0], rel=2e-2)


def test_a_queue_that_the_batch_does_not_divide_is_refused_as_published():
    step = PublishedStep(dataclasses.replace(SMALL, queue_size=33), torch.device("cpu"))
    with pytest.raises(ValueError, match="divides"):
        step(torch.randn(8, 3, 16, 16), torch.randn(8, 3, 16, 16))


def other(name: str, **changes: object) -> Recipe:
    """A small recipe of the preset `name`."""
    small = {"arch": "resnet18", "width": 0.125, "stem": "cifar", "batch_size": 8, "crop_size": 16}
    small |= {} if PRESETS[name][1].dictionary == "batch" else {"queue_size": 32}
    return dataclasses.replace(PRESETS[name][1], **small, bn_group=8 if PRESETS[name][1].bn_group else 0, **changes)


@pytest.mark.parametrize("name", ["simclr", "end-to-end", "bank"])
def test_every_dictionary_has_a_plain_step_with_the_loss_that_ours_starts_with(name: str) -> None:
    """Both start at random weights, so that the first loss is near the one of random vectors, and learn one batch."""
    recipe = other(name, lr=0.05 if name != "simclr" else 3.0)
    torch.manual_seed(0)
    step, (x, y) = plain_step(recipe, CPU), torch.randn(2, 8, 3, 16, 16)
    assert isinstance(step, BankStep if name == "bank" else BatchStep)
    losses = [step(x, y) for _ in range(12)]
    expected = sum(p.numel() for p in Step(recipe, Parallel(), images=noise_images(recipe)).encoder_q.parameters())
    # The last batch norm of "mlp-bn" has no shift with us.
    assert sum(p.numel() for p in step.encoder_q.parameters()) == expected + (128 if name == "simclr" else 0)
    assert losses[-1] < losses[0] - 0.1 if name != "bank" else losses[0] > 3


def test_a_banks_entries_move_half_way_to_the_queries():
    torch.manual_seed(0)
    step = BankStep(other("bank"), CPU)
    before, x = step.bank.clone(), torch.randn(8, 3, 16, 16)
    step(x, x)
    moved = (step.bank != before).any(1)
    assert moved.sum() == 8 and set(moved.nonzero().flatten().tolist()) == set(step.ids.tolist())
    assert torch.allclose(step.bank.norm(dim=1), torch.ones(64), atol=1e-5)


def test_lars_is_the_one_of_the_step():
    """Three steps of ours, in float64, over a matrix and a bias."""
    torch.manual_seed(0)
    weights = [torch.randn(4, 3, dtype=torch.float64), torch.randn(4, dtype=torch.float64)]
    mine = [w.clone().requires_grad_() for w in weights]
    plain = Lars(mine, lr=0.5, momentum=0.9, weight_decay=0.01)
    velocity = [torch.zeros_like(w) for w in weights]
    for lr in (0.5, 0.2, 0.1):
        grads = [torch.randn_like(w) for w in weights]
        for w, g in zip(mine, grads, strict=True):
            w.grad = g.clone()
        plain.param_groups[0]["lr"] = lr
        plain.step()
        decayed = grads[0] + 0.01 * weights[0]
        grads[0] = 0.001 * weights[0].norm() / decayed.norm() * decayed
        for w, v, g in zip(weights, velocity, grads, strict=True):
            v.mul_(0.9).add_(lr * g)
            w.sub_(v)
    for ours, expected in zip(mine, weights, strict=True):
        torch.testing.assert_close(ours.detach(), expected)
