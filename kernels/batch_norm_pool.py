"""The stem's end: batch norm + ReLU + max-pool (3 x 3, stride 2, padding 1) of a channels-last activation.

What lies between, an activation four times the size of the result, is never written. As batch norm is monotone in each
channel, the maximum is looked for in x itself: its largest value where the weight is positive, its smallest where it
is negative. Forward keeps that value of x and its place in the window (one byte, where torch keeps eight). Backward,
the sums need only the kept values, not x; and a program of the second pass has 2 x 2 pixels of x, which lie in four
windows, so that each of the nine places of a window is asked for once. The result has two readers, as in
`batch_norm_act_twice`. In passes over x, of e bytes an element, where the result is p = 1/4:

    forward     stats x | x -> p (and p, p / e for backward)                2 + p (2 p + p / e)
    backward    sums dp dp' p | dp dp' p / e x -> dx                        2 + 5 p + p / e

With bf16 that is 2.63 + 3.38 passes; with kernels apart, torch's eight bytes of place and autograd's sum of the two
gradients it is 5.25 + 8. Statistics and sums are those of batch_norm.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastmoco.kernels import batch_norm_kernels, reference
from fastmoco.kernels.batch_norm import (
    Running,
    block_options,
    check,
    joined_gradients,
    known_moments,
    launch_finish_sums,
    plan,
)
from fastmoco.kernels.batch_norm_kernels import affine, vectors
from fastmoco.kernels.dispatch import Impl, Maker, by_loops, cast, is_traced, maker, variant
from fastmoco.kernels.tiles import Variant, tiles

NOWHERE = tl.constexpr(9)  # the place of a result that the ReLU has clipped


@triton.jit
def _windows(samples, height, width, channels, groups, BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
    # Of a program: its group and channels, and sample, row, column and validity of its windows, which are the 2 x 2
    # pixels of x at twice their row and column, too.
    columns = tl.cdiv(channels, BLOCK_CHANNELS)
    program = tl.program_id(0)
    channel = program % columns * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    window = program // columns // groups * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    high, wide = (height + 1) // 2, (width + 1) // 2
    sample, row, column = window // (high * wide), window // wide % high, window % wide
    inside = (sample < samples)[:, None] & (channel < channels)[None, :]
    group = program // columns % groups
    return group, channel, group * samples + sample, row, column, inside


@triton.jit
def _at(sample, row, column, height, width, channel, channels):
    return ((sample.to(tl.int64) * height + row) * width + column)[:, None] * channels + channel[None, :]


@triton.jit(do_not_specialize=["groups"])
def pool_kernel(
    x,
    y,
    peaks,
    places,
    weight,
    bias,
    moments,
    samples,
    height,
    width,
    channels,
    groups,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    group, channel, sample, row, column, inside = _windows(
        samples, height, width, channels, groups, BLOCK_ROWS, BLOCK_CHANNELS
    )
    mean, invstd, scale, shift = vectors(weight, bias, moments, group, groups, channels, channel)
    sign = tl.where(scale > 0, 1.0, tl.where(scale < 0, -1.0, 0.0))
    best = tl.full([BLOCK_ROWS, BLOCK_CHANNELS], float("-inf"), tl.float32)
    value = tl.zeros([BLOCK_ROWS, BLOCK_CHANNELS], tl.float32)
    place = tl.zeros([BLOCK_ROWS, BLOCK_CHANNELS], tl.int32)
    for at in tl.static_range(9):
        h, w = 2 * row - 1 + at // 3, 2 * column - 1 + at % 3
        valid = ((h >= 0) & (h < height) & (w >= 0) & (w < width))[:, None] & inside
        v = tl.load(x + _at(sample, h, w, height, width, channel, channels), mask=valid, other=0.0).to(tl.float32)
        candidate = tl.where(valid, v * sign, float("-inf"))
        better = (candidate > best) | (candidate != candidate)  # the first of equals, and NaN, as torch picks
        best = tl.where(better, candidate, best)
        value = tl.where(better, v, value)
        place = tl.where(better, at, place)
    out = affine(value, mean, invstd, scale, shift)
    to = _at(sample, row, column, (height + 1) // 2, (width + 1) // 2, channel, channels)
    if peaks is not None:
        tl.store(peaks + to, cast(value, peaks.dtype.element_ty), mask=inside)
        tl.store(places + to, tl.where(out <= 0, NOWHERE, place).to(tl.uint8), mask=inside)
    tl.store(y + to, cast(tl.where(out < 0, 0.0, out), y.dtype.element_ty), mask=inside)


@triton.jit
def _gradient(grad, second_grad, places, at, mask):
    g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
    if second_grad is not None:
        g += tl.load(second_grad + at, mask=mask, other=0.0).to(tl.float32)
    return g, tl.load(places + at, mask=mask, other=9).to(tl.int32)


@triton.jit(do_not_specialize=["groups"])
def unpool_kernel(
    grad,
    second_grad,
    places,
    x,
    grad_x,
    sums,
    weight,
    moments,
    samples,
    height,
    width,
    channels,
    groups,
    TRAINING: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    group, channel, sample, row, column, inside = _windows(
        samples, height, width, channels, groups, BLOCK_ROWS, BLOCK_CHANNELS
    )
    valid = channel < channels
    moment = moments + group * channels + channel
    mean = tl.load(moment, mask=valid, other=0.0)[None, :]
    invstd = tl.load(moment + groups * channels, mask=valid, other=0.0)[None, :]
    factor = tl.load(weight + channel, mask=valid, other=0.0)[None, :] * invstd
    if TRAINING:
        # The gradient through the group's own mean and variance.
        rows = samples * height * width
        total = sums + group * channels + channel
        mean_g = tl.load(total, mask=valid, other=0.0)[None, :] / rows
        slope = tl.load(total + groups * channels, mask=valid, other=0.0)[None, :] / rows * invstd
    high, wide = (height + 1) // 2, (width + 1) // 2
    here = _at(sample, row, column, high, wide, channel, channels)
    right, below = (column + 1 < wide)[:, None] & inside, (row + 1 < high)[:, None] & inside
    g00, p00 = _gradient(grad, second_grad, places, here, inside)
    g01, p01 = _gradient(grad, second_grad, places, here + channels, right)
    g10, p10 = _gradient(grad, second_grad, places, here + wide * channels, below)
    g11, p11 = _gradient(grad, second_grad, places, here + (wide + 1) * channels, right & below)
    for down in tl.static_range(2):
        for across in tl.static_range(2):
            # The place that this pixel has in each of the windows that it lies in.
            g = tl.where(p00 == 4 + 3 * down + across, g00, 0.0)
            if across == 1:
                g += tl.where(p01 == 3 + 3 * down, g01, 0.0)
            if down == 1:
                g += tl.where(p10 == 1 + across, g10, 0.0)
            if down == 1 and across == 1:
                g += tl.where(p11 == 0, g11, 0.0)
            h, w = 2 * row + down, 2 * column + across
            mask = ((h < height) & (w < width))[:, None] & inside
            at = _at(sample, h, w, height, width, channel, channels)
            if TRAINING:
                v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
                g = g - mean_g - (v - mean) * slope
            tl.store(grad_x + at, cast(g * factor, grad_x.dtype.element_ty), mask=mask)


def _sizes(x: Tensor, groups: int) -> tuple[int, int, int, int, int]:
    samples, channels, height, width = x.shape
    return samples // groups, height, width, channels, groups


def _pooled_like(x: Tensor, dtype: torch.dtype) -> Tensor:
    samples, channels, height, width = x.shape
    shape = (samples, (height + 1) // 2, (width + 1) // 2, channels)
    return x.new_empty(shape, dtype=dtype).permute(0, 3, 1, 2)


def _outputs(x: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    # The result; and for backward the values of x that won (peaks) and their places, else nothing.
    y = _pooled_like(x, x.dtype)
    if not keep:
        return y, x.new_empty(0), x.new_empty(0, dtype=torch.uint8)
    return y, torch.empty_like(y), torch.empty_like(y, dtype=torch.uint8)


def _launch_pool(x: Tensor, weight: Tensor, bias: Tensor, moments: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    groups = moments.shape[1]
    y, peaks, places = _outputs(x, keep)
    pass_ = plan("batch_norm_pool.pool", y, groups)
    for_backward = (peaks, places) if keep else (None, None)
    with torch.cuda.device_of(x):
        pool_kernel[pass_.grid](x, y, *for_backward, weight, bias, moments, *_sizes(x, groups), **pass_.options)
    return y, peaks, places


def _launch_gradients(
    grad: Tensor,
    second_grad: Tensor | None,
    x: Tensor,
    peaks: Tensor,
    places: Tensor,
    weight: Tensor,
    bias: Tensor,
    moments: Tensor,
    training: bool,
) -> tuple[Tensor, Tensor]:
    groups, channels = moments.shape[1], x.shape[1]
    first, second = plan("batch_norm.sums", peaks, groups), plan("batch_norm_pool.unpool", peaks, groups)
    partial = x.new_empty((2, groups, first.splits, channels), dtype=torch.float32)
    vectors_ = (weight, bias, moments, None, None, None, None)
    grad_x, how = torch.empty_like(x), {"RELU": True, "STAGES": first.options["num_stages"]}
    with torch.cuda.device_of(x):
        batch_norm_kernels.sums_kernel[first.split_grid](
            grad, second_grad, peaks, None, None, partial, *vectors_, first.rows, channels, **how, **first.options
        )
        sums, totals = launch_finish_sums(partial)
        unpool_kernel[second.grid](
            grad,
            second_grad,
            places,
            x,
            grad_x,
            sums,
            weight,
            moments,
            *_sizes(x, groups),
            TRAINING=training,
            **second.options,
        )
    return grad_x, totals


class Passes(NamedTuple):
    """The passes over x, as functions of one signature each, whoever makes them."""

    pool: Callable[..., tuple[Tensor, Tensor, Tensor]]
    gradients: Callable[..., tuple[Tensor, Tensor]]


def _operators(name: str, launch: Passes) -> Passes:
    pool = torch.library.custom_op(name, launch.pool, mutates_args=())
    gradients = torch.library.custom_op(f"{name}_backward", launch.gradients, mutates_args=())

    @pool.register_fake
    def _(x, weight, bias, moments, keep):
        return _outputs(x, keep)

    @gradients.register_fake
    def _(grad, second_grad, x, *rest):
        return torch.empty_like(x), x.new_empty((2, x.shape[1]), dtype=torch.float32)

    return Passes(pool, gradients)


_KERNELS = Passes(_launch_pool, _launch_gradients)
_LOOPS = Passes(*(by_loops(launch, "batch_norm_pool") for launch in _KERNELS))
LAUNCHES = {"triton": _KERNELS, "loops": _LOOPS}
OPERATORS = {
    "triton": _operators("fastmoco::batch_norm_pool", _KERNELS),
    "loops": _operators("fastmoco::cpu_batch_norm_pool", _LOOPS),
}


def _passes(by: Maker, x: Tensor) -> Passes:
    return (OPERATORS if is_traced(x) else LAUNCHES)[by]


class _Pool(torch.autograd.Function):
    """In training the gradient takes the moments for statistics of x."""

    @staticmethod
    def forward(ctx, x, weight, bias, moments, training, keep, by):
        y, peaks, places = _passes(by, x).pool(x, weight, bias, moments, keep)
        ctx.save_for_backward(x, peaks, places, weight, bias, moments)
        ctx.training, ctx.by = training, by
        ctx.set_materialize_grads(False)
        return y, y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, second):
        grad, second = joined_gradients(grad, second)
        if grad is None:
            return (None,) * 7
        grad_x, totals = _passes(ctx.by, grad).gradients(grad, second, *ctx.saved_tensors, ctx.training)
        bias, weight = totals.unbind()
        return grad_x, weight, bias, None, None, None, None


def batch_norm_pool(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running: Running | None,
    groups: int = 1,
    *,
    momentum: float = 0.1,
    eps: float = 1e-5,
    training: bool = True,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Max-pooling (3 x 3, stride 2, padding 1) of ReLU(BN(x)), given twice, for two readers.

    x is [N, C, H, W] channels-last, the result [N, C, ceil(H / 2), ceil(W / 2)], channels-last, in its dtype. All else
    as `batch_norm_act_twice`. Where several values of a window round to its maximum, the gradient goes to that of the
    largest x. Raises ValueError for what does not fit.
    """
    check(x, weight, bias, running, groups, training)
    if x.dim() != 4:
        raise ValueError(f"x must be [N, C, H, W] to be pooled, not {list(x.shape)}")
    by = maker(impl, x.device, x.dtype)
    if by == "reference":
        return reference.batch_norm_pool(
            x, weight, bias, running, groups, momentum=momentum, eps=eps, training=training
        )
    moments = known_moments(x, running, groups, momentum, eps, training, by)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight, bias))
    return _Pool.apply(x, weight, bias, moments, training, keep, by)


def cost(
    shape: tuple[int, ...], element_size: int, groups: int = 1, *, backward: bool = False, keep: bool = True
) -> tuple[int, int]:
    """(bytes, flops) of one training forward, or of the backward with both gradients, of x of `shape` [N, C, H, W].

    Counts what must cross memory once a pass: activations (`element_size` bytes an element), places (1 byte), weights,
    moments and running statistics (fp32). `keep`: whether forward leaves what backward needs.
    """
    samples, channels, height, width = shape
    elements = functools.reduce(int.__mul__, shape)
    pooled = samples * channels * ((height + 1) // 2) * ((width + 1) // 2)
    if not backward:
        bytes_moved = element_size * (2 * elements + pooled) + keep * (element_size + 1) * pooled
        return bytes_moved + 4 * channels * (4 * groups + 6), 4 * elements + 22 * pooled
    bytes_moved = element_size * (2 * elements + 5 * pooled) + pooled
    # Both passes read moments and weight, the first the bias; the second reads the sums and all of them are written.
    return bytes_moved + 4 * channels * (2 * (2 * groups + 1) + 1 + 2 * (2 * groups + 1)), 8 * elements + 24 * pooled


def variants(arch: int) -> list[Variant]:
    """What the compile gate compiles: both passes in bf16 at 64 channels, for queries and for keys, which keep nothing,
    and with one and with two gradients."""
    types = dict.fromkeys(("x", "y", "peaks", "grad", "second_grad", "grad_x"), "*bf16") | {"places": "*u8"}
    types |= dict.fromkeys(("weight", "bias", "moments", "sums"), "*fp32")
    types |= dict.fromkeys(("samples", "height", "width", "channels", "groups"), "i32")
    gate = []
    constants: dict[str, Any]
    for name, fn, form, constants in (
        ("pool", pool_kernel, "", {}),
        ("pool", pool_kernel, " keys", {"peaks": None, "places": None}),
        ("unpool", unpool_kernel, "", {"TRAINING": True}),
        ("unpool", unpool_kernel, " one gradient", {"TRAINING": True, "second_grad": None}),
    ):
        row = tiles(f"batch_norm_pool.{name}", arch)
        label = f"batch_norm_pool.{name}{form}"
        constants = constants | block_options(row, 64)
        gate.append(variant(label, fn, row, types, constants, streaming=True))
    return gate
