"""Plain-torch twins of the kernels: the CPU path, the tests' oracle and the benchmarks' baseline.

Each function has the public signature of its kernel less `impl`. They compute in the widest of fp32 and the inputs'
type, so float64 inputs give a float64 oracle. None of them reads a value back to the host.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Columns of the photometric parameters, one row a view (float32 [N, 8]).
FLIP, GRAY, ORDER, BRIGHTNESS, CONTRAST, SATURATION, HUE, SIGMA = range(8)
GRAY_NEVER, GRAY_BEFORE_JITTER, GRAY_AFTER_JITTER = 0, 1, 2
NO_JITTER = -1  # in ORDER; otherwise four 2-bit codes, lowest bits first: 0 brightness, 1 contrast, 2 saturation, 3 hue


def info_nce(z_q: Tensor, k: Tensor, queue: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    """InfoNCE of normalised queries against one positive and the whole queue (He et al., 2020, equation 1)."""
    wide = torch.promote_types(z_q.dtype, torch.float32)
    q = F.normalize(z_q.to(wide), dim=1)
    positive = (q * k.detach().to(wide)).sum(1, keepdim=True)
    negatives = q @ queue.detach().to(wide).T
    loss = torch.logsumexp(torch.cat([positive, negatives], 1) / temperature, 1) - positive[:, 0] / temperature
    rank = (negatives > positive).sum(1, dtype=torch.int32)
    return loss, rank


def enqueue(queue: Tensor, pointer: Tensor, keys: Tensor) -> None:
    """Write `keys` into the ring at `pointer` and advance it, wrapping at the end; of too many keys the last K stay."""
    size = queue.shape[0]
    kept = keys[-size:]
    skipped = keys.shape[0] - kept.shape[0]
    rows = (pointer + skipped + torch.arange(kept.shape[0], device=queue.device)) % size
    queue.index_copy_(0, rows, kept.to(queue.dtype))
    pointer.copy_((pointer + keys.shape[0]) % size)


class _TrainBatchNormAct(torch.autograd.Function):
    """Grouped training batch norm of one or two inputs, summed, then ReLU; also returns the moments of each group."""

    @staticmethod
    def forward(ctx, x, weight, bias, residual, residual_weight, residual_bias, groups, relu, eps):
        y, *saved = _normalise(x, weight, bias, groups, eps)
        saved_residual = [None] * 4
        if residual is not None and residual_weight is not None:
            normalised, *saved_residual = _normalise(residual, residual_weight, residual_bias, groups, eps)
            y += normalised
        elif residual is not None:
            y += residual
        if relu:
            y.relu_()
        moments = [*saved[2:], *saved_residual[2:]]
        ctx.save_for_backward(x, weight, *saved[:2], residual if residual_weight is not None else None,
                              residual_weight, *saved_residual[:2], y if relu else None)
        ctx.groups, ctx.eps, ctx.has_residual = groups, eps, residual is not None
        ctx.mark_non_differentiable(*(m for m in moments if m is not None))
        return y, *moments

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, *_):
        x, weight, mean, invstd, residual, residual_weight, residual_mean, residual_invstd, y = ctx.saved_tensors
        if y is not None:
            grad = torch.ops.aten.threshold_backward(grad, y, 0)
        main = _normalise_backward(grad, x, weight, mean, invstd, ctx.groups, ctx.eps)
        side = (grad if ctx.has_residual else None, None, None)
        if residual is not None:
            side = _normalise_backward(grad, residual, residual_weight, residual_mean, residual_invstd,
                                       ctx.groups, ctx.eps)
        return *main, *side, None, None, None


def _normalise(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, ...]:
    parts, means, invstds, moments = [], [], [], []
    for part in x.chunk(groups):
        # Momentum 1 makes torch write the group's own mean and unbiased variance.
        moment = weight.new_zeros(2, x.shape[1])
        out, mean, invstd = torch.native_batch_norm(part, weight, bias, moment[0], moment[1], True, 1.0, eps)
        parts.append(out), means.append(mean), invstds.append(invstd), moments.append(moment)
    y = parts[0] if groups == 1 else torch.cat(parts)
    return y, torch.stack(means), torch.stack(invstds), *torch.stack(moments).mean(0)


def _normalise_backward(grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, invstd: Tensor, groups: int, eps: float):
    parts = [torch.ops.aten.native_batch_norm_backward(g, part, weight, None, None, m, i, True, eps, [True] * 3)
             for g, part, m, i in zip(grad.chunk(groups), x.chunk(groups), mean, invstd)]
    grads, weights, biases = zip(*parts)
    return (grads[0] if groups == 1 else torch.cat(grads)), sum(weights), sum(biases)


def batch_norm_act(x: Tensor, weight: Tensor, bias: Tensor, running: tuple[Tensor, Tensor] | None, groups: int = 1, *,
                   residual: Tensor | None = None, residual_norm: tuple | None = None, relu: bool = True,
                   momentum: float = 0.1, eps: float = 1e-5, training: bool = True) -> Tensor:
    """ReLU(batch norm(x) + residual or batch norm(residual)), statistics taken over consecutive groups of samples."""
    norms = [(x, weight, bias, running)]
    if residual_norm is not None:
        norms.append((residual, *residual_norm))
    if not training:
        y = sum(F.batch_norm(t, *r, w, b, False, momentum, eps) for t, w, b, r in norms)
        y = y if residual is None or residual_norm is not None else y + residual
        return y.relu() if relu else y
    side = residual_norm[:2] if residual_norm is not None else (None, None)
    y, *moments = _TrainBatchNormAct.apply(x, weight, bias, residual, *side, groups, relu, eps)
    for i, (_, _, _, buffers) in enumerate(norms):
        if buffers is not None:
            with torch.no_grad():
                for buffer, new in zip(buffers, moments[2 * i:2 * i + 2]):
                    buffer.mul_(1 - momentum).add_(new, alpha=momentum)
    return y
