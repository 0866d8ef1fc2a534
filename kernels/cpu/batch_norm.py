"""Batch norm + ReLU (+ residual) on a CPU, by the compiled loops of `batch_norm_loops`.

Passes over activations are those of `kernels.batch_norm`, but that two gradients of an output are added where they are
read.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastmoco.kernels.cpu.batch_norm_loops import LOOPS, finish, finish_sums

WIDTH = 256  # numbers of a run, about
PIECE = 16384  # numbers of a piece, at least where a group has more
MOST_PIECES = 16  # of a group


class _Cut(NamedTuple):
    """How a group's array is cut: `splits` pieces, taken in runs of `width` numbers."""

    rows: int
    channels: int
    width: int
    splits: int


@functools.lru_cache(1024)
def _cut(shape: torch.Size, groups: int) -> dict[str, int]:
    channels = shape[1]
    rows = math.prod(shape) // channels // groups
    width = min(max(1, WIDTH // channels), rows) * channels
    return _Cut(rows, channels, width, max(1, min(MOST_PIECES, rows * channels // PIECE)))._asdict()


def statistics(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, groups: int, momentum: float, eps: float
) -> Tensor:
    """Moments fp32 [2, groups, C] of x, mean and 1 / sqrt(variance + eps); running statistics move in place."""
    cut = _cut(x.shape, groups)
    pieces, channels = groups * cut["splits"], cut["channels"]
    vectors = torch.empty(pieces * 3 * cut["width"], dtype=torch.float32)
    partial = torch.empty(pieces * 2 * channels, dtype=torch.float64)
    moments = torch.empty((2, groups, channels), dtype=torch.float32)
    LOOPS[x.dtype].moments(pieces, x=x, vectors=vectors, partial=partial, **cut)
    given = {"mean": running_mean, "variance": running_var, "momentum": momentum, "eps": eps}
    finish(1, partial=partial, moments=moments, groups=groups, **given, **cut)
    return moments


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
) -> Tensor:
    """Normalise x by given moments, add the residual, clip."""
    cut, y = _cut(x.shape, moments.shape[1]), torch.empty_like(x)
    pieces = moments.shape[1] * cut["splits"]
    vectors = torch.empty(pieces * 3 * cut["width"], dtype=torch.float32)
    LOOPS[x.dtype].apply(
        pieces,
        x=x,
        y=y,
        weight=weight,
        bias=bias,
        moments=moments,
        residual=residual,
        residual_weight=residual_weight,
        residual_bias=residual_bias,
        residual_moments=residual_moments,
        vectors=vectors,
        floor=_floor(relu),
        **cut,
    )
    return y


def gradients(
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
    """Gradients of x and of the dual form's residual, the masked sum of the incoming ones, and the weights' gradients.

    `y` is given where the ReLU's mask is to be read from it (plain residual), the residual only in the dual form. What
    there is none of is empty. The last are fp32 [2 or 3, C]: of the bias, the weight and the residual's weight.
    """
    groups, channels, dual = moments.shape[1], x.shape[1], residual is not None
    cut, loops = _cut(x.shape, groups), LOOPS[x.dtype]
    pieces, join = groups * cut["splits"], second_grad is not None or y is not None
    grad_x, grad_residual, joined = (torch.empty_like(x) if each else x.new_empty(0) for each in (True, dual, join))
    vectors = torch.empty(pieces * 9 * cut["width"], dtype=torch.float32)
    partial, sums = (torch.empty(size * 3 * channels, dtype=torch.float64) for size in (pieces, groups))
    totals = torch.empty((3 if dual else 2, channels), dtype=torch.float32)
    main = {"weight": weight, "bias": bias, "moments": moments}
    side = {"residual_weight": residual_weight, "residual_bias": residual_bias, "residual_moments": residual_moments}
    same = {"x": x, "residual": residual, "vectors": vectors, **main, **side, **cut}
    masked = joined if join else None
    loops.sums(pieces, grad=grad, grad_2=second_grad, y=y, masked=masked, partial=partial, floor=_floor(relu), **same)
    given = {"channels": channels, "splits": cut["splits"], "groups": groups}
    moments = {"moments": moments, "residual_moments": residual_moments}
    finish_sums(1, partial=partial, sums=sums, totals=totals, **moments, **given)
    results = {"grad_x": grad_x, "grad_residual": grad_residual if dual else None}
    last = {"floor": _floor(relu and not join), "training": int(training)}
    loops.gradient(pieces, grad=joined if join else grad, sums=sums, **results, **last, **same)
    return grad_x, grad_residual, joined, totals


def _floor(relu: bool) -> float:
    return 0.0 if relu else -math.inf
