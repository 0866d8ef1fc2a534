"""Batch norm + ReLU (+ residual, + the shortcut's own batch norm), statistics over groups of consecutive samples.

A channels-last tensor is a matrix [groups, rows, channels] with rows = samples of a group x height x width. Forward in
training: one read for the statistics, one read and one write to normalise, add and clip. Backward: one pass for the
per-channel sums, one for the gradient. Passes over activation-sized tensors, forward + backward:

    plain            stats x | x -> y                     sums dy x        | dy x -> dx            3 + 5
    + residual       stats x | x r -> y                   sums dy x y -> g | g x -> dx             4 + 7
    dual             stats x, r | x r -> y                sums dy x r      | dy x r -> dx dr       5 + 8

The ReLU mask is recomputed where that is free: from x (plain) or from x and r (dual), both read anyway. With a plain
residual, recomputing would read r where testing y > 0 reads y: the same bytes and exact, so y it is; and as the masked
gradient g is the residual's gradient, the first pass writes it and the second reads it in place of dy and y.

Every program keeps a partial result and a second, ordered stage adds them: no atomics, so runs are bit-equal.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmoco.kernels import reference
from fastmoco.kernels.tiles import Variant, tiles

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FINISH_CHANNELS = 8  # one 32-byte sector of fp32 a row: the most programs without wasting the partials' traffic
PROGRAMS_PER_MULTIPROCESSOR = 4  # of the reductions: all resident at once, so that none is a tail
MAX_SPLITS = 256  # a program of the second stage holds one channel block's partials of a group in registers


class Norm(NamedTuple):
    """One batch norm's tensors: weight and bias fp32 [C], running (mean [C], variance [C]) or None."""

    weight: Tensor
    bias: Tensor
    running: tuple[Tensor, Tensor] | None = None


def batch_norm_act(x: Tensor, weight: Tensor, bias: Tensor, running: tuple[Tensor, Tensor] | None, groups: int = 1, *,
                   residual: Tensor | None = None, residual_norm: Norm | None = None, relu: bool = True,
                   momentum: float = 0.1, eps: float = 1e-5, training: bool = True,
                   impl: Literal["auto", "triton", "reference"] = "auto") -> Tensor:
    """ReLU(BN(x) + residual), or ReLU(BN(x) + BN'(residual)) with `residual_norm`, in the layout and dtype of x.

    x is [N, C, H, W] channels-last or [N, C]; fp32, bf16 or fp16 (the twin also takes fp64), the statistics and
    weights fp32. In training the statistics are those of each group of N / groups consecutive samples (Ioffe and
    Szegedy, 2015), and `running` moves in place by the mean over groups of torch's update (unbiased variance).
    Otherwise `running` normalises. Nothing is saved under no_grad. Raises ValueError for what does not fit.
    """
    _check(x, weight, bias, running, groups, training)
    if residual_norm is not None and residual is None:
        raise ValueError("residual_norm needs a residual")
    if residual is not None:
        _check_residual(x, residual)
    if residual_norm is not None:
        _check(residual, *residual_norm, groups, training)
    if impl == "reference" or (impl == "auto" and not x.is_cuda):
        return reference.batch_norm_act(x, weight, bias, running, groups, residual=residual,
                                        residual_norm=residual_norm, relu=relu, momentum=momentum, eps=eps,
                                        training=training)
    if impl not in ("auto", "triton"):
        raise ValueError(f"impl must be auto, triton or reference, not {impl!r}")
    if x.dtype not in DTYPES:
        raise ValueError(f"the Triton kernel takes fp32, bf16 or fp16, not {x.dtype}")
    moments = _moments(x, running, groups, momentum, eps, training)
    side = (None, None, None)
    if residual_norm is not None:
        weight_2, bias_2, running_2 = residual_norm
        side = (weight_2, bias_2, _moments(residual, running_2, groups, momentum, eps, training))
    return apply(x, weight, bias, moments, residual, *side, relu, training)


def cost(shape: tuple[int, ...], element_size: int, groups: int = 1, *, residual: Literal["none", "plain", "dual"],
         backward: bool = False, relu: bool = True) -> tuple[int, int]:
    """(bytes, flops) of one training forward or backward of an activation `shape` [N, C, ...].

    Counts what must cross memory once a pass: activations (`element_size` bytes an element), weights, moments and
    running statistics (fp32). The partial sums between the two stages stay in cache and are not counted.
    """
    elements, channels = functools.reduce(int.__mul__, shape), shape[1]
    norms = 2 if residual == "dual" else 1
    if not backward:
        passes = {"none": 3, "plain": 4, "dual": 5}[residual]
        # statistics write two moments and move two running vectors; normalise reads moments, weight and bias
        small = norms * (2 * groups + 4 + 2 * groups + 2)
        return element_size * elements * passes + 4 * channels * small, elements * (6 * norms + 2)
    masked = residual == "plain" and relu
    passes = {"none": 5, "plain": 7 if masked else 5, "dual": 8}[residual]
    sums = norms + 1
    mask_vectors = 2 * norms if relu and not masked else 0
    # each pass reads the moments (and what the mask needs), the second also the sums and the weights
    small = 4 * norms * groups + 2 * mask_vectors + (norms if not mask_vectors else 0) + sums * (2 * groups + 1)
    return element_size * elements * passes + 4 * channels * small, elements * (10 * norms + 2)


def _check(x: Tensor, weight: Tensor, bias: Tensor, running: tuple[Tensor, Tensor] | None, groups: int,
           training: bool) -> None:
    if x.dim() not in (2, 4):
        raise ValueError(f"x must be [N, C] or [N, C, H, W], not {list(x.shape)}")
    if not x.is_contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.contiguous_format):
        raise ValueError("x must be channels-last: x.contiguous(memory_format=torch.channels_last)")
    samples, channels = x.shape[:2]
    if groups < 1 or x.numel() < 1 or samples % groups:
        raise ValueError(f"{list(x.shape)}: {samples} samples do not divide into {groups} equal groups")
    if training and x.numel() // channels // groups < 2:
        raise ValueError(f"training needs more than one value per channel and group: {list(x.shape)}, groups={groups}")
    if running is None and not training:
        raise ValueError("training=False needs running statistics")
    vectors = {"weight": weight, "bias": bias}
    if running is not None:
        vectors.update({"running mean": running[0], "running variance": running[1]})
    for name, vector in vectors.items():
        _check_vector(name, vector, x)


def _check_vector(name: str, vector: Tensor, x: Tensor) -> None:
    dtypes = (torch.float32,) if x.dtype in DTYPES else (torch.float32, torch.float64)
    if vector.shape != x.shape[1:2] or not vector.is_contiguous():
        raise ValueError(f"{name} must be contiguous [{x.shape[1]}], not {list(vector.shape)}")
    if vector.dtype not in dtypes or vector.device != x.device:
        raise ValueError(f"{name} must be fp32 on {x.device}, not {vector.dtype} on {vector.device}")


def _check_residual(x: Tensor, residual: Tensor) -> None:
    if (residual.shape, residual.dtype, residual.device) != (x.shape, x.dtype, x.device):
        raise ValueError(f"the residual must be {list(x.shape)} {x.dtype} on {x.device}, not {list(residual.shape)} "
                         f"{residual.dtype} on {residual.device}")
    if x.dim() == 4 and not residual.is_contiguous(memory_format=torch.channels_last):
        raise ValueError("the residual must be channels-last, as x")


def _moments(x: Tensor, running: tuple[Tensor, Tensor] | None, groups: int, momentum: float, eps: float,
             training: bool) -> Tensor:
    with torch.no_grad():
        if training:
            return statistics(x.detach(), *(running or (None, None)), groups, momentum, eps)
        return torch.stack([running[0], torch.rsqrt(running[1] + eps)])[:, None]


# ---------------------------------------------------------------------------------------------------------------------
# Kernels. `rows` are those of one group; a program works on one group, one block of channels.


@triton.jit
def _affine(x, mean, invstd, weight, bias):
    # Centred first: x * scale + shift would cancel where the mean is large beside the deviation.
    return (x - mean) * (invstd * weight) + bias


@triton.jit
def _statistics_kernel(x, partial, rows, channels, split_rows, BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
    split, group, splits = tl.program_id(0), tl.program_id(2), tl.num_programs(0)
    column = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    row = tl.arange(0, BLOCK_ROWS)[:, None]
    inside = (column < channels)[None, :]
    first = split * split_rows
    count = tl.minimum(split_rows, rows - first)
    tile = x + (group * rows + first).to(tl.int64) * channels + row * channels + column[None, :]
    head = tl.load(tile, mask=(row < count) & inside, other=0.0).to(tl.float32)
    # Deviations from the first tile's mean: their squares do not cancel however large the mean.
    shift = tl.sum(head, 0) / tl.minimum(count, BLOCK_ROWS)
    total = tl.zeros([BLOCK_ROWS, BLOCK_CHANNELS], tl.float32)
    square = tl.zeros([BLOCK_ROWS, BLOCK_CHANNELS], tl.float32)
    for start in range(0, count, BLOCK_ROWS):
        mask = (row < count - start) & inside
        values = tl.load(tile, mask=mask, other=0.0).to(tl.float32)
        deviation = tl.where(mask, values - shift[None, :], 0.0)
        total += deviation
        square += deviation * deviation
        tile += BLOCK_ROWS * channels
    total_sum = tl.sum(total, 0)
    mean = shift + total_sum / count
    squares = tl.maximum(tl.sum(square, 0) - total_sum * total_sum / count, 0.0)
    out = partial + (group * splits + split) * channels + column
    tl.store(out, mean, mask=column < channels)
    tl.store(out + tl.num_programs(2) * splits * channels, squares, mask=column < channels)


@triton.jit
def _finish_statistics_kernel(partial, moments, running_mean, running_var, rows, channels, split_rows, splits, groups,
                              momentum, eps, BLOCK_SPLITS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
    column = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    split = tl.arange(0, BLOCK_SPLITS)[:, None]
    inside = column < channels
    mask = (split < splits) & inside[None, :]
    count = tl.minimum(split_rows, rows - split * split_rows).to(tl.float32)
    mean_sum = tl.zeros([BLOCK_CHANNELS], tl.float32)
    var_sum = tl.zeros([BLOCK_CHANNELS], tl.float32)
    for group in range(0, groups):
        at = partial + group * splits * channels
        means = tl.load(at + split * channels + column[None, :], mask=mask, other=0.0)
        squares = tl.load(at + groups * splits * channels + split * channels + column[None, :], mask=mask, other=0.0)
        origin = tl.load(at + column, mask=inside, other=0.0)
        # Chan, Golub and LeVeque's merge of (count, mean, squares), about the first partial's mean.
        offset = tl.where(mask, means - origin[None, :], 0.0)
        delta = tl.sum(offset * count, 0) / rows
        total = tl.sum(squares, 0) + tl.sum(offset * offset * count, 0) - delta * delta * rows
        var = tl.maximum(total, 0.0) / rows
        tl.store(moments + group * channels + column, origin + delta, mask=inside)
        tl.store(moments + (groups + group) * channels + column, 1.0 / tl.sqrt(var + eps), mask=inside)
        mean_sum += origin + delta
        var_sum += var
    if running_mean is not None:
        old_mean = tl.load(running_mean + column, mask=inside, other=0.0)
        old_var = tl.load(running_var + column, mask=inside, other=0.0)
        unbiased = var_sum / groups * (rows / (rows - 1.0))
        tl.store(running_mean + column, (1 - momentum) * old_mean + momentum * (mean_sum / groups), mask=inside)
        tl.store(running_var + column, (1 - momentum) * old_var + momentum * unbiased, mask=inside)


@triton.jit
def _vectors(weight, bias, moments, group, groups, channels, column):
    inside = column < channels
    at = moments + group * channels + column
    return (tl.load(at, mask=inside, other=0.0)[None, :],
            tl.load(at + groups * channels, mask=inside, other=0.0)[None, :],
            tl.load(weight + column, mask=inside, other=0.0)[None, :],
            tl.load(bias + column, mask=inside, other=0.0)[None, :])


@triton.jit
def _apply_kernel(x, y, weight, bias, moments, residual, residual_weight, residual_bias, residual_moments, rows,
                  channels, RELU: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
    columns = tl.cdiv(channels, BLOCK_CHANNELS)
    column = tl.program_id(0) % columns * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    first = tl.program_id(0) // columns * BLOCK_ROWS
    group, groups = tl.program_id(1), tl.num_programs(1)
    row = tl.arange(0, BLOCK_ROWS)[:, None]
    mask = (row < rows - first) & (column < channels)[None, :]
    base = (group * rows + first).to(tl.int64) * channels
    tile = row * channels + column[None, :]
    values = tl.load(x + base + tile, mask=mask, other=0.0).to(tl.float32)
    mean, invstd, scale, shift = _vectors(weight, bias, moments, group, groups, channels, column)
    out = _affine(values, mean, invstd, scale, shift)
    if residual is not None:
        side = tl.load(residual + base + tile, mask=mask, other=0.0).to(tl.float32)
        if residual_moments is not None:
            mean, invstd, scale, shift = _vectors(residual_weight, residual_bias, residual_moments, group, groups,
                                                  channels, column)
            side = _affine(side, mean, invstd, scale, shift)
        out += side
    if RELU:
        out = tl.where(out < 0, 0.0, out)  # not a maximum: NaN stays NaN
    tl.store(y + base + tile, out.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _sums_kernel(grad, x, y, masked, partial, weight, bias, moments, residual, residual_weight, residual_bias,
                 residual_moments, rows, channels, split_rows, RELU: tl.constexpr, BLOCK_ROWS: tl.constexpr,
                 BLOCK_CHANNELS: tl.constexpr):
    split, group = tl.program_id(0), tl.program_id(2)
    splits, groups = tl.num_programs(0), tl.num_programs(2)
    column = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    row = tl.arange(0, BLOCK_ROWS)[:, None]
    first = split * split_rows
    count = tl.minimum(split_rows, rows - first)
    base = (group * rows + first).to(tl.int64) * channels
    tile = row * channels + column[None, :]
    mean, invstd, scale, shift = _vectors(weight, bias, moments, group, groups, channels, column)
    if residual is not None:
        mean_2, invstd_2, scale_2, shift_2 = _vectors(residual_weight, residual_bias, residual_moments, group, groups,
                                                      channels, column)
    total = tl.zeros([BLOCK_ROWS, BLOCK_CHANNELS], tl.float32)
    total_x = tl.zeros([BLOCK_ROWS, BLOCK_CHANNELS], tl.float32)
    total_2 = tl.zeros([BLOCK_ROWS, BLOCK_CHANNELS], tl.float32)
    for start in range(0, count, BLOCK_ROWS):
        mask = (row < count - start) & (column < channels)[None, :]
        g = tl.load(grad + base + tile, mask=mask, other=0.0).to(tl.float32)
        values = tl.load(x + base + tile, mask=mask, other=0.0).to(tl.float32)
        out = _affine(values, mean, invstd, scale, shift)
        if residual is not None:
            side = tl.load(residual + base + tile, mask=mask, other=0.0).to(tl.float32)
            out += _affine(side, mean_2, invstd_2, scale_2, shift_2)
        if y is not None:
            out = tl.load(y + base + tile, mask=mask, other=0.0).to(tl.float32)
        if RELU:
            g = tl.where(out <= 0, 0.0, g)
        if masked is not None:
            tl.store(masked + base + tile, g.to(masked.dtype.element_ty), mask=mask)
        total += g
        total_x += g * (values - mean)
        if residual is not None:
            total_2 += g * (side - mean_2)
        base += BLOCK_ROWS * channels
    out_column = partial + (group * splits + split) * channels + column
    array = groups * splits * channels
    tl.store(out_column, tl.sum(total, 0), mask=column < channels)
    tl.store(out_column + array, tl.sum(total_x * invstd, 0), mask=column < channels)
    if residual is not None:
        tl.store(out_column + 2 * array, tl.sum(total_2 * invstd_2, 0), mask=column < channels)


@triton.jit
def _finish_sums_kernel(partial, sums, totals, channels, splits, groups, BLOCK_SPLITS: tl.constexpr,
                        BLOCK_CHANNELS: tl.constexpr):
    column = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    array = tl.program_id(1)
    split = tl.arange(0, BLOCK_SPLITS)[:, None]
    inside = column < channels
    total = tl.zeros([BLOCK_CHANNELS], tl.float32)
    for group in range(0, groups):
        at = (array * groups + group) * channels
        tile = partial + at * splits + split * channels + column[None, :]
        group_sum = tl.sum(tl.load(tile, mask=(split < splits) & inside[None, :], other=0.0), 0)
        tl.store(sums + at + column, group_sum, mask=inside)
        total += group_sum
    tl.store(totals + array * channels + column, total, mask=inside)


@triton.jit
def _gradient_kernel(grad, x, grad_x, grad_residual, sums, weight, bias, moments, residual, residual_weight,
                     residual_bias, residual_moments, rows, channels, RELU: tl.constexpr, TRAINING: tl.constexpr,
                     BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
    columns = tl.cdiv(channels, BLOCK_CHANNELS)
    column = tl.program_id(0) % columns * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    first = tl.program_id(0) // columns * BLOCK_ROWS
    group, groups = tl.program_id(1), tl.num_programs(1)
    row = tl.arange(0, BLOCK_ROWS)[:, None]
    inside = column < channels
    mask = (row < rows - first) & inside[None, :]
    base = (group * rows + first).to(tl.int64) * channels
    tile = row * channels + column[None, :]
    g = tl.load(grad + base + tile, mask=mask, other=0.0).to(tl.float32)
    values = tl.load(x + base + tile, mask=mask, other=0.0).to(tl.float32)
    mean, invstd, scale, shift = _vectors(weight, bias, moments, group, groups, channels, column)
    out = _affine(values, mean, invstd, scale, shift)
    if residual is not None:
        side = tl.load(residual + base + tile, mask=mask, other=0.0).to(tl.float32)
        mean_2, invstd_2, scale_2, shift_2 = _vectors(residual_weight, residual_bias, residual_moments, group, groups,
                                                      channels, column)
        out += _affine(side, mean_2, invstd_2, scale_2, shift_2)
    if RELU:
        g = tl.where(out <= 0, 0.0, g)
    centred, centred_2 = g, g
    if TRAINING:
        # The gradient through the group's own mean and variance.
        sum_at = sums + group * channels + column
        mean_g = tl.load(sum_at, mask=inside, other=0.0)[None, :] / rows
        slope = tl.load(sum_at + groups * channels, mask=inside, other=0.0)[None, :] / rows
        centred = g - mean_g - (values - mean) * (invstd * slope)
        if residual is not None:
            slope = tl.load(sum_at + 2 * groups * channels, mask=inside, other=0.0)[None, :] / rows
            centred_2 = g - mean_g - (side - mean_2) * (invstd_2 * slope)
    tl.store(grad_x + base + tile, (centred * (scale * invstd)).to(grad_x.dtype.element_ty), mask=mask)
    if residual is not None:
        grad_side = centred_2 * (scale_2 * invstd_2)
        tl.store(grad_residual + base + tile, grad_side.to(grad_residual.dtype.element_ty), mask=mask)


# ---------------------------------------------------------------------------------------------------------------------
# Operators. `moments` is fp32 [2, groups, C]: mean and 1 / sqrt(variance + eps).


@torch.library.custom_op("fastmoco::batch_norm_statistics", mutates_args=("running_mean", "running_var"))
def statistics(x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, groups: int, momentum: float,
               eps: float) -> Tensor:
    """Moments of each group of samples of x, and the running statistics moved by them in place. Not differentiable."""
    rows, channels = x.numel() // x.shape[1] // groups, x.shape[1]
    launch = _Launch("statistics", x, groups)
    partial = x.new_empty((2, groups, launch.splits, channels), dtype=torch.float32)
    moments = x.new_empty((2, groups, channels), dtype=torch.float32)
    with launch.device:
        _statistics_kernel[launch.split_grid](x, partial, rows, channels, launch.split_rows, **launch.options)
        _finish_statistics_kernel[(triton.cdiv(channels, FINISH_CHANNELS),)](
            partial, moments, running_mean, running_var, rows, channels, launch.split_rows, launch.splits, groups,
            momentum, eps, **launch.finish_options)
    return moments


@statistics.register_fake
def _(x, running_mean, running_var, groups, momentum, eps):
    return x.new_empty((2, groups, x.shape[1]), dtype=torch.float32)


@torch.library.custom_op("fastmoco::batch_norm_apply", mutates_args=())
def apply(x: Tensor, weight: Tensor, bias: Tensor, moments: Tensor, residual: Tensor | None,
          residual_weight: Tensor | None, residual_bias: Tensor | None, residual_moments: Tensor | None, relu: bool,
          training: bool) -> Tensor:
    """Normalise by given moments, add, clip. In training its gradient takes `moments` for the statistics of x."""
    launch = _Launch("apply", x, moments.shape[1])
    y = torch.empty_like(x)
    with launch.device:
        _apply_kernel[launch.grid](x, y, weight, bias, moments, residual, residual_weight, residual_bias,
                                   residual_moments, launch.rows, x.shape[1], RELU=relu, **launch.options)
    return y


@apply.register_fake
def _(x, weight, bias, moments, residual, residual_weight, residual_bias, residual_moments, relu, training):
    return torch.empty_like(x)


@torch.library.custom_op("fastmoco::batch_norm_backward", mutates_args=())
def gradients(grad: Tensor, x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor, moments: Tensor,
              residual: Tensor | None, residual_weight: Tensor | None, residual_bias: Tensor | None,
              residual_moments: Tensor | None, relu: bool, training: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of the residual (empty if it is the incoming one) and of [bias, weight, residual's weight].

    y is given where the ReLU's mask is to be read from it (plain residual), residual only in the dual form.
    """
    groups, channels = moments.shape[1], x.shape[1]
    launch = _Launch("sums", x, groups)
    arrays = 2 if residual is None else 3
    partial = x.new_empty((arrays, groups, launch.splits, channels), dtype=torch.float32)
    sums = x.new_empty((arrays, groups, channels), dtype=torch.float32)
    totals = x.new_empty((arrays, channels), dtype=torch.float32)
    grad_x = torch.empty_like(x)
    grad_residual = torch.empty_like(x) if residual is not None or y is not None else x.new_empty(0)
    masked = None if y is None else grad_residual
    vectors = (weight, bias, moments, residual, residual_weight, residual_bias, residual_moments)
    with launch.device:
        _sums_kernel[launch.split_grid](grad, x, y, masked, partial, *vectors, launch.rows, channels,
                                        launch.split_rows, RELU=relu, **launch.options)
        _finish_sums_kernel[(triton.cdiv(channels, FINISH_CHANNELS), arrays)](
            partial, sums, totals, channels, launch.splits, groups, **launch.finish_options)
        launch = _Launch("gradient", x, groups)
        _gradient_kernel[launch.grid](grad if y is None else masked, x, grad_x, grad_residual, sums, *vectors,
                                      launch.rows, channels, RELU=relu and y is None, TRAINING=training,
                                      **launch.options)
    return grad_x, grad_residual, totals


@gradients.register_fake
def _(grad, x, y, weight, bias, moments, residual, residual_weight, residual_bias, residual_moments, relu, training):
    has_output = residual is not None or y is not None
    totals = x.new_empty((2 if residual is None else 3, x.shape[1]), dtype=torch.float32)
    return torch.empty_like(x), torch.empty_like(x) if has_output else x.new_empty(0), totals


def _save(ctx, inputs, output):
    x, weight, bias, moments, residual, residual_weight, residual_bias, residual_moments, relu, training = inputs
    ctx.plain = residual is not None and residual_moments is None
    ctx.relu, ctx.training = relu, training
    ctx.save_for_backward(x, output if ctx.plain and relu else None, weight, bias, moments,
                          None if ctx.plain else residual, residual_weight, residual_bias, residual_moments)


def _backward(ctx, grad):
    grad = grad.contiguous(memory_format=torch.channels_last if grad.dim() == 4 else torch.contiguous_format)
    grad_x, grad_residual, totals = gradients(grad, *ctx.saved_tensors, ctx.relu, ctx.training)
    bias, weight, *residual_weight = totals.unbind()
    side = (grad_residual if ctx.relu else grad, None, None) if ctx.plain else (None, None, None)
    if residual_weight:
        side = (grad_residual, residual_weight[0], bias.clone())  # a gradient of its own: both may be changed in place
    return grad_x, weight, bias, None, *side, None, None, None


apply.register_autograd(_backward, setup_context=_save)


class _Launch:
    """Tiles, grids and pieces of one kernel over x: each group's rows in `splits` pieces of `split_rows`."""

    def __init__(self, kernel: str, x: Tensor, groups: int) -> None:
        capability = torch.cuda.get_device_capability(x.device) if x.is_cuda else None
        self.device = torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
        self.rows = x.numel() // x.shape[1] // groups
        self.options = _options(kernel, x.shape[1], capability)
        block_rows, block_channels = self.options["BLOCK_ROWS"], self.options["BLOCK_CHANNELS"]
        columns = triton.cdiv(x.shape[1], block_channels)
        self.grid = (columns * triton.cdiv(self.rows, block_rows), groups)
        wanted = min(MAX_SPLITS, max(1, _resident_programs(x.device) // (columns * groups)))
        self.split_rows = triton.cdiv(triton.cdiv(self.rows, wanted), block_rows) * block_rows
        self.splits = triton.cdiv(self.rows, self.split_rows)
        self.split_grid = (self.splits, columns, groups)
        self.finish_options = _finish_options(self.splits)


def _options(kernel: str, channels: int, capability: tuple[int, int] | int | None) -> dict[str, int]:
    row = tiles(f"batch_norm.{kernel}", capability)
    block_channels = min(row.block[1], triton.next_power_of_2(channels))
    block_rows = row.block[0] * row.block[1] // block_channels
    return {"BLOCK_ROWS": block_rows, "BLOCK_CHANNELS": block_channels, "num_warps": row.num_warps,
            "num_stages": row.num_stages}


def _finish_options(splits: int) -> dict[str, int]:
    return {"BLOCK_SPLITS": triton.next_power_of_2(splits), "BLOCK_CHANNELS": FINISH_CHANNELS, "num_warps": 4}


@functools.cache
def _resident_programs(device: torch.device) -> int:
    if device.type != "cuda":
        return 4 * PROGRAMS_PER_MULTIPROCESSOR  # the interpreter: enough to have something to split
    return PROGRAMS_PER_MULTIPROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count
