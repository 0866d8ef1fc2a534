"""Batch norm whose statistics are those of a batch that lies on several ranks ("global", or synchronised, batch norm).

Forward, each rank gathers mean and variance [2, C] of its rows; backward, the two sums that a gradient through mean and
variance is made of. Both are added in rank order, so all ranks hold the same bits, running statistics included. The
gradients of scale and shift stay a rank's own: DistributedDataParallel averages them with all the others.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Gather = Callable[[Tensor], Tensor]


def batch_norm_over_ranks(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running: tuple[Tensor, Tensor],
    gather: Gather,
    *,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Training batch norm of x [N, C] or [N, C, H, W], equally many rows on each rank, without a ReLU.

    `gather` gives for rows [1, ...] those of all ranks [G, ...]. `running` moves in place as torch's: the variance by
    Bessel's correction for the rows of all ranks. fp32 or fp64 statistics for any float x.
    """
    return _OverRanks.apply(x, weight, bias, *running, gather, momentum, eps)


class _OverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, gather, momentum, eps):
        rows = x.numel() // x.shape[1]
        wide = torch.promote_types(x.dtype, torch.float32)
        variance, mean = torch.var_mean(x.to(wide), _all_but_channels(x), correction=0)
        means, variances = gather(torch.stack([mean, variance])[None]).unbind(1)
        mean = means.mean(0)
        variance = variances.mean(0) + (means - mean).square().mean(0)
        count = rows * len(means)
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_((variance * (count / (count - 1))).to(running_var.dtype), momentum)
        ctx.save_for_backward(x, weight, mean, torch.rsqrt(variance + eps))
        ctx.gather, ctx.rows, ctx.eps = gather, rows, eps
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, mean, invstd = ctx.saved_tensors
        _, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, None, None, mean, invstd, True, ctx.eps, [False, True, True]
        )
        # Means over ranks of sums over a rank's rows, and so over the rows of all ranks once divided by a rank's.
        slope, shift = ctx.gather(torch.stack([grad_weight, grad_bias])[None]).mean(0) / ctx.rows
        scale = weight * invstd
        along = [1, -1] + [1] * (x.dim() - 2)
        slope = -scale * invstd * slope
        shift = -scale * shift - slope * mean
        grad_x = torch.addcmul(shift.view(along), x.to(shift.dtype), slope.view(along)).addcmul_(
            grad.to(shift.dtype), scale.view(along)
        )
        return grad_x.to(x.dtype), grad_weight, grad_bias, None, None, None, None, None


def _all_but_channels(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]
