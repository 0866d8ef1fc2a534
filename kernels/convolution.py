"""Convolution of fp32 and bf16 activations on a CPU, each of its three products by the fastest of four ways.

A convolution makes three products: of the input and the weights (forward), of the gradient and the weights (the
input's gradient), and of the gradient and the input (the weights' gradient). Four ways compute each:

    direct     torch's own convolution, which is oneDNN's
    product    one matrix product, of the weights and the windows of the input laid out as rows [N H W, k k C]
    widened    in fp32, by the faster of the two above there, of bf16 tensors that are widened before and rounded after
    winograd   of a 3x3 layer of stride 1, with 2.25 times fewer multiplications in fp32 and 4 times fewer in bf16, by
               compiled loops and, for many channels, matrix products (`kernels/cpu/winograd.py`)

All accumulate in fp32 and round once to bf16, so that they differ as two orders of a sum differ. Which is fastest
depends on the instructions of a processor (`Instructions`) and on the layer; `choose` is the rule, and bench/NOTES.md
has the times that it was taken from. Direct is what everything that was not measured takes.

The windows of a 3x3 layer are nine times its input. Each row of a window is k C consecutive numbers in channels-last
memory, so they are copied in runs, and of channels-last weights the matrix is a view.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmoco.kernels.dispatch import HAS_NUMBA, is_traced

__all__ = ["Layer", "choose", "conv2d", "cost", "instructions", "saving"]

Way = Literal["direct", "product", "widened", "winograd"]
Pass = Literal["forward", "input", "weight"]
LARGE_WEIGHTS = 2**20  # numbers: 4 MB in fp32, twice the cache of a core
Instructions = Literal["amx", "bf16 at full rate", "bf16 at half rate", "none"]


class Layer(NamedTuple):
    """Sizes of a convolution with square kernels, strides and paddings; `rows` is N x H x W of its output."""

    inputs: int
    outputs: int
    kernel: int
    stride: int
    padding: int
    rows: int


@functools.cache
def instructions() -> Instructions:
    """What this processor multiplies bf16 numbers with.

    "bf16 at half rate" is AVX-512's dot product of bf16 pairs on Intel's processors without AMX, or with AMX hidden by
    a virtual machine: half as many multiplications a second as in fp32, where AMD's Zen 5 makes twice as many.
    """
    flags: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    if flags.get("amx_bf16"):
        return "amx"
    if not flags.get("avx512_bf16"):
        return "none"
    return "bf16 at half rate" if "Intel" in str(flags.get("cpu_name")) else "bf16 at full rate"


def choose(
    layer: Layer, product: Pass, by: Instructions, dtype: torch.dtype = torch.bfloat16, loops: bool = True
) -> Way:
    """The fastest way to make one of the three products of a layer of `dtype`, on a processor with `by`.

    `loops`: whether there are compiled ones, which "winograd" needs.
    """
    if loops and _by_winograd(layer, by, dtype):
        return "winograd"
    if product == "weight" and layer.kernel == 1 and layer.stride > 1 and layer.inputs < 16:
        return "product"  # oneDNN's, in torch 2.13 and 2.14, writes beyond its memory
    if dtype == torch.float32:
        # Both are Intel's with AVX-512, and fp32 does without AMX. AMD's run products at half of oneDNN's rate.
        return _in_fp32(layer, product) if by in ("bf16 at half rate", "amx") else "direct"
    if by == "bf16 at full rate":
        return _at_full_rate(layer, product)
    if by == "bf16 at half rate":
        return _at_half_rate(layer, product)
    return "direct"


def _by_winograd(layer: Layer, by: Instructions, dtype: torch.dtype) -> bool:
    sizes = (layer.inputs, layer.outputs)
    if (layer.kernel, layer.stride, layer.padding) != (3, 1, 1) or any(channels % 16 for channels in sizes):
        return False
    # Few rows do not pay for the transform of the weights, nor few channels for that of the images.
    channels, by_blocks = min(sizes), max(sizes) <= 128
    if dtype == torch.float32:
        many = channels >= 32 and layer.rows >= (512 if by_blocks else max(512, channels))
        return many and by in ("bf16 at half rate", "amx")
    return layer.rows >= (2 * channels if by_blocks else channels // 4) and by == "bf16 at half rate"


def _in_fp32(layer: Layer, product: Pass) -> Way:
    if product == "input" and layer.stride > 1:
        return "direct"
    # Weights that no core's cache holds: oneDNN reorders them at each call, which few rows do not pay for.
    large = layer.kernel**2 * layer.inputs * layer.outputs >= LARGE_WEIGHTS // (2 if product == "weight" else 1)
    few = layer.rows <= (4 * max(layer.inputs, layer.outputs) if layer.kernel == 1 else 2 * layer.outputs)
    return "product" if large and few else "direct"


def _at_full_rate(layer: Layer, product: Pass) -> Way:
    if product == "input" and layer.stride > 1:
        return "direct"
    if layer.kernel == 1:
        few = layer.rows <= 4 * max(layer.inputs, layer.outputs)
        return "product" if few or product == "weight" and layer.rows <= 25088 else "direct"
    few = layer.rows <= (8 if product == "weight" else 2) * layer.outputs
    return "product" if few else "direct"


def _at_half_rate(layer: Layer, product: Pass) -> Way:
    # Multiplications for each number that is widened or rounded; strided, most of the input is only that.
    area = layer.kernel**2 * layer.inputs * layer.outputs
    worth = area >= 45 * (layer.stride**2 * layer.inputs + layer.outputs)
    if product == "weight":
        return "product" if layer.rows < 512 else "widened" if worth else "direct"
    # For few rows, widening the weights takes too large a part, unless the product is so much faster in fp32.
    enough = layer.rows >= min(1024, 2 * layer.outputs) or _in_fp32(layer, product) == "product"
    return "widened" if worth and enough else "direct"


def conv2d(
    x: Tensor, weight: Tensor, *, stride: int = 1, padding: int = 0, impl: Literal["auto", "reference"] = "auto"
) -> Tensor:
    """Convolution without bias of x [N, C, H, W] and weight [O, C, k, k], channels-last; differentiable once in both.

    impl="auto" is `choose`'s ways for fp32 and bf16 on a CPU, where neither torch.compile nor torch.jit traces it nor
    autocast is on, and torch's own convolution otherwise; "reference" is always that. Raises ValueError on another
    impl, and what torch raises for tensors that do not fit together.
    """
    if impl not in ("auto", "reference"):
        raise ValueError(f"impl must be auto or reference, not {impl!r}")
    if impl == "auto" and _takes(x, weight, padding):
        loops = HAS_NUMBA and not is_traced(x) and not is_traced(weight)
        ways = _ways(x.shape, weight.shape, stride, padding, instructions(), x.dtype, loops)
        if set(ways[1:]) != {"direct"}:
            return _Convolution.apply(x, weight, ways)
    return F.conv2d(x, weight, stride=stride, padding=padding)


def _takes(x: Tensor, weight: Tensor, padding: int) -> bool:
    # What does not fit together is torch's, too: it says what is wrong.
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_autocast_enabled("cpu"):
        return False
    known = x.device.type == weight.device.type == "cpu" and x.dtype == weight.dtype in (torch.float32, torch.bfloat16)
    if not known or not x.dim() == weight.dim() == 4 or not x.layout == weight.layout == torch.strided:
        return False
    (_, inputs, *sides), (_, channels, *kernel) = x.shape, weight.shape
    fit = inputs == channels and kernel[0] == kernel[1] <= min(sides) + 2 * padding
    return fit and x.numel() > 0 and weight.numel() > 0 and not x.is_neg() and not weight.is_neg()


class _Ways(NamedTuple):
    layer: Layer
    forward: Way
    input: Way
    weight: Way


@functools.lru_cache(1024)
def _ways(
    x: torch.Size,
    weight: torch.Size,
    stride: int,
    padding: int,
    by: Instructions,
    dtype: torch.dtype,
    loops: bool,
) -> _Ways:
    layer = layer_of(x, weight, stride, padding)
    return _Ways(layer, *(choose(layer, each, by, dtype, loops) for each in ("forward", "input", "weight")))


def layer_of(x: torch.Size, weight: torch.Size, stride: int, padding: int) -> Layer:
    """The `Layer` of an input [N, C, H, W] and weights [O, C, k, k]."""
    samples, inputs, *sides = x
    outputs, _, kernel, _ = weight
    height, width = ((side + 2 * padding - kernel) // stride + 1 for side in sides)
    return Layer(inputs, outputs, kernel, stride, padding, samples * height * width)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, ways: _Ways) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.ways = ways
        return forward(x, weight, ways.layer, ways.forward)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (x, weight), (layer, _, *ways) = ctx.saved_tensors, ctx.ways
        grad = grad.resolve_neg().contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", enabled=False):  # which the forward pass had not, and which would round products
            return *_gradients(grad, x, weight, layer, ctx.needs_input_grad[:2], *ways), None


def _gradients(
    grad: Tensor, x: Tensor, weight: Tensor, layer: Layer, needs: tuple[bool, bool], by_input: Way, by_weight: Way
) -> tuple[Tensor | None, Tensor | None]:
    if by_input == by_weight == "direct":
        return _by_torch(grad, x, weight, layer, needs)
    if by_input == by_weight == "widened":  # each tensor once
        wide = (_in_fp32(layer, "input"), _in_fp32(layer, "weight"))
        grads = _gradients(grad.float(), x.float(), weight.float(), layer, needs, *wide)
        grad_x, grad_weight = (each if each is None else each.to(x.dtype) for each in grads)
        return grad_x, grad_weight
    return (
        input_gradient(grad, x, weight, layer, by_input) if needs[0] else None,
        weight_gradient(grad, x, weight, layer, by_weight) if needs[1] else None,
    )


def forward(x: Tensor, weight: Tensor, layer: Layer, way: Way) -> Tensor:
    """The convolution [N, O, H, W], channels-last, made in the way asked for."""
    if way == "widened":
        return forward(x.float(), weight.float(), layer, _in_fp32(layer, "forward")).to(x.dtype)
    if way == "winograd":
        return _winograd().forward(*_laid_out(x, weight), _tile(x))
    if way == "product":
        product = _windows(x, layer.kernel, layer.stride, layer.padding) @ _rows(weight).T
        return _as_images(product, x.shape[0], _side(x.shape[2], layer))
    return F.conv2d(x, weight, stride=layer.stride, padding=layer.padding)


def input_gradient(grad: Tensor, x: Tensor, weight: Tensor, layer: Layer, way: Way) -> Tensor:
    """The gradient of x, made in the way asked for; "product" only at stride 1."""
    if way == "widened":
        wide = _in_fp32(layer, "input")
        return input_gradient(grad.float(), x.float(), weight.float(), layer, wide).to(x.dtype)
    if way == "winograd":
        return _winograd().input_gradient(*_laid_out(grad, weight), _tile(x))
    if way == "direct":
        return _by_torch(grad, x, weight, layer, (True, False))[0]
    # The convolution of the gradient and the weights mirrored, inputs and outputs exchanged.
    mirrored = weight.flip(2, 3).permute(2, 3, 0, 1).reshape(-1, layer.inputs)
    product = _windows(grad, layer.kernel, 1, layer.kernel - 1 - layer.padding) @ mirrored
    return _as_images(product, x.shape[0], x.shape[2])


def weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, layer: Layer, way: Way) -> Tensor:
    """The gradient of the weights, channels-last, made in the way asked for."""
    if way == "widened":
        wide = _in_fp32(layer, "weight")
        return weight_gradient(grad.float(), x.float(), weight.float(), layer, wide).to(x.dtype)
    if way == "winograd":
        return _winograd().weight_gradient(*_laid_out(grad, x), _tile(x))
    if way == "direct":
        return _by_torch(grad, x, weight, layer, (False, True))[1]
    rows = grad.permute(0, 2, 3, 1).reshape(-1, layer.outputs)
    product = rows.T @ _windows(x, layer.kernel, layer.stride, layer.padding)
    return product.view(layer.outputs, layer.kernel, layer.kernel, layer.inputs).permute(0, 3, 1, 2)


def _winograd() -> ModuleType:
    return importlib.import_module("fastmoco.kernels.cpu.winograd")  # which imports numba


def _laid_out(*tensors: Tensor) -> list[Tensor]:
    return [tensor.contiguous(memory_format=torch.channels_last) for tensor in tensors]


def _tile(x: Tensor) -> Literal[2, 4]:
    return 2 if x.dtype == torch.float32 or min(x.shape[2:]) <= 2 else 4


def _by_torch(grad: Tensor, x: Tensor, weight: Tensor, layer: Layer, needs: tuple[bool, bool]) -> tuple:
    sizes = ([side] * 2 for side in (layer.stride, layer.padding, 1))
    return torch.ops.aten.convolution_backward(grad, x, weight, None, *sizes, False, [0, 0], 1, [*needs, False])[:2]


def _windows(x: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    # [N H W of the output, kernel kernel C]
    samples, channels, height, width = x.shape
    images = x.permute(0, 2, 3, 1)
    if kernel == 1:
        return images[:, ::stride, ::stride].reshape(-1, channels)
    images = images.contiguous()  # as it is where x is channels-last
    padded = F.pad(images, (0, 0, padding, padding, padding, padding)) if padding else images
    height, width = height + 2 * padding, width + 2 * padding
    down, right = (height - kernel) // stride + 1, (width - kernel) // stride + 1
    row = width * channels
    windows = padded.as_strided(
        (samples, down, right, kernel, kernel * channels),
        (height * row, stride * row, stride * channels, row, 1),
    )
    return windows.reshape(samples * down * right, -1)


def _rows(weight: Tensor) -> Tensor:
    return weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1)


def _as_images(product: Tensor, samples: int, height: int) -> Tensor:
    return product.view(samples, height, -1, product.shape[1]).permute(0, 3, 1, 2)


def _side(side: int, layer: Layer) -> int:
    return (side + 2 * layer.padding - layer.kernel) // layer.stride + 1


def saving(layer: Layer, dtype: torch.dtype) -> float:
    """How many times fewer multiplications than a convolution's `conv2d` makes for a layer on this processor.

    1, or what Winograd's algorithm saves where tiles fill the images: then no less is multiplied.
    """
    winograd = choose(layer, "forward", instructions(), dtype, HAS_NUMBA) == "winograd"
    return (2.25 if dtype == torch.float32 else 4.0) if winograd else 1.0


def cost(layer: Layer, pixels: int, dtype: torch.dtype) -> tuple[int, float]:
    """(bytes, flops) of the three products of a layer with an input of `pixels` numbers.

    Each product reads two of input, weights and output, and writes the third, once.
    """
    weights = layer.outputs * layer.inputs * layer.kernel**2
    numbers = pixels + weights + layer.rows * layer.outputs
    return 3 * numbers * dtype.itemsize, 6 * layer.rows * weights / saving(layer, dtype)
