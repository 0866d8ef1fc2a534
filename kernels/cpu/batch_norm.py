"""Batch norm + ReLU (+ residual) on a CPU, by the compiled loops of `batch_norm_loops`.

Passes over activations are those of `kernels.batch_norm`, but that two gradients of an output are added where they are
read.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmoco.kernels.cpu import batch_norm_loops as loops
from fastmoco.kernels.cpu.batch_norm_loops import finish, finish_sums
from fastmoco.kernels.cpu.loops import Loop

WIDTH = 256  # numbers of a run, about
PIECE = 16384  # numbers of a piece, at least where a group has more
MOST_PIECES = 16  # of a group


class Loops(NamedTuple):
    """The loops over activations of one type."""

    moments: Loop
    apply: Loop
    sums: Loop
    gradient: Loop


LOOPS = {
    torch.bfloat16: Loops(loops.moments_bf16, loops.apply_bf16, loops.sums_bf16, loops.gradient_bf16),
    torch.float32: Loops(loops.moments_fp32, loops.apply_fp32, loops.sums_fp32, loops.gradient_fp32),
}


class _Split(NamedTuple):
    """How a group's array is cut: `splits` pieces, taken in runs of `width` numbers."""

    rows: int
    channels: int
    width: int
    splits: int


@functools.lru_cache(1024)
def _split(shape: torch.Size, groups: int) -> dict[str, int]:
    channels = shape[1]
    rows = math.prod(shape) // channels // groups
    width = min(max(1, WIDTH // channels), rows) * channels
    return _Split(rows, channels, width, max(1, min(MOST_PIECES, rows * channels // PIECE)))._asdict()


def statistics(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, groups: int, momentum: float, eps: float
) -> Tensor:
    """Moments fp32 [2, groups, C] of x, mean and 1 / sqrt(variance + eps); running statistics move in place."""
    split = _split(x.shape, groups)
    pieces, channels = groups * split["splits"], split["channels"]
    vectors = torch.empty(pieces * 3 * split["width"], dtype=torch.float32)
    partial = torch.empty(pieces * 2 * channels, dtype=torch.float64)
    moments = torch.empty((2, groups, channels), dtype=torch.float32)
    LOOPS[x.dtype].moments(pieces, x=x, vectors=vectors, partial=partial, **split)
    arguments: dict[str, Any] = {"mean": running_mean, "variance": running_var, "momentum": momentum, "eps": eps}
    finish(1, partial=partial, moments=moments, groups=groups, **arguments, **split)
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
    split, y = _split(x.shape, moments.shape[1]), torch.empty_like(x)
    pieces = moments.shape[1] * split["splits"]
    vectors = torch.empty(pieces * 3 * split["width"], dtype=torch.float32)
    side = (residual, residual_weight, residual_bias, residual_moments)
    by_name = _by_name(weight, bias, moments, side)
    LOOPS[x.dtype].apply(pieces, x=x, y=y, vectors=vectors, floor=_floor(relu), **by_name, **split)
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
    split, dual = _split(x.shape, moments.shape[1]), residual is not None
    side = (residual, residual_weight, residual_bias, residual_moments)
    masked_sum, sums, totals = sums_of(grad, second_grad, x, weight, bias, moments, y, side, relu)
    masked = masked_sum is not grad
    grad_x, grad_residual = torch.empty_like(x), torch.empty_like(x) if dual else None
    pieces = moments.shape[1] * split["splits"]
    vectors = torch.empty(pieces * 9 * split["width"], dtype=torch.float32)
    tensors: dict[str, Tensor | None] = {
        "grad": masked_sum,
        "x": x,
        "grad_x": grad_x,
        "grad_residual": grad_residual,
        "sums": sums,
    }
    tensors |= {"vectors": vectors, **_by_name(weight, bias, moments, side)}
    how: dict[str, float] = {"floor": _floor(relu and not masked), "training": int(training)}
    LOOPS[x.dtype].gradient(pieces, **tensors, **how, **split)
    # An operator returns no tensor twice.
    if grad_residual is None:
        grad_residual = x.new_empty(0)
    return grad_x, grad_residual, masked_sum if masked else x.new_empty(0), totals


def sums_of(
    grad: Tensor,
    second_grad: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    moments: Tensor,
    y: Tensor | None = None,
    side: tuple[Tensor | None, ...] = (None,) * 4,
    relu: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """The first pass of `gradients`: its `masked_sum` (or `grad`), sums of each group, and totals."""
    groups, channels, arrays = moments.shape[1], x.shape[1], 2 if side[0] is None else 3
    split = _split(x.shape, groups)
    pieces = groups * split["splits"]
    masked = torch.empty_like(x) if second_grad is not None or y is not None else None
    vectors = torch.empty(pieces * 8 * split["width"], dtype=torch.float32)
    partial, sums = (torch.empty(size * 3 * channels, dtype=torch.float64) for size in (pieces, groups))
    totals = torch.empty((arrays, channels), dtype=torch.float32)
    tensors: dict[str, Tensor | None] = {
        "grad": grad,
        "grad_2": second_grad,
        "x": x,
        "y": y,
        "masked": masked,
        "partial": partial,
    }
    by_name = _by_name(weight, bias, moments, side)
    LOOPS[x.dtype].sums(pieces, **tensors, vectors=vectors, floor=_floor(relu), **by_name, **split)
    arguments: dict[str, Any] = {
        "moments": moments,
        "residual_moments": side[3],
        "channels": channels,
        "splits": split["splits"],
    }
    finish_sums(1, partial=partial, sums=sums, totals=totals, groups=groups, **arguments)
    return grad if masked is None else masked, sums, totals


def _by_name(
    weight: Tensor, bias: Tensor, moments: Tensor, side: tuple[Tensor | None, ...]
) -> dict[str, Tensor | None]:
    names = ("residual", "residual_weight", "residual_bias", "residual_moments")
    return {"weight": weight, "bias": bias, "moments": moments, **dict(zip(names, side, strict=True))}


def _floor(relu: bool) -> float:
    return 0.0 if relu else -math.inf
