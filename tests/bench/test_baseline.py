"""The baseline is the published algorithm, so that beating it means something."""

import dataclasses

import pytest
import torch

from fastmoco.bench.baseline import PlainResNet, PublishedStep
from fastmoco.recipe import PRESETS

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
