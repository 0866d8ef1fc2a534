"""Masters and working copies, the update against torch's optimiser, and the loss scale."""

import copy
import math
import sys
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from torch import Tensor

from fastmoco.contrast.update import (
    FIRST_SCALE,
    GROWTH_INTERVAL,
    LARGEST_SCALE,
    PRECISIONS,
    LossScale,
    Update,
    resolve_precision,
)
from fastmoco.encoder import Encoder, build_encoder
from fastmoco.kernels.convolution import Instructions
from fastmoco.options import UsageError
from fastmoco.recipe import Recipe

RECIPE = Recipe(arch="resnet18", width=0.125, head="mlp", dim=16, batch_size=8, bn_group=8, ema_momentum=0.9)
CPU = torch.device("cpu")


def make(precision: str, backend: str = "fused") -> tuple[Encoder, Encoder, Update]:
    encoder_q = build_encoder(RECIPE)
    encoder_k = copy.deepcopy(encoder_q).requires_grad_(False)
    return encoder_q, encoder_k, Update(encoder_q, encoder_k, RECIPE, PRECISIONS[precision], backend)


def give_gradients(encoder: Encoder, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for parameter in encoder.parameters():
        draws = torch.randn(parameter.shape, generator=generator)
        parameter.grad = torch.empty_like(parameter).copy_(draws)
    return {name: parameter.grad.clone() for name, parameter in encoder.named_parameters()}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_masters_follow_torchs_sgd_and_the_key_follows_them(precision: str, backend: str) -> None:
    encoder_q, encoder_k, update = make(precision, backend)
    theirs = {name: torch.nn.Parameter(master.double()) for name, master in update.q.items()}
    keys = {name: value.detach().clone() for name, value in theirs.items()}
    optimizer = torch.optim.SGD(theirs.values(), 0.1, momentum=RECIPE.sgd_momentum, weight_decay=RECIPE.weight_decay)
    update.lr.fill_(0.1)
    for seed in range(4):
        for name, gradient in give_gradients(encoder_q, seed).items():
            theirs[name].grad = gradient.double()
        assert bool(update.apply())
        optimizer.step()
        for name, key in keys.items():
            key.mul_(0.9).add_(theirs[name].detach(), alpha=0.1)
    for name in theirs:
        torch.testing.assert_close(update.q[name].double(), theirs[name].detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(update.k[name].double(), keys[name], rtol=1e-5, atol=1e-6)
    for encoder, masters in ((encoder_q, update.q), (encoder_k, update.k)):
        for name, work in encoder.named_parameters():
            assert torch.equal(work, masters[name].to(work.dtype)), name


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_only_convolutions_and_linear_layers_are_lowered(precision: str) -> None:
    encoder_q, encoder_k, update = make(precision)
    start = build_encoder(RECIPE).state_dict()
    for encoder in (encoder_q, encoder_k):
        for name, value in encoder.state_dict().items():
            lowered = value.dim() in (2, 4) or name.startswith("fc.")
            if value.is_floating_point():
                assert value.dtype == (PRECISIONS[precision].work if lowered else torch.float32), name
            assert value.dim() != 4 or value.is_contiguous(memory_format=torch.channels_last)
    assert all(master.dtype == torch.float32 and torch.equal(master, start[name]) for name, master in update.q.items())


def test_refresh_casts_masters_that_were_set_from_outside() -> None:
    encoder_q, encoder_k, update = make("bf16")
    update.q["conv1.weight"].fill_(1 / 3)
    update.k["fc.0.bias"].fill_(2 / 3)
    assert not (encoder_q.conv1.weight == torch.tensor(1 / 3, dtype=torch.bfloat16)).any()
    update.refresh()
    assert (encoder_q.conv1.weight == torch.tensor(1 / 3, dtype=torch.bfloat16)).all()
    assert (encoder_k.fc[0].bias == torch.tensor(2 / 3, dtype=torch.bfloat16)).all()


def test_the_loss_scale_cancels(backend: str) -> None:
    """Gradients of the scaled loss move the masters as those of the loss would, but for the rounding of fp16."""
    (encoder_q, _, scaled), (plain_q, _, plain) = make("fp16", backend), make("fp32")
    assert scaled.scale is not None
    for parameter, other in zip(encoder_q.parameters(), plain_q.parameters(), strict=True):
        draws = torch.randn(parameter.shape).mul_(1e-3).to(torch.float16).float()
        other.grad = torch.empty_like(other).copy_(draws)
        parameter.grad = torch.empty_like(parameter).copy_(draws * scaled.scale.value)
    for update in (scaled, plain):
        update.lr.fill_(0.1)
        assert bool(update.apply())
    for name, master in scaled.q.items():
        torch.testing.assert_close(master, plain.q[name], rtol=1e-6, atol=1e-8)


def test_backward_scales_the_loss_and_forgets_old_gradients() -> None:
    encoder_q, _, update = make("fp16")
    for _ in range(2):
        update.backward(encoder_q.bn1.bias.sum() + 0 * sum(p.sum() for p in encoder_q.parameters()))
        assert (encoder_q.bn1.bias.grad == FIRST_SCALE).all()


@pytest.mark.parametrize("poison", [math.inf, -math.inf, math.nan])
def test_one_bad_gradient_stops_the_whole_update(poison: float, backend: str) -> None:
    encoder_q, _, update = make("fp32", backend)
    update.lr.fill_(0.1)
    give_gradients(encoder_q, 0)
    assert bool(update.apply())
    groups = (update.q, update.velocity, update.k)
    before = [{name: value.clone() for name, value in group.items()} for group in groups]
    give_gradients(encoder_q, 1)
    encoder_q.fc[2].bias.grad[3] = poison
    assert not bool(update.apply())
    for old, group in zip(before, groups, strict=True):
        assert all(torch.equal(old[name], value) for name, value in group.items())
    give_gradients(encoder_q, 0)
    assert bool(update.apply())
    for old, group in zip(before, groups, strict=True):
        assert not torch.equal(old["conv1.weight"], group["conv1.weight"])


@pytest.mark.parametrize("installed", ["nothing", "the other apex"])
def test_a_missing_apex_is_said_in_one_line(installed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyPI's apex can be imported and has none of this."""
    monkeypatch.setitem(sys.modules, "amp_C", None)
    monkeypatch.setitem(sys.modules, "apex", None if installed == "nothing" else SimpleNamespace())
    with pytest.raises(UsageError, match="NVIDIA's apex.*another project: use --update fused") as error:
        make("fp32", "apex")
    assert error.value.exit_code == 2 and "\n" not in str(error.value)


def test_the_scale_halves_on_overflow_and_doubles_after_enough_good_steps() -> None:
    scale, good, bad = LossScale(CPU), torch.tensor(False), torch.tensor(True)
    scale.advance(bad)
    assert scale.value.item() == FIRST_SCALE / 2
    for _ in range(GROWTH_INTERVAL - 1):
        scale.advance(good)
    assert scale.value.item() == FIRST_SCALE / 2
    scale.advance(good)
    assert scale.value.item() == FIRST_SCALE
    for _ in range(GROWTH_INTERVAL - 1):
        scale.advance(good)
    scale.advance(bad)  # an overflow starts the count anew
    scale.advance(good)
    assert scale.value.item() == FIRST_SCALE / 2


def test_the_scale_has_bounds() -> None:
    scale = LossScale(CPU)
    for _ in range(40):
        scale.advance(torch.tensor(True))
    assert scale.value.item() == 1
    scale.value.fill_(LARGEST_SCALE)
    scale.good_steps.fill_(GROWTH_INTERVAL - 1)
    scale.advance(torch.tensor(False))
    assert scale.value.item() == LARGEST_SCALE


@pytest.mark.parametrize(
    ("asked", "device", "capability", "expected"),
    [("auto", "cuda", (8, 0), "bf16"), ("auto", "cuda", (7, 5), "fp16")]
    + [("auto", "cuda", (10, 0), "bf16"), ("tf32", "cpu", None, "tf32"), ("fp32", "cuda", (9, 0), "fp32")],
)
def test_auto_takes_what_the_device_has(
    asked: str, device: str, capability: tuple | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert resolve_precision(asked, torch.device(device)) == expected


@pytest.mark.parametrize("by", get_args(Instructions))
def test_auto_on_a_cpu_is_bf16_where_it_has_the_instructions(by: Instructions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastmoco.contrast.update.instructions", lambda: by)
    assert resolve_precision("auto", CPU) == ("fp32" if by == "none" else "bf16")
    assert resolve_precision("fp32", CPU) == "fp32" and resolve_precision("bf16", CPU) == "bf16"


def test_an_unknown_precision_is_named() -> None:
    with pytest.raises(ValueError, match="precision is 'int8': use auto, fp32, tf32, bf16 or fp16"):
        resolve_precision("int8", CPU)
