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

The output of a residual block has two readers, the next block's first convolution and its shortcut, and autograd would
add their gradients in three passes more. `batch_norm_act_twice` gives the output twice, so that both gradients come
here: the pass of the sums reads both, adds them in fp32 and writes their masked sum g once for the pass that follows.

    twice            sums dy dy' x -> g | g x -> dx 7     + residual: dy dy' x y -> g | g x -> dx 8
                                                          dual: dy dy' x r -> g | g x r -> dx dr 10

Every program keeps a partial result and a second, ordered stage adds them: no atomics, so runs are bit-equal.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastmoco.kernels import batch_norm_kernels as kernels
from fastmoco.kernels import reference
from fastmoco.kernels.batch_norm_checks import Running, check, check_residual
from fastmoco.kernels.batch_norm_plan import (
    FINISH,
    MAX_SPLITS,
    block_options,
    finish_options,
    overlapping,
    overlaps,
    plan,
)
from fastmoco.kernels.dispatch import Impl, Maker, by_loops, is_traced, maker, variant
from fastmoco.kernels.tiles import Variant, tiles


class Norm(NamedTuple):
    """One batch norm's tensors: weight and bias fp32 [C], running (mean [C], variance [C]) or None."""

    weight: Tensor
    bias: Tensor
    running: Running | None = None


def _sums_tiles(dual: bool) -> str:
    return "batch_norm.sums_dual" if dual else "batch_norm.sums"


def _launch_statistics(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, groups: int, momentum: float, eps: float
) -> Tensor:
    channels, pass_ = x.shape[1], plan("batch_norm.statistics", x, groups)
    partial = x.new_empty((2, groups, pass_.splits, channels), dtype=torch.float32)
    moments = partial.new_empty((2, groups, channels))
    with torch.cuda.device_of(x):
        kernels.statistics_kernel[pass_.split_grid](
            x, partial, pass_.rows, channels, STAGES=pass_.options["num_stages"], **pass_.options
        )
        kernels.finish_statistics_kernel[(triton.cdiv(channels, FINISH.block[0]),)](
            partial,
            moments,
            running_mean,
            running_var,
            pass_.rows,
            channels,
            pass_.options["BLOCK_ROWS"],
            pass_.splits,
            groups,
            momentum,
            eps,
            **finish_options(groups, pass_.splits, x.device),
        )
    return moments


def _launch_apply(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    moments: Tensor,
    residual: Tensor | None,
    residual_weight: Tensor | None,
    residual_bias: Tensor | None,
    residual_moments: Tensor | None,
    relu: bool,
) -> Tensor:
    y, groups = torch.empty_like(x), moments.shape[1]
    side = (residual, residual_weight, residual_bias, residual_moments)
    pass_ = plan("batch_norm.apply", x, groups)
    with torch.cuda.device_of(x):
        kernels.apply_kernel[pass_.grid](
            x, y, weight, bias, moments, *side, pass_.rows, x.shape[1], groups, RELU=relu, **pass_.options
        )
    return y


def _launch_forward(
    x: Tensor,
    norm: Norm,
    residual: Tensor | None,
    residual_norm: Norm | None,
    groups: int,
    relu: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The result in training, its moments, and those of the residual in the dual form; running statistics move."""
    moments = _KERNELS.statistics(x, *(norm.running or (None, None)), groups, momentum, eps)
    side: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
    if residual is not None and residual_norm is not None:
        running = residual_norm.running or (None, None)
        side = (*residual_norm[:2], _KERNELS.statistics(residual, *running, groups, momentum, eps))
    return _launch_apply(x, norm.weight, norm.bias, moments, residual, *side, relu), moments, side[2]


def launch_finish_sums(partial: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of each group [arrays, groups, C] and of all [arrays, C] of partials [arrays, groups, splits, C].

    To be called inside an operator, with the device set.
    """
    arrays, groups, splits, channels = partial.shape
    sums, totals = partial.new_empty((arrays, groups, channels)), partial.new_empty((arrays, channels))
    kernels.finish_sums_kernel[(triton.cdiv(channels, FINISH.block[0]), arrays)](
        partial, sums, totals, channels, splits, groups, **finish_options(groups, splits, partial.device)
    )
    return sums, totals


def _launch_gradients(
    grad: Tensor,
    second_grad: Tensor | None,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    groups, channels, dual = moments.shape[1], x.shape[1], residual is not None
    first, second = plan(_sums_tiles(dual), x, groups), plan("batch_norm.gradient", x, groups)
    partial = x.new_empty((3 if dual else 2, groups, first.splits, channels), dtype=torch.float32)
    grad_x, grad_residual, masked_sum = _gradients_like(second_grad, x, y, residual)
    masked = masked_sum if masked_sum.numel() else None
    vectors = (weight, bias, moments, residual, residual_weight, residual_bias, residual_moments)
    gradients, stages = (grad, second_grad), first.options["num_stages"]
    with torch.cuda.device_of(x):
        kernels.sums_kernel[first.split_grid](
            *gradients, x, y, masked, partial, *vectors, first.rows, channels, RELU=relu, STAGES=stages, **first.options
        )
        sums, totals = launch_finish_sums(partial)
        kernels.gradient_kernel[second.grid](
            grad if masked is None else masked,
            x,
            grad_x,
            grad_residual if dual else None,
            sums,
            *vectors,
            second.rows,
            channels,
            groups,
            RELU=relu and masked is None,
            TRAINING=training,
            **second.options,
        )
    return grad_x, grad_residual, masked_sum, totals


def _gradients_like(
    second_grad: Tensor | None, x: Tensor, y: Tensor | None, residual: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    # Of x, of the dual form's residual, and the masked sum of the incoming gradients; empty where there is none.
    needs = (True, residual is not None, second_grad is not None or y is not None)
    grad_x, grad_residual, masked_sum = (torch.empty_like(x) if each else x.new_empty(0) for each in needs)
    return grad_x, grad_residual, masked_sum


# Operators, for tracers. `moments` is fp32 [2, groups, C]: mean and 1 / sqrt(variance + eps).


class Passes(NamedTuple):
    """The passes over activations, as functions of one signature each, whoever makes them."""

    statistics: Callable[..., Tensor]
    apply: Callable[..., Tensor]
    gradients: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]


def _operators(name: str, launch: Passes) -> Passes:
    mutated = ("running_mean", "running_var")
    statistics = torch.library.custom_op(f"{name}_statistics", launch.statistics, mutates_args=mutated)
    apply = torch.library.custom_op(f"{name}_apply", launch.apply, mutates_args=())
    gradients = torch.library.custom_op(f"{name}_backward", launch.gradients, mutates_args=())

    @statistics.register_fake
    def _(x, running_mean, running_var, groups, momentum, eps):
        return x.new_empty((2, groups, x.shape[1]), dtype=torch.float32)

    @apply.register_fake
    def _(x, weight, bias, moments, residual, residual_weight, residual_bias, residual_moments, relu):
        return torch.empty_like(x)

    @gradients.register_fake
    def _(grad, second_grad, x, y, weight, bias, moments, residual, *rest):
        totals = x.new_empty((2 if residual is None else 3, x.shape[1]), dtype=torch.float32)
        return *_gradients_like(second_grad, x, y, residual), totals

    return Passes(statistics, apply, gradients)


_KERNELS = Passes(_launch_statistics, _launch_apply, _launch_gradients)
_LOOPS = Passes(*(by_loops(launch, "batch_norm") for launch in _KERNELS))
LAUNCHES = {"triton": _KERNELS, "loops": _LOOPS}
FORWARD = {"triton": _launch_forward, "loops": by_loops(_launch_forward, "batch_norm")}
OPERATORS = {
    "triton": _operators("fastmoco::batch_norm", _KERNELS),
    "loops": _operators("fastmoco::cpu_batch_norm", _LOOPS),
}


def _passes(by: Maker, x: Tensor) -> Passes:
    return (OPERATORS if is_traced(x) else LAUNCHES)[by]


def known_moments(
    x: Tensor, running: Running | None, groups: int, momentum: float, eps: float, training: bool, by: Maker
) -> Tensor:
    """fp32 [2, groups, C], mean and 1 / sqrt(variance + eps): of each group, which moves `running`; or of `running`."""
    if not training:
        assert running is not None, "checked before"
        return torch.stack([running[0], torch.rsqrt(running[1] + eps)])[:, None]
    with torch.no_grad():
        arguments = (*(running or (None, None)), groups, momentum, eps)
        if is_traced(x):
            return OPERATORS[by].statistics(x.detach(), *arguments)
        moments = LAUNCHES[by].statistics(x, *arguments)
        if running is not None:
            torch.autograd.graph.increment_version(running)
        return moments


def joined_gradients(grad: Tensor | None, second: Tensor | None) -> tuple[Tensor | None, ...]:
    """Two incoming gradients, the second of which may be missing, dense in the layout that the kernels take."""
    grads = [
        g.contiguous(memory_format=torch.channels_last if g.dim() == 4 else torch.contiguous_format)
        for g in (grad, second)
        if g is not None
    ]
    return (*grads, None, None)[:2]


def _forward(
    by: Maker, x: Tensor, norm: Norm, residual: Tensor | None, residual_norm: Norm | None, *how: Any
) -> tuple[Tensor, Tensor, Tensor | None]:
    with torch.no_grad():
        results = FORWARD[by](x, norm, residual, residual_norm, *how)
    for each in (norm, residual_norm):
        if each is not None and each.running is not None:
            torch.autograd.graph.increment_version(each.running)
    return results


class _Apply(torch.autograd.Function):
    """Normalise by given moments, add, clip. In training the gradient takes the moments for statistics of x.

    `made` holds the result where it was made together with the moments, and is empty otherwise.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, moments, residual, residual_weight, residual_bias, residual_moments, *how):
        relu, training, twice, by, made = how
        side = (residual, residual_weight, residual_bias, residual_moments)
        y = made.pop() if made else _passes(by, x).apply(x, weight, bias, moments, *side, relu)
        ctx.plain = residual is not None and residual_moments is None
        ctx.relu, ctx.training, ctx.by = relu, training, by
        ctx.save_for_backward(
            x, y if ctx.plain and relu else None, weight, bias, moments, None if ctx.plain else residual, *side[1:]
        )
        ctx.set_materialize_grads(False)
        return (y, y.view_as(y)) if twice else y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, second=None):
        grad, second = joined_gradients(grad, second)
        if grad is None:
            return (None,) * 13
        call = _passes(ctx.by, grad).gradients
        grad_x, grad_residual, masked_sum, totals = call(grad, second, *ctx.saved_tensors, ctx.relu, ctx.training)
        bias, weight, *residual_weight = totals.unbind()
        side = (masked_sum if masked_sum.numel() else grad, None, None) if ctx.plain else (None, None, None)
        if residual_weight:  # a bias gradient of its own: both may be changed in place
            side = (grad_residual, residual_weight[0], bias.clone())
        return grad_x, weight, bias, None, *side, *(None,) * 6


def batch_norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running: Running | None,
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

    x is [N, C, H, W] channels-last or [N, C]; fp32, bf16 or fp16 (the twin also takes fp64); weight, bias and both
    running statistics are fp32 [C]. In training the statistics are those of each group of N / groups consecutive
    samples (Ioffe and Szegedy, 2015), and `running` moves in place, with momentum, by the mean over groups of torch's
    update (unbiased variance). Otherwise `running` normalises. eps is added to variances; without relu nothing is
    clipped. Nothing is saved under no_grad. Raises ValueError for what does not fit.
    """
    return _batch_norm_act(
        x, Norm(weight, bias, running), groups, residual, residual_norm, relu, momentum, eps, training, impl, False
    )[0]


def batch_norm_act_twice(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running: Running | None,
    groups: int = 1,
    *,
    residual: Tensor | None = None,
    residual_norm: Norm | None = None,
    relu: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    training: bool = True,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """`batch_norm_act`, whose result is given twice, for two readers: their gradients are added in its own backward.

    Both tensors share their memory: neither may be changed in place.
    """
    y, again = _batch_norm_act(
        x, Norm(weight, bias, running), groups, residual, residual_norm, relu, momentum, eps, training, impl, True
    )
    return y, again


def _batch_norm_act(
    x: Tensor,
    norm: Norm,
    groups: int,
    residual: Tensor | None,
    residual_norm: Norm | None,
    relu: bool,
    momentum: float,
    eps: float,
    training: bool,
    impl: Impl,
    twice: bool,
) -> tuple[Tensor, ...]:
    check(x, *norm, groups, training)
    if residual_norm is not None and residual is None:
        raise ValueError("residual_norm needs a residual")
    if residual is not None:
        check_residual(x, residual)
        if residual_norm is not None:
            check(residual, *residual_norm, groups, training)
    by = maker(impl, x.device, x.dtype)
    if by == "reference":
        options: dict[str, Any] = {"relu": relu, "momentum": momentum, "eps": eps, "training": training}
        options |= {"residual": residual, "residual_norm": residual_norm}
        if twice:
            return reference.batch_norm_act_twice(x, *norm, groups, **options)
        return (reference.batch_norm_act(x, *norm, groups, **options),)
    made: list[Tensor] = []
    if training and not is_traced(x):
        y, moments, side_moments = _forward(by, x, norm, residual, residual_norm, groups, relu, momentum, eps)
        made.append(y)
    else:
        moments, side_moments = known_moments(x, norm.running, groups, momentum, eps, training, by), None
        if residual is not None and residual_norm is not None:
            side_moments = known_moments(residual, residual_norm.running, groups, momentum, eps, training, by)
    side = (*(residual_norm or (None, None))[:2], side_moments)
    y = _Apply.apply(x, norm.weight, norm.bias, moments, residual, *side, relu, training, twice, by, made)
    return y if twice else (y,)


def cost(
    shape: tuple[int, ...],
    element_size: int,
    groups: int = 1,
    *,
    residual: Literal["none", "plain", "dual"],
    backward: bool = False,
    relu: bool = True,
    twice: bool = False,
) -> tuple[int, int]:
    """(bytes, flops) of one training forward or backward of an activation `shape` [N, C, ...].

    Counts what must cross memory once a pass: activations (`element_size` bytes an element), weights, moments and
    running statistics (fp32). The partial sums between the two stages stay in cache and are not counted. `twice`: the
    backward of `batch_norm_act_twice` with both gradients.
    """
    elements, channels = functools.reduce(int.__mul__, shape), shape[1]
    dual, plain = residual == "dual", residual == "plain"
    norms = 1 + dual
    if not backward:
        passes = {"none": 3, "plain": 4, "dual": 5}[residual]
        # statistics write two moments and move two running vectors; normalise reads moments, weight and bias
        small = norms * (2 * groups + 4 + 2 * groups + 2)
        return element_size * elements * passes + 4 * channels * small, elements * (6 * norms + 2)
    by_output = plain and relu  # then the mask is read from y
    via_sum = by_output or twice  # then the second pass reads the masked sum, which the first has written
    first = 1 + twice + norms + by_output + via_sum
    second = 1 + norms + norms
    # Both passes read the moments, the second weights and sums too. A recomputed mask takes weight and bias in the
    # first pass, and bias in the second where that recomputes it.
    recomputed = relu and not by_output
    small = norms * (4 * groups + 1 + 2 * recomputed + (recomputed and not via_sum)) + (norms + 1) * (2 * groups + 1)
    return element_size * elements * (first + second) + 4 * channels * small, elements * (10 * norms + 2 + twice)


def variants(arch: int) -> list[Variant]:
    """What the compile gate compiles: every pass in each of its forms, bf16, at 64 channels and at 128 and more."""
    gate = []
    for channels in (64, 256):
        gate.append(_variant("batch_norm.statistics", kernels.statistics_kernel, channels, arch, {}))
        for form, absent in _FORMS.items():
            gate.append(
                _variant("batch_norm.apply", kernels.apply_kernel, channels, arch, {"RELU": True}, form, absent)
            )
            sums = (_sums_tiles(form == "dual"), kernels.sums_kernel, channels, arch, {"RELU": True})
            absent += ("residual",) if form == "plain" else ("y",)  # which backward reads in the other's place
            gate.append(_variant(*sums, form, ("second_grad", *absent) + (() if form == "plain" else ("masked",))))
            gate.append(_variant(*sums, f"{form} twice", absent))
            for how, masked in ((form, form == "plain"), (f"{form} twice", True)):
                if how != "plain twice":  # is the plain one
                    flags = {"RELU": not masked, "TRAINING": True}
                    gate.append(
                        _variant("batch_norm.gradient", kernels.gradient_kernel, channels, arch, flags, how, absent)
                    )
    for fn in (kernels.finish_statistics_kernel, kernels.finish_sums_kernel):
        for groups in (1, 8):
            options = finish_options(groups, MAX_SPLITS // groups, torch.device("cpu"))
            blocks = {name: value for name, value in options.items() if name.startswith("BLOCK")}
            gate.append(_variant("", fn, 256, arch, blocks, f"G={groups}"))
    return gate


_SIDE = ("residual_weight", "residual_bias", "residual_moments")
_FORMS = {"none": ("residual", *_SIDE), "plain": _SIDE, "dual": ()}  # form -> arguments that are None
_ACTIVATIONS = ("x", "y", "grad", "second_grad", "grad_x", "grad_residual", "masked", "residual")
_INTEGERS = ("rows", "channels", "block_rows", "splits", "groups")


def _variant(
    kernel: str,
    fn: Any,
    channels: int,
    arch: int,
    constants: dict[str, Any],
    form: str = "",
    absent: tuple[str, ...] = (),
) -> Variant:
    row = tiles(kernel, arch) if kernel else FINISH
    if not form.startswith("dual"):
        absent += ("grad_residual",)
    constants = constants | (block_options(row, channels) if kernel else {})
    if "STAGES" in fn.arg_names:
        constants["STAGES"] = row.num_stages
    constants |= dict.fromkeys(name for name in fn.arg_names if name in absent)
    overlap = overlaps(kernel or "batch_norm.finish", overlapping(divmod(arch, 10)))
    constants["DEPENDENT"] = overlap["DEPENDENT"]
    types = dict.fromkeys(fn.arg_names, "*fp32") | dict.fromkeys(_ACTIVATIONS, "*bf16")
    types |= dict.fromkeys(_INTEGERS, "i32") | {"momentum": "fp32", "eps": "fp32"}
    label = f"batch_norm.{fn.__name__.removesuffix('_kernel')} {form} C={channels}".replace("  ", " ")
    dependent = "launch_pdl" in overlap
    return variant(label, fn, row, types, constants, streaming=bool(kernel), dependent=dependent)
