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

import functools
from typing import Any, Literal, NamedTuple

import torch
import triton
from torch import Tensor

from fastmoco.kernels import batch_norm_kernels as kernels
from fastmoco.kernels import reference
from fastmoco.kernels.dispatch import NAMES, Impl, machine, takes_kernel
from fastmoco.kernels.tiles import Tiles, Variant, tiles

FINISH_CHANNELS = 4  # one 16-byte load of fp32 a row: few partials are left for a program, which is all latency
PROGRAMS_PER_MULTIPROCESSOR = 4  # of the reductions: all resident at once, so that none is a tail
MAX_SPLITS = 512  # a program of the second stage holds this many partials of a channel in registers, of one group
# or of several at once: one by one, groups would wait for memory one after the other.


class Norm(NamedTuple):
    """One batch norm's tensors: weight and bias fp32 [C], running (mean [C], variance [C]) or None."""

    weight: Tensor
    bias: Tensor
    running: tuple[Tensor, Tensor] | None = None


def batch_norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running: tuple[Tensor, Tensor] | None,
    groups: int = 1,
    *,
    residual: Tensor | None = None,
    residual_norm: Norm | None = None,
    relu: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    training: bool = True,
    impl: Impl = "auto",
) -> Tensor:
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
    if not takes_kernel(impl, x.device, x.dtype):
        return reference.batch_norm_act(
            x,
            weight,
            bias,
            running,
            groups,
            residual=residual,
            residual_norm=residual_norm,
            relu=relu,
            momentum=momentum,
            eps=eps,
            training=training,
        )
    moments = _moments(x, running, groups, momentum, eps, training)
    side = (None, None, None)
    if residual_norm is not None:
        weight_2, bias_2, running_2 = residual_norm
        side = (weight_2, bias_2, _moments(residual, running_2, groups, momentum, eps, training))
    return apply(x, weight, bias, moments, residual, *side, relu, training)


def cost(
    shape: tuple[int, ...],
    element_size: int,
    groups: int = 1,
    *,
    residual: Literal["none", "plain", "dual"],
    backward: bool = False,
    relu: bool = True,
) -> tuple[int, int]:
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
    masked = residual == "plain" and relu  # then the second pass reads the masked gradient alone
    passes = {"none": 5, "plain": 7 if masked else 5, "dual": 8}[residual]
    sums = norms + 1
    # both passes read the moments, the second weights and sums too; recomputing the mask takes weight, bias, bias
    small = norms * (4 * groups + 1 + (3 if relu and not masked else 0)) + sums * (2 * groups + 1)
    return element_size * elements * passes + 4 * channels * small, elements * (10 * norms + 2)


def check_vector(name: str, vector: Tensor, x: Tensor, channels: int) -> None:
    """ValueError unless `vector` is contiguous [channels], fp32 beside an x that the kernels take, and where x is."""
    dtypes = (torch.float32,) if x.dtype in NAMES else (torch.float32, torch.float64)
    if vector.shape != (channels,) or not vector.is_contiguous():
        raise ValueError(f"{name} must be contiguous [{channels}], not {list(vector.shape)}")
    if vector.dtype not in dtypes or vector.device != x.device:
        raise ValueError(f"{name} must be fp32 on {x.device}, not {vector.dtype} on {vector.device}")


def _check(
    x: Tensor, weight: Tensor, bias: Tensor, running: tuple[Tensor, Tensor] | None, groups: int, training: bool
) -> None:
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
        check_vector(name, vector, x, channels)


def _check_residual(x: Tensor, residual: Tensor) -> None:
    if (residual.shape, residual.dtype, residual.device) != (x.shape, x.dtype, x.device):
        raise ValueError(
            f"the residual must be {list(x.shape)} {x.dtype} on {x.device}, not {list(residual.shape)} "
            f"{residual.dtype} on {residual.device}"
        )
    if x.dim() == 4 and not residual.is_contiguous(memory_format=torch.channels_last):
        raise ValueError("the residual must be channels-last, as x")


def _moments(
    x: Tensor, running: tuple[Tensor, Tensor] | None, groups: int, momentum: float, eps: float, training: bool
) -> Tensor:
    with torch.no_grad():
        if training:
            return statistics(x.detach(), *(running or (None, None)), groups, momentum, eps)
        return torch.stack([running[0], torch.rsqrt(running[1] + eps)])[:, None]


def finish(
    partial: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    rows: int,
    split_rows: int,
    momentum: float,
    eps: float,
) -> Tensor:
    """Moments fp32 [2, groups, C] from the means and squared deviations of pieces of `split_rows` rows of a group.

    `partial` is fp32 [2, groups, splits, C], splits at most MAX_SPLITS, `rows` those of a group. Moves the running
    statistics in place. To be called inside an operator, with the device set.
    """
    _, groups, splits, channels = partial.shape
    moments = partial.new_empty((2, groups, channels))
    kernels.finish_statistics[(triton.cdiv(channels, FINISH_CHANNELS),)](
        partial,
        moments,
        running_mean,
        running_var,
        rows,
        channels,
        split_rows,
        splits,
        groups,
        momentum,
        eps,
        **_finish_options(groups, splits),
    )
    return moments


# Operators. `moments` is fp32 [2, groups, C]: mean and 1 / sqrt(variance + eps).


@torch.library.custom_op("fastmoco::batch_norm_statistics", mutates_args=("running_mean", "running_var"))
def statistics(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, groups: int, momentum: float, eps: float
) -> Tensor:
    """Moments of each group of samples of x, and the running statistics moved by them in place. Not differentiable."""
    plan = _plan("statistics", x, groups)
    partial = x.new_empty((2, groups, plan.splits, x.shape[1]), dtype=torch.float32)
    with torch.cuda.device_of(x):
        kernels.statistics[plan.split_grid](x, partial, plan.rows, x.shape[1], plan.split_rows, **plan.options)
        return finish(partial, running_mean, running_var, plan.rows, plan.split_rows, momentum, eps)


@statistics.register_fake
def _(x, running_mean, running_var, groups, momentum, eps):
    return x.new_empty((2, groups, x.shape[1]), dtype=torch.float32)


@torch.library.custom_op("fastmoco::batch_norm_apply", mutates_args=())
def apply(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    moments: Tensor,
    residual: Tensor | None,
    residual_weight: Tensor | None,
    residual_bias: Tensor | None,
    residual_moments: Tensor | None,
    relu: bool,
    training: bool,
) -> Tensor:
    """Normalise by given moments, add, clip. In training its gradient takes `moments` for the statistics of x."""
    y = torch.empty_like(x)
    _apply(x, y, weight, bias, moments, residual, residual_weight, residual_bias, residual_moments, relu)
    return y


@apply.register_fake
def _(x, weight, bias, moments, residual, residual_weight, residual_bias, residual_moments, relu, training):
    return torch.empty_like(x)


def _apply(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, moments: Tensor, *rest: Any) -> None:
    *side, relu = rest
    plan = _plan("apply", x, moments.shape[1])
    with torch.cuda.device_of(x):
        kernels.apply[plan.grid](x, y, weight, bias, moments, *side, plan.rows, x.shape[1], RELU=relu, **plan.options)


@torch.library.custom_op("fastmoco::batch_norm_backward", mutates_args=())
def gradients(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    moments: Tensor,
    residual: Tensor | None,
    residual_weight: Tensor | None,
    residual_bias: Tensor | None,
    residual_moments: Tensor | None,
    relu: bool,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of the residual (empty if it is the incoming one) and of [bias, weight, residual's weight].

    y is given where the ReLU's mask is to be read from it (plain residual), residual only in the dual form.
    """
    groups, channels = moments.shape[1], x.shape[1]
    plan, second = _plan(_sums_tiles(residual is not None), x, groups), _plan("gradient", x, groups)
    arrays = 2 if residual is None else 3
    partial = x.new_empty((arrays, groups, plan.splits, channels), dtype=torch.float32)
    sums = x.new_empty((arrays, groups, channels), dtype=torch.float32)
    totals = x.new_empty((arrays, channels), dtype=torch.float32)
    grad_x = torch.empty_like(x)
    grad_residual = torch.empty_like(x) if residual is not None or y is not None else x.new_empty(0)
    masked = None if y is None else grad_residual
    vectors = (weight, bias, moments, residual, residual_weight, residual_bias, residual_moments)
    with torch.cuda.device_of(x):
        kernels.sums[plan.split_grid](
            grad, x, y, masked, partial, *vectors, plan.rows, channels, plan.split_rows, RELU=relu, **plan.options
        )
        kernels.finish_sums[(triton.cdiv(channels, FINISH_CHANNELS), arrays)](
            partial, sums, totals, channels, plan.splits, groups, **_finish_options(groups, plan.splits)
        )
        incoming, grad_side = grad if y is None else masked, None if residual is None else grad_residual
        kernels.gradient[second.grid](
            incoming,
            x,
            grad_x,
            grad_side,
            sums,
            *vectors,
            second.rows,
            channels,
            RELU=relu and y is None,
            TRAINING=training,
            **second.options,
        )
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
    ctx.save_for_backward(
        x,
        output if ctx.plain and relu else None,
        weight,
        bias,
        moments,
        None if ctx.plain else residual,
        residual_weight,
        residual_bias,
        residual_moments,
    )


def _backward(ctx, grad):
    grad = grad.contiguous(memory_format=torch.channels_last if grad.dim() == 4 else torch.contiguous_format)
    grad_x, grad_residual, totals = gradients(grad, *ctx.saved_tensors, ctx.relu, ctx.training)
    bias, weight, *residual_weight = totals.unbind()
    side = (grad_residual if ctx.relu else grad, None, None) if ctx.plain else (None, None, None)
    if residual_weight:
        side = (grad_residual, residual_weight[0], bias.clone())  # a gradient of its own: both may be changed in place
    return grad_x, weight, bias, None, *side, None, None, None


apply.register_autograd(_backward, setup_context=_save)


def variants(arch: int) -> list[Variant]:
    """What the compile gate compiles: every pass in each of its forms, bf16, at 64 channels and at 128 and more."""
    found = []
    for channels in (64, 256):
        found.append(_variant("statistics", kernels.statistics, channels, arch, {}))
        for form, absent in _FORMS.items():
            found.append(_variant("apply", kernels.apply, channels, arch, {"RELU": True}, form, absent))
            sums_absent = absent + (() if form == "plain" else ("y", "masked"))
            flags = {"RELU": form != "plain", "TRAINING": True}
            sums_tiles = _sums_tiles(form == "dual")
            found.append(_variant(sums_tiles, kernels.sums, channels, arch, {"RELU": True}, form, sums_absent))
            found.append(_variant("gradient", kernels.gradient, channels, arch, flags, form, absent))
    for fn in (kernels.finish_statistics, kernels.finish_sums):
        for groups in (1, 8):
            options = _finish_options(groups, MAX_SPLITS // groups)
            found.append(_variant("finish", fn, 256, arch, options, f"G={groups}"))
    return found


_SIDE = ("residual_weight", "residual_bias", "residual_moments")
_FORMS = {"none": ("residual", *_SIDE), "plain": _SIDE, "dual": ()}  # form -> arguments that are None
_ACTIVATIONS = ("x", "y", "grad", "grad_x", "grad_residual", "masked", "residual")
_INTEGERS = ("rows", "channels", "split_rows", "splits", "groups")


def _variant(
    kernel: str,
    fn: Any,
    channels: int,
    arch: int,
    constants: dict[str, Any],
    form: str = "",
    absent: tuple[str, ...] = (),
) -> Variant:
    if fn in (kernels.sums, kernels.gradient) and form == "plain":
        absent += ("residual",)  # the backward of a plain residual reads y or the masked gradient instead
    if form != "dual":
        absent += ("grad_residual",)
    row = {} if kernel == "finish" else _options(tiles(f"batch_norm.{kernel}", arch), channels)
    options = constants | row
    warps, stages = options.pop("num_warps"), options.pop("num_stages", 1)
    options |= dict.fromkeys(name for name in fn.arg_names if name in absent)
    types = dict.fromkeys(_ACTIVATIONS, "*bf16") | dict.fromkeys(_INTEGERS, "i32") | {"momentum": "fp32", "eps": "fp32"}
    signature = {name: "constexpr" if name in options else types.get(name, "*fp32") for name in fn.arg_names}
    label = f"batch_norm.{fn.__name__} {form} C={channels}".replace("  ", " ")
    return Variant(label, fn, signature, options, warps, stages, divisible=("channels",), streaming=kernel != "finish")


class _Plan(NamedTuple):
    options: dict[str, int]
    rows: int
    grid: tuple[int, int]
    split_rows: int  # reductions take a group's rows in `splits` pieces of so many
    splits: int
    split_grid: tuple[int, int, int]


def _plan(kernel: str, x: Tensor, groups: int) -> _Plan:
    capability, processors = machine(x.device)
    # The row is looked up on every call, as `bench tune` changes the table; what follows from it is kept.
    row = tiles(f"batch_norm.{kernel}", capability)
    return _cut(row, x.numel() // x.shape[1] // groups, x.shape[1], groups, processors)


@functools.cache
def _cut(row: Tiles, rows: int, channels: int, groups: int, processors: int) -> _Plan:
    options = _options(row, channels)
    block_rows = options["BLOCK_ROWS"]
    columns = triton.cdiv(channels, options["BLOCK_CHANNELS"])
    wanted = min(MAX_SPLITS, max(1, PROGRAMS_PER_MULTIPROCESSOR * processors // (columns * groups)))
    split_rows = triton.cdiv(triton.cdiv(rows, wanted), block_rows) * block_rows
    splits = triton.cdiv(rows, split_rows)
    grid = (columns * triton.cdiv(rows, block_rows), groups)
    return _Plan(options, rows, grid, split_rows, splits, (splits, columns, groups))


def _options(row: Tiles, channels: int) -> dict[str, int]:
    block_channels = min(row.block[1], triton.next_power_of_2(channels))
    block_rows = row.block[0] * row.block[1] // block_channels
    return {
        "BLOCK_ROWS": block_rows,
        "BLOCK_CHANNELS": block_channels,
        "num_warps": row.num_warps,
        "num_stages": row.num_stages,
    }


def _sums_tiles(dual: bool) -> str:
    return "sums_dual" if dual else "sums"


@functools.cache
def _finish_options(groups: int, splits: int) -> dict[str, int]:
    block_splits = triton.next_power_of_2(splits)
    block_groups = min(triton.next_power_of_2(groups), max(1, MAX_SPLITS // block_splits))
    return {
        "BLOCK_GROUPS": block_groups,
        "BLOCK_SPLITS": block_splits,
        "BLOCK_CHANNELS": FINISH_CHANNELS,
        "num_warps": 8,
    }
