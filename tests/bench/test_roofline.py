"""The roofline's formulas against counted tensors, and against the figures they were first worked out for."""

import dataclasses
import functools

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastmoco.bench import roofline
from fastmoco.bench.baseline import PlainResNet
from fastmoco.encoder import BatchNormAct, build_encoder
from fastmoco.kernels import batch_norm, convolution
from fastmoco.presets import PRESETS

V2 = PRESETS["v2"][1]
SMALL = dataclasses.replace(V2, width=0.25, bn_group=2, batch_size=2)
PLACES = ("stem", "inner", "last", "shortcut")


@pytest.fixture(scope="module")
def resnet50() -> list[roofline.Conv]:
    return roofline.convolutions(build_encoder(V2), 224)


def test_resnet50_has_its_known_arithmetic(resnet50):
    assert len(resnet50) == 53
    assert sum(conv.flops for conv in resnet50) / 2e9 == pytest.approx(4.087, abs=1e-3)
    assert roofline.flops_per_pair(resnet50) / 1e9 == pytest.approx(32.46, abs=0.01)
    assert sum(conv.outputs for conv in resnet50) / 1e6 == pytest.approx(11.11, abs=0.01)
    assert [sum(conv.place == place for conv in resnet50) for place in PLACES] == [1, 32, 16, 4]


@pytest.mark.parametrize("level, pairs", [("eager", 4333), ("bnrelu", 6291), ("stats", 7284), ("main", 8084)])
def test_bounds_of_one_h100_at_790_tflops_and_3_tb_per_second(resnet50, level, pairs):
    assert 1 / roofline.seconds_per_pair(resnet50, level, 256, 790e12, 3e12) == pytest.approx(pairs, rel=1e-3)


def test_more_fusion_never_costs_more(resnet50):
    for works in (roofline.forward_work, roofline.backward_work):
        bytes_of = [sum(work.nbytes for work in works(resnet50, level, 256)) for level in roofline.LEVELS]
        assert bytes_of == sorted(bytes_of, reverse=True) and len(set(bytes_of)) == 4


class Counted(TorchDispatchMode):
    """Bytes of every tensor that the eager kernels of a forward pass read and write, by part."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = dict.fromkeys(("conv", "norm", "pool"), 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        size = lambda *tensors: sum(t.numel() * t.element_size() for t in tensors)  # noqa: E731
        if name == "convolution":
            self.parts["conv"] += size(args[0], args[1], out)
        elif name.endswith("batch_norm"):
            self.parts["norm"] += 2 * size(args[0]) + size(out[0])  # once for statistics, once to normalise
        elif name == "relu" and args[0].ndim == 4:  # not the one in the head
            self.parts["norm"] += size(args[0], out)
        elif name == "add" and args[0].ndim == 4:
            self.parts["norm"] += size(args[0], args[1], out)
        elif name == "max_pool2d_with_indices":
            self.parts["pool"] += size(args[0], *out)
        return out


def test_the_forward_formulas_equal_counted_tensor_bytes_on_a_small_network():
    encoder = build_encoder(SMALL)
    convs = roofline.convolutions(encoder, 64)
    formula = dict.fromkeys(("conv", "norm", "pool"), 0.0)
    for work in roofline.forward_work(convs, "eager", batch=2):
        formula[work.part] += 2 * work.nbytes
    plain = PlainResNet(SMALL).to(torch.bfloat16)
    with torch.no_grad(), Counted() as counter:
        plain(torch.randn(2, 3, 64, 64, dtype=torch.bfloat16))
    # The formula pads the stem's three channels to four and skips the pixels that a strided 1x1 skips.
    stem = 2 * 2 * 3 * 64 * 64 / 3
    skipped = sum(2 * 2 * (conv.inputs - conv.reads) for conv in convs)
    assert formula["conv"] == counter.parts["conv"] + stem - skipped
    assert formula["norm"] == counter.parts["norm"]
    assert formula["pool"] == counter.parts["pool"]


class CountedByOurs(TorchDispatchMode):
    """Bytes of every activation and kernel that our operators and cuDNN's convolutions read and write, by part.

    Whatever else touches an activation of four dimensions, such as a sum of two gradients, is "other".
    """

    def __init__(self) -> None:
        super().__init__()
        self.parts = dict.fromkeys(("conv", "norm", "other"), 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        size = lambda *tensors: sum(t.numel() * t.element_size() for t in tensors if t is not None)  # noqa: E731
        if name == "convolution":
            self.parts["conv"] += size(args[0], args[1], out)
        elif name == "batch_norm_statistics":
            self.parts["norm"] += size(args[0])
        elif name == "batch_norm_apply":
            self.parts["norm"] += 2 * size(args[0]) + size(args[4])  # read, written, and the residual
        elif name == "batch_norm_pool":
            self.parts["norm"] += size(args[0], *out)
        elif name == "batch_norm_backward":
            grad, second, x, y, *_ = args
            residual, (grad_x, grad_residual, merged_sum, _) = args[7], out
            self.parts["norm"] += size(grad, second, x, y, residual, merged_sum)
            self.parts["norm"] += size(merged_sum if merged_sum.numel() else grad, x, residual, grad_x, grad_residual)
        elif name == "batch_norm_pool_backward":
            grad, second, x, peaks, places, *_ = args
            self.parts["norm"] += size(grad, second, peaks) + size(grad, second, places, x, out[0])
        elif name.startswith(("add", "relu", "threshold", "max_pool2d")):
            self.parts["other"] += size(*(t for t in args if isinstance(t, torch.Tensor) and t.dim() == 4))
        return out


@pytest.mark.parametrize("arch", ["resnet50", "resnet18"])
def test_the_formulas_of_our_encoders_equal_counted_tensor_bytes_on_a_small_network(arch, monkeypatch):
    monkeypatch.setattr(convolution, "instructions", lambda: "none")  # each convolution is torch's, as on a GPU
    encoder = build_encoder(dataclasses.replace(SMALL, arch=arch))
    convs = roofline.convolutions(encoder, 64)
    ours(encoder)
    formula = dict.fromkeys(("conv", "norm", "pool"), 0.0)
    for work in roofline.forward_work(convs, "bnrelu", batch=2, keep=False):
        formula[work.part] += 2 * work.nbytes
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), CountedByOurs() as counter:
        encoder(torch.randn(2, 3, 64, 64, dtype=torch.bfloat16))
    # Padding and skipped pixels as in eager mode.
    stem = 2 * 2 * 3 * 64 * 64 / 3
    skipped = sum(2 * 2 * (conv.inputs - conv.reads) for conv in convs)
    assert formula["conv"] == counter.parts["conv"] + stem - skipped
    assert formula["norm"] + formula["pool"] == counter.parts["norm"] and not counter.parts["other"]


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
@pytest.mark.parametrize("arch", ["resnet50", "resnet18"])
def test_the_formulas_equal_the_bytes_of_an_executed_step_of_a_query(arch, stem):
    """Forward and backward, the sums of two gradients among them: nothing is left to autograd to add."""
    encoder = build_encoder(dataclasses.replace(SMALL, arch=arch, stem=stem))
    convs = roofline.convolutions(encoder, 64)
    ours(encoder)
    works = roofline.forward_work(convs, "bnrelu", batch=2) + roofline.backward_work(convs, "bnrelu", batch=2)
    formula = sum(2 * work.nbytes for work in works if work.part in ("norm", "pool", "gradient add"))
    with FakeTensorMode(allow_non_fake_inputs=True), CountedByOurs() as counter:
        encoder(torch.randn(2, 3, 64, 64, dtype=torch.bfloat16)).sum().backward()
    assert counter.parts["norm"] == formula and not counter.parts["other"]
    with FakeTensorMode(allow_non_fake_inputs=True), CountedByOurs() as plain:  # the control: one output, two readers
        for module in encoder.modules():
            if isinstance(module, BatchNormAct):
                module.forward = functools.partial(_once, module)
        encoder(torch.randn(2, 3, 64, 64, dtype=torch.bfloat16)).sum().backward()
    assert plain.parts["other"]


def _once(norm: BatchNormAct, *arguments, twice: bool = False):
    y = BatchNormAct.forward(norm, *arguments)
    return (y, y) if twice else y


def ours(encoder: nn.Module) -> None:
    """Let our kernels normalise, in bf16."""
    for module in encoder.train().modules():
        if isinstance(module, BatchNormAct):
            module.impl = "triton"
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            module.to(torch.bfloat16)


class CountedInEagerMode(TorchDispatchMode):
    """Bytes that a backward pass of plain torch reads and writes, by part, and how often it adds two gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = dict.fromkeys(("conv", "pool", "gradient add"), 0)
        self.additions = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        size = lambda *tensors: sum(t.numel() * t.element_size() for t in tensors)  # noqa: E731
        if name == "convolution_backward":
            gradient, x, weight, gradient_of_x = *args[:3], out[0]
            self.parts["conv"] += 0 if gradient_of_x is None else size(gradient, gradient_of_x, weight)
            self.parts["conv"] += size(gradient, x, weight, weight)  # the weights' gradient is added to what there is
        elif name == "max_pool2d_with_indices_backward":
            self.parts["pool"] += size(args[0], args[-1], out)
        elif name in ("add", "add_") and args[0].ndim == 4:
            self.parts["gradient add"] += size(*args[:2], out)
            self.additions += 1
        return out


def test_the_formulas_equal_the_bytes_of_a_backward_pass_in_eager_mode():
    """The additions of the gradients of 16 blocks' inputs among them, and torch's pooling indices of eight bytes."""
    convs = roofline.convolutions(build_encoder(SMALL), 64)
    plain = PlainResNet(SMALL).to(torch.bfloat16)
    with FakeTensorMode(allow_non_fake_inputs=True):
        z = plain(torch.randn(2, 3, 64, 64, dtype=torch.bfloat16))
        with CountedInEagerMode() as counter:
            z.sum().backward()
    formula = dict.fromkeys((*counter.parts, "norm", "dgrad", "wgrad"), 0.0)
    for work in roofline.backward_work(convs, "eager", batch=2):
        formula[work.part] += 2 * work.nbytes
    assert counter.additions == 16 and counter.parts["gradient add"] == formula["gradient add"]
    assert counter.parts["pool"] == formula["pool"]
    stem = 2 * 2 * 3 * 64 * 64 / 3
    skipped = sum(2 * 2 * (conv.inputs - conv.reads) for conv in convs)
    assert counter.parts["conv"] == formula["dgrad"] + formula["wgrad"] - stem + skipped


@pytest.mark.parametrize(("form", "places"), [("none", ["inner"]), ("plain", ["last"]), ("dual", ["last", "shortcut"])])
def test_our_own_batch_norm_cannot_beat_its_bound(form, places):
    """What the kernels move, by their own formula, is what the bound counts, besides some vectors."""
    shape = (8, 64, 32, 32)
    activation = 2 * 8 * 64 * 32 * 32
    for passes, backward in ((roofline.FORWARD_PASSES, False), (roofline.BACKWARD_PASSES, True)):
        bytes_moved = batch_norm.cost(shape, 2, residual=form, backward=backward)[0] / activation
        bound = sum(passes["bnrelu"][place] for place in places)
        assert bound <= bytes_moved < bound + 0.05


def test_an_unknown_level_is_refused(resnet50):
    with pytest.raises(ValueError, match="bnrelu"):
        roofline.seconds_per_pair(resnet50, "magic", 256, 1e12, 1e12)
