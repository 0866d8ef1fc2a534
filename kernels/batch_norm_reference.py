"""Batch norm in plain torch: the twins of batch_norm.py and batch_norm_pool.py, with gradients of their own.

`reference.py` has them beside the other twins, under which name they are used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_CACHE_BYTES = 1 << 19  # of a block's output; with its inputs it fits a core's second-level cache


class _TrainBatchNormAct(torch.autograd.Function):
    """Grouped training batch norm of one or two inputs, summed, then ReLU, twice; also the moments of each group.

    The statistics and sums are torch's own, group by group; the rest is multiply-adds, in blocks that stay in the cache
    from the first to the ReLU. So grouped statistics cost a CPU what torch's ungrouped ones do. The output is given
    twice, for two readers, whose gradients backward adds as it masks them; of one reader the other gradient is None.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, residual, residual_weight, residual_bias, groups, relu, eps):
        moments = _moments(x, groups)
        scale, shift = _scale_and_shift(weight, bias, *moments, eps)
        residual_scale = None
        if residual_weight is not None:
            moments += _moments(residual, groups)
            residual_scale, residual_shift = _scale_and_shift(residual_weight, residual_bias, *moments[2:], eps)
            shift = shift + residual_shift
        y = _affine_act(x, scale, shift, residual, residual_scale, relu)
        saved_residual = residual if residual_weight is not None else None
        ctx.save_for_backward(x, weight, saved_residual, residual_weight, y if relu else None, *moments)
        ctx.eps, ctx.has_residual = eps, residual is not None
        ctx.mark_non_differentiable(*moments)
        ctx.set_materialize_grads(False)
        return y, y.view_as(y), *moments

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, second, *_):
        x, weight, residual, residual_weight, y, *moments = ctx.saved_tensors
        gradients = [g for g in (grad, second) if g is not None]
        if not gradients:
            return (None,) * 9
        grad = _masked_sum(gradients, y)
        grads = _batch_norm_backward(grad, x, weight, *moments[:2], ctx.eps)
        residual_grads = (grad if ctx.has_residual else None, None, None)
        if residual is not None:
            residual_grads = _batch_norm_backward(grad, residual, residual_weight, *moments[2:], ctx.eps)
        return *grads, *residual_grads, None, None, None


def _masked_sum(grads: Sequence[Tensor], y: Tensor | None) -> Tensor:
    # The sum of one or two gradients where y > 0; of two in blocks that stay in the cache from the sum to the mask.
    if len(grads) == 1:
        return grads[0] if y is None else torch.ops.aten.threshold_backward(grads[0], y, 0)
    if y is None:
        return grads[0] + grads[1]
    result = torch.empty_like(y)
    step = max(1, _CACHE_BYTES * len(y) // y.nbytes)
    for g, h, output, out in zip(*(t.movedim(1, -1).split(step) for t in (*grads, y, result))):
        torch.add(g, h, out=out)
        torch.ops.aten.threshold_backward.grad_input(out, output, 0, grad_input=out)
    return result


def _moments(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    # batch_norm_update_stats returns statistics in the dtype of its running buffers, so pass wide scratch buffers.
    wide = torch.promote_types(x.dtype, torch.float32)
    unused = torch.zeros(2, x.shape[1], dtype=wide, device=x.device)
    pairs = [torch.batch_norm_update_stats(part, unused[0], unused[1], 1.0) for part in x.chunk(groups)]
    mean, variance = (torch.stack(rows) for rows in zip(*pairs))
    return mean, variance  # [groups, C], the variance without Bessel's correction


def _scale_and_shift(weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    scale = weight * torch.rsqrt(variance + eps)
    return scale, bias - mean * scale


def _affine_act(
    x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, residual_scale: Tensor | None, relu: bool
) -> Tensor:
    result = torch.empty_like(x)
    y, x = result.movedim(1, -1), x.movedim(1, -1)
    side = None if residual is None else residual.movedim(1, -1)
    per_group = x.shape[0] // scale.shape[0]
    step = max(1, _CACHE_BYTES * x.shape[0] // (x.numel() * scale.element_size()))
    widened = None if x.dtype == scale.dtype else scale.new_empty(step, *x.shape[1:])
    for first in range(0, x.shape[0], per_group):
        group = first // per_group
        for start in range(first, first + per_group, step):
            block = slice(start, min(start + step, first + per_group))
            values, out = x[block], y[block]
            if widened is not None:
                values = out = widened[: len(values)].copy_(values)
            torch.addcmul(shift[group], values, scale[group], out=out)
            if side is not None and residual_scale is not None:
                out.addcmul_(side[block], residual_scale[group])
            elif side is not None:
                out.add_(side[block])
            if relu:
                out.relu_()
            if widened is not None:
                y[block] = out
    return result


def _batch_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, variance: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    groups, invstd = mean.shape[0], torch.rsqrt(variance + eps)
    whole = groups == 1  # then torch's gradient as well; of several, which would have to be joined, it gains little
    needs = [whole, True, True]
    parts = [
        torch.ops.aten.native_batch_norm_backward(g, part, weight, None, None, m, i, True, eps, needs)
        for g, part, m, i in zip(grad.chunk(groups), x.chunk(groups), mean, invstd)
    ]
    if whole:
        return parts[0]
    _, *grads = zip(*parts)
    grad_weight, grad_bias = (torch.stack(rows) for rows in grads)
    scale = weight * invstd
    slope = -scale * invstd * grad_weight * (x.shape[1] * groups / x.numel())
    shift = -scale * grad_bias * (x.shape[1] * groups / x.numel()) - slope * mean
    grad_x = _affine_act(x, slope, shift, grad, scale, relu=False)
    return grad_x, grad_weight.sum(0), grad_bias.sum(0)


def batch_norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running: tuple[Tensor, Tensor] | None,
    groups: int = 1,
    *,
    residual: Tensor | None = None,
    residual_norm: tuple | None = None,
    relu: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    training: bool = True,
) -> Tensor:
    """ReLU(batch norm(x) + residual or batch norm(residual)), statistics over groups of consecutive samples."""
    options: dict[str, Any] = {"relu": relu, "momentum": momentum, "eps": eps, "training": training}
    options |= {"residual": residual, "residual_norm": residual_norm}
    return batch_norm_act_twice(x, weight, bias, running, groups, **options)[0]


def batch_norm_act_twice(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running: tuple[Tensor, Tensor] | None,
    groups: int = 1,
    *,
    residual: Tensor | None = None,
    residual_norm: tuple | None = None,
    relu: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    training: bool = True,
) -> tuple[Tensor, Tensor]:
    """`batch_norm_act` for two readers of its result, whose gradients are added in its own backward."""
    wide = torch.promote_types(x.dtype, torch.float32)
    inputs: list[tuple[Any, ...]] = [(x, weight.to(wide), bias.to(wide), running)]
    plain = residual if residual_norm is None else None
    if residual_norm is not None:
        inputs.append((residual, residual_norm[0].to(wide), residual_norm[1].to(wide), residual_norm[2]))
    if not training:
        terms = [_eval_batch_norm(t.to(wide), weight, bias, statistics, eps) for t, weight, bias, statistics in inputs]
        y = terms[0] if len(terms) == 1 else terms[0] + terms[1]
        y = y if plain is None else y + plain
        y = (y.relu() if relu else y).to(x.dtype)
        return y, y
    side = inputs[1][:3] if residual_norm is not None else (plain, None, None)
    y, again, *moments = _TrainBatchNormAct.apply(*inputs[0][:3], *side, groups, relu, eps)
    for (t, _, _, buffers), mean, variance in zip(inputs, moments[::2], moments[1::2]):
        if buffers is not None:
            _update_running(buffers, mean, variance, t.numel() // mean.numel(), momentum)
    return y, again


def batch_norm_pool(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running: tuple[Tensor, Tensor] | None,
    groups: int = 1,
    *,
    momentum: float = 0.1,
    eps: float = 1e-5,
    training: bool = True,
) -> tuple[Tensor, Tensor]:
    """Max-pooling (3 x 3, stride 2, padding 1) of ReLU(batch norm(x)), given twice, for two readers."""
    y = batch_norm_act(x, weight, bias, running, groups, momentum=momentum, eps=eps, training=training)
    y = F.max_pool2d(y, 3, stride=2, padding=1)
    return y, y


def _eval_batch_norm(x: Tensor, weight: Tensor, bias: Tensor, running: tuple[Tensor, Tensor], eps: float) -> Tensor:
    return F.batch_norm(x, running[0].to(x.dtype), running[1].to(x.dtype), weight, bias, False, 0.0, eps)


@torch.no_grad()
def _update_running(running: tuple[Tensor, Tensor], mean: Tensor, variance: Tensor, count: int, momentum: float):
    for buffer, new in zip(running, (mean.mean(0), variance.mean(0) * (count / (count - 1)))):
        buffer.mul_(1 - momentum).add_(new, alpha=momentum)
