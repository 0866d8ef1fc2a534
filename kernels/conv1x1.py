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

Which tiles, and where it pays (`pays`). Every tile is read from L2, so R rows x O outputs earn R O / (R + O) flops a
byte: 43 at 128 x 64, 64 at 128 x 128, which at 5.5 TB/s are 235 and 352 TFLOP/s. HBM asks 2 (inputs + outputs) bytes a
row at 3 TB/s; cuDNN comes near that, or 790 TFLOP/s, and then 2 outputs are read for the statistics and, with `entry`,
4 inputs to normalise. For ResNet-50, 224 px, 256 pairs, bf16 and an H100 that makes, in microseconds and with what is
lost where programs get different numbers of tiles (layers that widen have an `entry`):

    side, channels          separate   128 x 64   128 x 128      side, channels     separate   128 x 64   128 x 128
    56    64 ->   64             103         69          69      28   512 ->  256        137        236         157
    56   256 ->   64             206        171         171      14  1024 ->  256         51        132          88
    56    64 ->  256             377        171         171      14   256 -> 1024         94        118          79
    56   256 ->  128             274        231         206      14  1024 ->  512         84        245         164
    28   512 ->  128             103        123          86       7  2048 ->  512         38        151         101
    28   128 ->  512             188        116          86       7   512 -> 2048         59        123          82

So up to 64 channels on the narrower side take 128 x 64 tiles, of which two blocks are resident, and more 128 x 128, of
which one is; and beyond 128 it does not pay: what 256 -> 1024 seems to gain, L2 gives the separate passes as well.
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
    machine,
)
from fastmoco.kernels.tiles import Tiles, Variant, tiles

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
NARROW, PAYING = 64, 128  # channels of the narrower side, at most, for small tiles, and for being worth it at all
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
def convolve(
    x,
    kernel,
    y,
    partial,
    weight,
    bias,
    moments,
    rows,
    inputs,
    outputs,
    split_rows,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    PRECISION: tl.constexpr,
):
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


def conv1x1(
    x: Tensor,
    kernel: Tensor,
    norm: Norm,
    groups: int = 1,
    *,
    entry: Measured | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
    impl: Literal["auto", "triton", "reference"] = "auto",
) -> tuple[Tensor, Measured]:
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


def pays(inputs: int, outputs: int) -> bool:
    """Whether by the arithmetic above `conv1x1` beats cuDNN with the passes of batch norm around it, on an H100."""
    return min(inputs, outputs) <= PAYING


def cost(
    shape: tuple[int, int, int, int], outputs: int, element_size: int, groups: int = 1, *, normalised: bool = False
) -> tuple[int, int]:
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
def _conv1x1(
    x: Tensor,
    kernel: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    moments: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    groups: int,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    (outputs, inputs), rows = kernel.shape[:2], x.numel() // x.shape[1] // groups
    capability, processors = machine(x.device)
    row = tiles(_entry(x.dtype, inputs, outputs), capability)
    columns, split_rows, splits = _split(row, rows, outputs, groups, processors)
    y = _empty_like(x, outputs)
    partial = x.new_empty((2, groups, splits, outputs), dtype=torch.float32)
    with torch.cuda.device_of(x):
        convolve[(columns * splits, groups)](
            x, kernel, y, partial, weight, bias, moments, rows, inputs, outputs, split_rows, **_options(row, x.dtype)
        )
        return y, finish(partial, running_mean, running_var, rows, split_rows, momentum, eps)


@_conv1x1.register_fake
def _(x, kernel, weight, bias, moments, running_mean, running_var, groups, momentum, eps):
    outputs = kernel.shape[0]
    return _empty_like(x, outputs), x.new_empty((2, groups, outputs), dtype=torch.float32)


def _empty_like(x: Tensor, channels: int) -> Tensor:
    shape = (x.shape[0], channels, *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _split(row: Tiles, rows: int, outputs: int, groups: int, processors: int) -> tuple[int, int, int]:
    # Blocks of channels, rows of a piece, pieces. All programs are resident at once, so that none is a tail.
    block_rows, block_out, _, resident = row.block
    columns = triton.cdiv(outputs, block_out)
    wanted = min(MAX_SPLITS, max(1, processors * resident // (columns * groups)))
    split_rows = triton.cdiv(triton.cdiv(rows, wanted), block_rows) * block_rows
    return columns, split_rows, triton.cdiv(rows, split_rows)


def _entry(dtype: torch.dtype, inputs: int, outputs: int) -> str:
    if dtype is torch.float32:
        return "conv1x1.fp32"
    return "conv1x1.wide" if min(inputs, outputs) > NARROW else "conv1x1"


def _options(row: Tiles, dtype: torch.dtype) -> dict[str, Any]:
    rows, out, inputs, _ = row.block
    return {
        "BLOCK_ROWS": rows,
        "BLOCK_OUT": out,
        "BLOCK_IN": inputs,
        "num_warps": row.num_warps,
        "num_stages": row.num_stages,
        "PRECISION": "tf32x3" if dtype is torch.float32 else "tf32",
    }


def variants(arch: int) -> list[Variant]:
    """What the compile gate compiles: plain and normalised, in each type, for narrow layers and for wide ones."""
    entries = dict.fromkeys((dtype, _entry(dtype, side, side)) for dtype in _TYPE_NAMES for side in (NARROW, PAYING))
    return [_variant(tiles(key[1], arch), *key, normalised) for key in entries for normalised in (False, True)]


def _variant(row: Tiles, dtype: torch.dtype, entry: str, normalised: bool) -> Variant:
    options = _options(row, dtype)
    warps, stages = options.pop("num_warps"), options.pop("num_stages")
    name = _TYPE_NAMES[dtype]
    types = dict.fromkeys(("x", "kernel", "y"), f"*{name}")
    types |= dict.fromkeys(("partial", "weight", "bias", "moments"), "*fp32")
    types |= dict.fromkeys(("rows", "inputs", "outputs", "split_rows"), "i32")
    options |= {} if normalised else dict.fromkeys(("weight", "bias", "moments"))
    signature = {argument: "constexpr" if argument in options else types[argument] for argument in convolve.arg_names}
    wide = " wide" * entry.endswith("wide")
    label = f"conv1x1.{'normalised' if normalised else 'plain'} {name}{wide}"
    return Variant(
        label,
        convolve,
        signature,
        options,
        warps,
        stages,
        divisible=("inputs", "outputs"),
        streaming=row.block[3] > 1,
        native_mma=dtype is not torch.float32,
    )
