"""Encoders: names, shapes, counts and initialisation of torchvision's networks, and the numerics of plain layers."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastmoco.encoder import build_encoder
from fastmoco.presets import PRESETS
from fastmoco.recipe import ARCHITECTURES, Recipe

STAGES = {
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
    "resnet152": (3, 8, 36, 3),
    "wide_resnet50_2": (3, 4, 6, 3),
    "wide_resnet101_2": (3, 4, 23, 3),
}
TINY = dict(arch="resnet18", width=0.125, dim=8, batch_size=8, bn_group=4, crop_size=32)


def expected_names(arch: str, head: str) -> list[str]:
    """torchvision's rule: stem, then stages, in each block its convolutions, then its shortcut; the head last."""
    per_norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    convolutions = 2 if arch in ("resnet18", "resnet34") else 3

    def pair(conv: str, norm: str) -> list[str]:
        return [f"{conv}.weight"] + [f"{norm}.{name}" for name in per_norm]

    names = pair("conv1", "bn1")
    for stage, blocks in enumerate(STAGES[arch], start=1):
        for block in range(blocks):
            prefix = f"layer{stage}.{block}."
            for i in range(1, convolutions + 1):
                names += pair(f"{prefix}conv{i}", f"{prefix}bn{i}")
            if block == 0 and (stage > 1 or convolutions == 3):
                names += pair(f"{prefix}downsample.0", f"{prefix}downsample.1")
    layers = ["fc"] if head == "linear" else ["fc.0", "fc.2"]
    return names + [f"{layer}.{name}" for layer in layers for name in ("weight", "bias")]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_names_are_torchvisions(arch: str, head: str) -> None:
    encoder = build_encoder(Recipe(arch=arch, head=head, width=1 / 64))
    assert list(encoder.state_dict()) == expected_names(arch, head)


@pytest.mark.parametrize(("preset", "parameters", "tensors"), [("v1", 23_770_304, 161), ("v2", 27_966_656, 163)])
def test_counts_of_the_published_encoders(preset: str, parameters: int, tensors: int) -> None:
    encoder = build_encoder(PRESETS[preset][1])
    assert sum(p.numel() for p in encoder.parameters()) == parameters
    assert len(list(encoder.parameters())) == tensors


@pytest.mark.parametrize(
    ("arch", "features", "parameters"),
    [("resnet18", 512, 11_176_512), ("resnet34", 512, 21_284_672), ("wide_resnet50_2", 2048, 66_834_240)],
)
def test_backbones_have_torchvisions_size(arch: str, features: int, parameters: int) -> None:
    """torchvision's totals (11,689,512, 21,797,672, 68,883,240) less its classifier of 1,000 classes."""
    encoder = build_encoder(Recipe(arch=arch))
    head = sum(p.numel() for p in encoder.fc.parameters())
    assert encoder.feature_dim == features
    assert sum(p.numel() for p in encoder.parameters()) - head == parameters


def test_the_3x3_convolution_strides() -> None:
    block = build_encoder(Recipe(width=1 / 64)).layer2[0]
    assert (block.conv1.stride, block.conv2.stride, block.downsample[0].stride) == ((1, 1), (2, 2), (2, 2))


@pytest.mark.parametrize(("stem", "side"), [("imagenet", 8), ("cifar", 32)])
def test_stem_sets_the_resolution_of_the_first_stage(stem: str, side: int) -> None:
    encoder = build_encoder(Recipe(**TINY, stem=stem))
    x = encoder.maxpool(encoder.bn1(encoder.conv1(torch.randn(4, 3, 32, 32).to(memory_format=torch.channels_last))))
    assert x.shape[2:] == (side, side)


@pytest.mark.parametrize(("width", "channels"), [(0.125, 8), (0.5, 32), (2.0, 128)])
def test_width_scales_every_channel_count(width: float, channels: int) -> None:
    encoder = build_encoder(Recipe(arch="resnet18", width=width))
    assert encoder.conv1.out_channels == channels
    assert [encoder.get_submodule(f"layer{s}.1.conv2").out_channels for s in (1, 2, 3, 4)] == [
        channels * 2**s for s in range(4)
    ]


def test_initialisation_has_torchvisions_distribution() -> None:
    encoder = build_encoder(Recipe(arch="resnet50", head="mlp", seed=3))
    for name, weight in encoder.state_dict().items():
        if weight.dim() == 4:
            expected = math.sqrt(2 / (weight.shape[0] * weight.shape[2] * weight.shape[3]))
            # Five standard errors of a standard deviation, and of a mean.
            assert abs(weight.std() / expected - 1) < 5 / math.sqrt(2 * weight.numel()), name
            assert abs(weight.mean()) < 5 * expected / math.sqrt(weight.numel()), name
        elif name.startswith("fc.") and name.endswith("weight"):
            bound = 1 / math.sqrt(weight.shape[1])
            assert 0.999 * bound < weight.abs().max() <= bound
            assert abs(weight.std() / (bound / math.sqrt(3)) - 1) < 0.01
    assert all((m.weight == 1).all() and (m.bias == 0).all() for n, m in encoder.named_modules() if "bn" in n)


def test_initialisation_is_a_function_of_the_seed_alone() -> None:
    before = torch.get_rng_state()
    first = build_encoder(Recipe(**TINY, seed=7)).state_dict()
    torch.rand(5)
    again = build_encoder(Recipe(**TINY, seed=7)).state_dict()
    other = build_encoder(Recipe(**TINY, seed=8)).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])
    torch.set_rng_state(before)
    assert torch.equal(torch.get_rng_state(), before)


def test_building_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    build_encoder(Recipe(**TINY))
    assert torch.equal(torch.get_rng_state(), before)


def plain_forward(state: dict, x: torch.Tensor, group: int | None, arch: str, stem: str) -> torch.Tensor:
    """The same network in torch's functional calls, NCHW, group by group; `group` None evaluates."""
    deep = arch == "resnet50"

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        if group is None:
            return F.batch_norm(x, mean, var, weight, bias)
        return torch.cat([F.batch_norm(part, None, None, weight, bias, training=True) for part in x.split(group)])

    def block(x: torch.Tensor, prefix: str, stride: int) -> torch.Tensor:
        y, strides = x, (1, stride, 1) if deep else (stride, 1)
        for i, step in enumerate(strides, start=1):
            weight = state[f"{prefix}conv{i}.weight"]
            y = norm(F.conv2d(y, weight, stride=step, padding=weight.shape[-1] // 2), f"{prefix}bn{i}")
            y = y.relu() if i < len(strides) else y
        if f"{prefix}downsample.0.weight" in state:
            x = norm(F.conv2d(x, state[f"{prefix}downsample.0.weight"], stride=stride), f"{prefix}downsample.1")
        return (x + y).relu()

    imagenet = stem == "imagenet"
    weight = state["conv1.weight"]
    x = norm(F.conv2d(x, weight, stride=2 if imagenet else 1, padding=weight.shape[-1] // 2), "bn1").relu()
    x = F.max_pool2d(x, 3, 2, 1) if imagenet else x
    for stage, blocks in enumerate(STAGES[arch], start=1):
        for i in range(blocks):
            x = block(x, f"layer{stage}.{i}.", 2 if stage > 1 and i == 0 else 1)
    x = x.mean((2, 3))
    if "fc.weight" in state:
        return F.linear(x, state["fc.weight"], state["fc.bias"])
    hidden = F.linear(x, state["fc.0.weight"], state["fc.0.bias"]).relu()
    return F.linear(hidden, state["fc.2.weight"], state["fc.2.bias"])


CASES = [("resnet18", "imagenet", "linear"), ("resnet18", "cifar", "mlp"), ("resnet50", "imagenet", "mlp")]


@pytest.mark.parametrize(("arch", "stem", "head"), CASES)
@pytest.mark.parametrize("training", [True, False])
def test_forward_is_plain_torch_group_by_group(arch: str, stem: str, head: str, training: bool) -> None:
    """In float64, so that only another computation could differ; whole-batch statistics are the control."""
    recipe = Recipe(**{**TINY, "arch": arch}, stem=stem, head=head)
    encoder = build_encoder(recipe).double().train(training)
    with torch.no_grad():
        for norm in encoder._norms:
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_()
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    x = torch.randn(8, 3, 32, 32, dtype=torch.float64)
    state = {name: value.clone() for name, value in encoder.state_dict().items()}
    ours = encoder(x)
    torch.testing.assert_close(ours, plain_forward(state, x, 4 if training else None, arch, stem), rtol=1e-9, atol=1e-9)
    if training:
        assert (ours - plain_forward(state, x, 8, arch, stem)).abs().max() > 1e-3


def test_gradients_are_plain_torchs() -> None:
    recipe = Recipe(**{**TINY, "arch": "resnet50"})
    encoder = build_encoder(recipe).double()
    x, target = torch.randn(8, 3, 32, 32).double(), torch.randn(8, 8).double()
    state = {name: value.detach().clone() for name, value in encoder.state_dict().items()}
    leaves = {name: state[name].requires_grad_() for name, _ in encoder.named_parameters()}
    (encoder(x) * target).sum().backward()
    (plain_forward(state, x, 4, "resnet50", "imagenet") * target).sum().backward()
    for name, parameter in encoder.named_parameters():
        torch.testing.assert_close(parameter.grad, leaves[name].grad, rtol=1e-7, atol=1e-7, msg=name)


def test_parameters_and_their_gradients_are_channels_last() -> None:
    encoder = build_encoder(Recipe(**TINY))
    encoder(torch.randn(8, 3, 32, 32)).sum().backward()
    for name, parameter in encoder.named_parameters():
        if parameter.dim() == 4:
            assert parameter.is_contiguous(memory_format=torch.channels_last), name
            assert parameter.grad.is_contiguous(memory_format=torch.channels_last), name


def test_features_are_what_the_head_reads() -> None:
    encoder = build_encoder(Recipe(**TINY, head="mlp")).eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(encoder.fc(encoder.features(x)), encoder(x))
    assert encoder.features(x).shape == (2, encoder.feature_dim) == (2, 64)


def test_batches_are_counted_in_training_only() -> None:
    encoder = build_encoder(Recipe(**TINY))
    for _ in range(3):
        encoder(torch.randn(8, 3, 32, 32))
    encoder.eval()(torch.randn(8, 3, 32, 32))
    assert {int(value) for name, value in encoder.named_buffers() if name.endswith("tracked")} == {3}


def test_the_state_of_a_norm_loads_into_torchs() -> None:
    encoder = build_encoder(Recipe(**TINY))
    plain = nn.BatchNorm2d(8)
    plain.load_state_dict(encoder.bn1.state_dict())


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
def test_a_fourth_channel_changes_nothing(stem: str) -> None:
    """Output and gradients in float64; the control exchanges two channels."""
    encoder = build_encoder(Recipe(**TINY, stem=stem)).double()
    x = torch.randn(8, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = x.contiguous(memory_format=torch.channels_last)

    def results(arguments: torch.Tensor) -> list[torch.Tensor]:
        encoder.zero_grad()
        z = encoder(arguments)
        z.square().sum().backward()
        return [z.detach(), *(p.grad.clone() for p in encoder.parameters())]

    def close(arguments: torch.Tensor) -> list[bool]:
        pairs = zip(results(x), results(arguments), strict=True)
        return [torch.allclose(a, b, rtol=1e-9, atol=1e-9 * float(a.abs().max())) for a, b in pairs]

    assert all(close(torch.cat([x, torch.zeros_like(x[:, :1])], 1)))
    assert not any(close(x[:, [1, 0, 2]])[:2])
