"""Bottlenecks forward only: outputs and running statistics of the plain path, on every kind of block."""

import copy

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from fastmoco.encoder import BatchNormAct, Bottleneck, Encoder, build_encoder, forward_only
from fastmoco.kernels.conv1x1 import pays
from fastmoco.recipe import Recipe

# Names of blocks whose shortcut is the input, a 1x1 convolution, and one that strides. In small blocks every 1x1
# convolution is measured as it is computed; to see what becomes of those that are not, `large` lets none be.
BLOCKS = {"identity": "layer1.1", "projection": "layer1.0", "strided": "layer2.0"}


def block_of(kind: str, impl: str, dtype: torch.dtype, device: torch.device, forward_only: bool) -> Bottleneck:
    encoder = build_encoder(Recipe(arch="resnet50", width=0.25, bn_group=2, batch_size=4))
    block = encoder.get_submodule(BLOCKS[kind])
    generator = torch.Generator().manual_seed(3)
    for module in block.modules():
        if isinstance(module, BatchNormAct):
            module.impl = impl
            with torch.no_grad():
                module.weight.copy_(torch.rand(module.weight.shape, generator=generator) + 0.5)
                module.bias.copy_(torch.randn(module.bias.shape, generator=generator))
        elif dtype != torch.float64:
            module.to(dtype) if isinstance(module, torch.nn.Conv2d) else None
    block.forward_only = forward_only
    return (block.double() if dtype == torch.float64 else block).to(device).train()


def results(kind: str, impl: str, dtype: torch.dtype, device: torch.device, forward_only: bool) -> dict[str, Tensor]:
    block = block_of(kind, impl, dtype, device, forward_only)
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(4, block.conv1.weight.shape[1], 10, 9, generator=generator).relu().bfloat16()
    with torch.no_grad():
        y = block(x.to(device, dtype).contiguous(memory_format=torch.channels_last))
    return {"y": y} | {name: buffer for name, buffer in block.named_buffers() if "running" in name}


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize(("dtype", "large"), [(torch.float32, False), (torch.float16, False), (torch.float16, True)])
@pytest.mark.parametrize("kind", BLOCKS)
def test_it_is_the_plain_path_but_for_rounding(
    kind: str, dtype: torch.dtype, large: bool, impl: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """error(ours) <= error(plain path of the same precision) + two roundings of the largest, against float64."""
    calls, whole = [], forward_only.conv1x1
    monkeypatch.setattr(forward_only, "pays", lambda inputs, outputs: not large)
    monkeypatch.setattr(forward_only, "conv1x1", lambda *given, **rest: (calls.append(given), whole(*given, **rest))[1])
    ours, plain = (results(kind, impl, dtype, device, forward_only) for forward_only in (True, False))
    assert len(calls) == (0 if large else 3 if kind == "projection" else 2)
    truth = results(kind, "reference", torch.float64, torch.device("cpu"), False)
    assert ours.keys() == plain.keys() == truth.keys() and len(truth) == (7 if kind == "identity" else 9)
    for name, exact in truth.items():
        error, budget = ((t[name].cpu().double() - exact).abs().max() for t in (ours, plain))
        epsilon = 2 * torch.finfo(dtype).eps * exact.abs().max()
        assert error <= budget + epsilon, f"{name}: {error:.3e} > {budget:.3e} + {epsilon:.3e}"
    assert ours["y"].is_contiguous(memory_format=torch.channels_last) and ours["y"].dtype == dtype


def test_the_budget_sees_a_batch_norm_left_out(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = forward_only.conv1x1
    monkeypatch.setattr(forward_only, "conv1x1", lambda *given, entry=None, **rest: whole(*given, **rest))
    with pytest.raises(AssertionError, match=" > "):
        test_it_is_the_plain_path_but_for_rounding("identity", torch.float16, False, "reference", device, monkeypatch)


def test_the_first_two_stages_of_a_resnet50_are_worth_it() -> None:
    convs = {name: m for name, m in build_encoder(Recipe()).named_modules() if getattr(m, "kernel_size", 0) == (1, 1)}
    paying = {name for name, conv in convs.items() if pays(conv.in_channels, conv.out_channels)}
    strided = "layer2.0.downsample.0"  # which is torch's in any case
    assert paying == {name for name in convs if name.startswith(("layer1", "layer2"))} - {strided}
    assert len(paying) == 15 and len(convs) == 36


def test_two_runs_are_bit_equal(device: torch.device) -> None:
    first, second = (results("projection", "triton", torch.bfloat16, device, True) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def encoder_of(arch: str, impl: str) -> Encoder:
    encoder = build_encoder(Recipe(arch=arch, width=0.125, bn_group=2, batch_size=4, dim=8, stem="cifar"))
    for module in encoder.modules():
        if isinstance(module, BatchNormAct):
            module.impl = impl
        if isinstance(module, Bottleneck):
            module.forward_only = True
    return encoder


def test_it_is_taken_in_training_without_gradients_by_kernels_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Bottleneck] = []
    taken = forward_only.bottleneck
    monkeypatch.setattr(forward_only, "bottleneck", lambda block, x: (calls.append(block), taken(block, x))[1])
    x = torch.randn(4, 3, 16, 16)
    for arch, impl, training, gradients, expected in (
        ("resnet50", "reference", True, False, 16),
        ("resnet50", "reference", True, True, 0),
        ("resnet50", "reference", False, False, 0),
        ("resnet50", "auto", True, False, 0),
        ("resnet50", "torch", True, False, 0),
        ("resnet18", "reference", True, False, 0),
    ):
        calls.clear()
        with torch.set_grad_enabled(gradients):
            z = encoder_of(arch, impl).train(training)(x)
        assert len(calls) == expected and z.requires_grad == gradients


def test_a_whole_encoder_gives_the_same_projections() -> None:
    ours, plain = encoder_of("resnet50", "reference").double(), encoder_of("resnet50", "auto").double()
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), plain(x), rtol=1e-9, atol=1e-9)
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(ours.get_buffer(name), buffer, rtol=1e-9, atol=1e-9, msg=name)
    again = copy.deepcopy(ours)
    assert all(module.forward_only for module in again.modules() if isinstance(module, Bottleneck))


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_it_reads_nothing_back(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors without values, where whatever wants one on the host raises; so that a CUDA graph can hold it."""
    encoder, path = encoder_of("resnet50", impl), forward_only.bottleneck
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        assert encoder(torch.empty(4, 3, 16, 16)).shape == (4, 8)
        monkeypatch.setattr(forward_only, "bottleneck", lambda block, x: path(block, x * x.sum().item()))
        with pytest.raises(DataDependentOutputException):
            encoder(torch.empty(4, 3, 16, 16))
