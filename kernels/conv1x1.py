"""1x1 convolution of channels-last activations between two batch norms, forward only.

Such a convolution is a matrix product, y [rows, outputs] = act(x) [rows, inputs] weight^T, with rows = samples x height
x width. Here act is nothing, or the batch norm and ReLU of the layer before, applied as x is read, so that the
normalised tensor never exists; and each tile of y, while it is in registers, gives the moments of the batch norm that
follows, so that y is not read for them. Passes over activations, and those of a convolution between our batch norms:

    plain        x -> y                       x -> y | stats y
    normalised   x -> y                       x -> act | act -> y | stats y

A program has one group of samples, a block of output channels and a run of rows, taken tile by tile. The loops over
tiles and over input channels are one to the compiler, so that the next tile is on its way while this one is stored.
Tiles are held transposed, channels by rows: a warp then holds whole channels, and their sums are a few shuffles, where
rows by channels would take them across all warps and 32 registers for each vector of channels.

Mean and sum of squared deviations grow by Chan, Golub and LeVeque's merge, tile by tile; the second stage of batch norm
adds the programs' in a fixed order: no atomics, so runs are bit-equal. The statistics are of y before it is rounded to
be stored. Products accumulate in fp32: of bf16 or fp16 as they are, of fp32 by three-term tf32 (fp32 to rounding).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmoco.kernels import batch_norm_kernels, reference
from fastmoco.kernels.batch_norm import (
    MAX_SPLITS,
    Measured,
    Norm,
    by_kernel,
    check_forward_only,
    check_measured,
    check_vector,
    finish,
)
from fastmoco.kernels.tiles import Variant, tiles

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
INTERPRETER_PROCESSORS = 4  # what rows are cut for where there is no GPU
_TYPE_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@triton.jit
def _load(base, row, rows, column, columns):
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    return tl.load(base + row[:, None] * columns + column[None, :], mask=mask, other=0.0)


@triton.jit
def _product(left, right, total, PRECISION: tl.constexpr):
    if INTERPRETED:  # the interpreter would multiply the bit patterns of bf16
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, total, input_precision=PRECISION)


@triton.jit
def _merge(mean, squares, seen, values, count, inside):
    # Chan, Golub and LeVeque's merge of (count, mean, squares) with those of a tile, of `count` rows inside.
    tile_mean = tl.sum(tl.where(inside[None, :], values, 0.0), 1) / count
    deviation = tl.where(inside[None, :], values - tile_mean[:, None], 0.0)
    delta = tile_mean - mean
    share = count / (seen + count)
    return mean + delta * share, squares + tl.sum(deviation * deviation, 1) + delta * delta * (seen * share)


@triton.jit
def convolve(x, kernel, y, partial, weight, bias, moments, rows, inputs, outputs, split_rows,
             BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, PRECISION: tl.constexpr):
    columns = tl.cdiv(outputs, BLOCK_OUT)
    out = tl.program_id(0) % columns * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    split, splits = tl.program_id(0) // columns, tl.num_programs(0) // columns
    group, groups = tl.program_id(1), tl.num_programs(1)
    first = (group * rows + split * split_rows).to(tl.int64)
    count = tl.minimum(split_rows, rows - split * split_rows)
    x += first * inputs
    y += first * outputs
    mean = tl.zeros([BLOCK_OUT], tl.float32)
    squares = tl.zeros([BLOCK_OUT], tl.float32)
    for start in tl.range(0, count, BLOCK_ROWS, flatten=True):
        row = start + tl.arange(0, BLOCK_ROWS)
        total = tl.zeros([BLOCK_OUT, BLOCK_ROWS], tl.float32)
        for entry in range(0, inputs, BLOCK_IN):
            column = entry + tl.arange(0, BLOCK_IN)
            values = _load(x, row, count, column, inputs)
            if moments is not None:
                vectors = batch_norm_kernels.vectors(weight, bias, moments, group, groups, inputs, column)
                normal = batch_norm_kernels.affine(values.to(tl.float32), *vectors)
                values = tl.where(normal < 0, 0.0, normal).to(values.dtype)  # not a maximum: NaN stays NaN
            total = _product(_load(kernel, out, outputs, column, inputs), tl.trans(values), total, PRECISION)
        mask = (row < count)[None, :] & (out < outputs)[:, None]
        tl.store(y + row[None, :] * outputs + out[:, None], total.to(y.dtype.element_ty), mask=mask)
        mean, squares = _merge(mean, squares, start, total, tl.minimum(count - start, BLOCK_ROWS), row < count)
    at = partial + (group * splits + split) * outputs + out
    tl.store(at, mean, mask=out < outputs)
    tl.store(at + groups * splits * outputs, squares, mask=out < outputs)


def conv1x1(x: Tensor, kernel: Tensor, norm: Norm, groups: int = 1, *, entry: Measured | None = None,
            momentum: float = 0.1, eps: float = 1e-5,
            impl: Literal["auto", "triton", "reference"] = "auto") -> tuple[Tensor, Measured]:
    """Convolve, and measure the result for the batch norm that follows: (y [N, Cout, H, W] channels-last, that norm).

    x [N, Cin, H, W] channels-last, kernel [Cout, Cin, 1, 1] of the same dtype: fp32, bf16 or fp16 (the twin also takes
    fp64). With `entry`, ReLU(batch norm(x)) is convolved, rounded to x's dtype as if it had been stored. `norm` is not
    applied: its running statistics move as `batch_norm_act` would move them, and it comes back with the moments of
    each group of N / groups consecutive samples, for `batch_norm.normalise`. Forward only: ValueError where a gradient
    would be wanted, and for what does not fit.
    """
    _check(x, kernel, norm, groups, entry)
    running = norm.running or (None, None)
    with torch.no_grad():
        if by_kernel(x, impl):
            y, moments = _conv1x1(x, kernel, *(entry or (None, None, None)), *running, groups, momentum, eps)
        else:
            y, moments = reference.conv1x1(x, kernel, norm.running, groups, entry=entry, momentum=momentum, eps=eps)
    return y, Measured(norm.weight, norm.bias, moments)


def cost(shape: tuple[int, int, int, int], outputs: int, element_size: int, groups: int = 1, *,
         normalised: bool = False) -> tuple[int, int]:
    """(bytes, flops) of convolving `shape` [N, Cin, H, W]: x and kernel read, y written, and the vectors (fp32).

    The partial sums between the two stages stay in cache and are not counted.
    """
    samples, inputs, height, width = shape
    rows = samples * height * width
    vectors = outputs * (2 * groups + 4) + (inputs * (2 * groups + 2) if normalised else 0)
    flops = 2 * rows * inputs * outputs + 6 * rows * outputs + (5 * rows * inputs if normalised else 0)
    return element_size * (rows * (inputs + outputs) + inputs * outputs) + 4 * vectors, flops


def _check(x: Tensor, kernel: Tensor, norm: Norm, groups: int, entry: Measured | None) -> None:
    if x.dim() != 4 or not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"x must be [N, C, H, W] channels-last, not {list(x.shape)} of strides {x.stride()}")
    samples, inputs = x.shape[:2]
    if kernel.dim() != 4 or kernel.shape[1:] != (inputs, 1, 1) or not kernel.flatten(1).is_contiguous():
        raise ValueError(f"kernel must be contiguous [outputs, {inputs}, 1, 1], not {list(kernel.shape)}")
    if (kernel.dtype, kernel.device) != (x.dtype, x.device):
        raise ValueError(f"kernel is {kernel.dtype} on {kernel.device}, x {x.dtype} on {x.device}")
    if groups < 1 or samples < 1 or samples % groups:
        raise ValueError(f"{list(x.shape)}: {samples} samples do not divide into {groups} equal groups")
    if x.numel() // inputs // groups < 2:
        raise ValueError(f"training needs more than one value per channel and group: {list(x.shape)}, groups={groups}")
    for name, vector in zip(("weight", "bias", "running mean", "running variance"), (*norm[:2], *(norm.running or ()))):
        check_vector(name, vector, x, kernel.shape[0])
    if entry is not None:
        check_measured(x, entry, groups)
    check_forward_only("conv1x1", x, kernel, *norm[:2], *(entry or ()))


@torch.library.custom_op("fastmoco::conv1x1", mutates_args=("running_mean", "running_var"))
def _conv1x1(x: Tensor, kernel: Tensor, weight: Tensor | None, bias: Tensor | None, moments: Tensor | None,
             running_mean: Tensor | None, running_var: Tensor | None, groups: int, momentum: float,
             eps: float) -> tuple[Tensor, Tensor]:
    capability = torch.cuda.get_device_capability(x.device) if x.is_cuda else None
    options, resident = _options(x.dtype, capability)
    (outputs, inputs), rows = kernel.shape[:2], x.numel() // x.shape[1] // groups
    columns = triton.cdiv(outputs, options["BLOCK_OUT"])
    split_rows, splits = _split(rows, columns * groups, options["BLOCK_ROWS"], resident * _processors(x.device))
    y = _empty_like(x, outputs)
    partial = x.new_empty((2, groups, splits, outputs), dtype=torch.float32)
    with torch.cuda.device_of(x):
        convolve[(columns * splits, groups)](x, kernel, y, partial, weight, bias, moments, rows, inputs, outputs,
                                             split_rows, **options)
        return y, finish(partial, running_mean, running_var, rows, split_rows, momentum, eps)


@_conv1x1.register_fake
def _(x, kernel, weight, bias, moments, running_mean, running_var, groups, momentum, eps):
    outputs = kernel.shape[0]
    return _empty_like(x, outputs), x.new_empty((2, groups, outputs), dtype=torch.float32)


def _empty_like(x: Tensor, channels: int) -> Tensor:
    shape = (x.shape[0], channels, *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _split(rows: int, others: int, block_rows: int, resident: int) -> tuple[int, int]:
    # All programs are resident at once, so that none is a tail; each takes whole tiles.
    wanted = min(MAX_SPLITS, max(1, resident // others))
    split_rows = triton.cdiv(triton.cdiv(rows, wanted), block_rows) * block_rows
    return split_rows, triton.cdiv(rows, split_rows)


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETER_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def _options(dtype: torch.dtype, capability: tuple[int, int] | int | None) -> tuple[dict[str, Any], int]:
    wide = dtype is torch.float32
    row = tiles("conv1x1.fp32" if wide else "conv1x1", capability)
    rows, out, inputs, resident = row.block
    return {"BLOCK_ROWS": rows, "BLOCK_OUT": out, "BLOCK_IN": inputs, "PRECISION": "tf32x3" if wide else "tf32",
            "num_warps": row.num_warps, "num_stages": row.num_stages}, resident


def variants(arch: int) -> list[Variant]:
    """What the compile gate compiles: plain and normalised, in each type."""
    return [_variant(arch, dtype, normalised) for dtype in _TYPE_NAMES for normalised in (False, True)]


def _variant(arch: int, dtype: torch.dtype, normalised: bool) -> Variant:
    options, _ = _options(dtype, arch)
    warps, stages = options.pop("num_warps"), options.pop("num_stages")
    name = _TYPE_NAMES[dtype]
    types = dict.fromkeys(("x", "kernel", "y"), f"*{name}")
    types |= dict.fromkeys(("partial", "weight", "bias", "moments"), "*fp32")
    types |= dict.fromkeys(("rows", "inputs", "outputs", "split_rows"), "i32")
    options |= {} if normalised else dict.fromkeys(("weight", "bias", "moments"))
    signature = {argument: "constexpr" if argument in options else types[argument] for argument in convolve.arg_names}
    label = f"conv1x1.{'normalised' if normalised else 'plain'} {name}"
    return Variant(label, convolve, signature, options, warps, stages, divisible=("inputs", "outputs"), streaming=True,
                   native_mma=dtype is not torch.float32)
