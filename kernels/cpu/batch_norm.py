"""Batch norm + ReLU (+ residual) on a CPU, by the compiled loops of `batch_norm_loops`.

Passes over activations are those of `kernels.batch_norm`, but that two gradients of an output are added where they are
read. Where there are groups enough for the threads, each thread does both passes over one group before the next, and
finds the group in its cache at the second: forward the moments and their application, backward the sums and the
gradient.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmoco.kernels.cpu.batch_norm_gradient_loops import VECTORS, backward_bf16, backward_fp32
from fastmoco.kernels.cpu.batch_norm_loops import AGAIN, GROUPS, PIECES, forward_bf16, forward_fp32
from fastmoco.kernels.cpu.loops import Loop

WIDTH = 256  # numbers of a run, about
PIECE = 16384  # numbers of a piece, at least where a group has more
MOST_PIECES = 16  # of a group
CACHED = 1 << 22  # bytes of a group's array, of which the second pass still finds a part in a core's cache


class Loops(NamedTuple):
    """The loops over activations of one type."""

    forward: Loop
    backward: Loop


LOOPS = {torch.bfloat16: Loops(forward_bf16, backward_bf16), torch.float32: Loops(forward_fp32, backward_fp32)}


class _Split(NamedTuple):
    """How a group's array is cut: `splits` pieces, taken in runs of `width` numbers."""

    rows: int
    channels: int
    width: int
    splits: int
    groups: int


@functools.lru_cache(1024)
def _split(shape: torch.Size, groups: int) -> dict[str, int]:
    channels = shape[1]
    rows = math.prod(shape) // channels // groups
    width = min(max(1, WIDTH // channels), rows) * channels
    return _Split(rows, channels, width, max(1, min(MOST_PIECES, rows * channels // PIECE)), groups)._asdict()


def _by_groups(x: Tensor, groups: int) -> bool:
    """Whether each thread is to do both passes over whole groups: they keep all threads busy, and a cache holds one."""
    threads = torch.get_num_threads()
    return (groups % threads == 0 or groups >= 4 * threads) and x.numel() * x.element_size() <= groups * CACHED


def _room(split: dict[str, int], vectors: int, arrays: int) -> tuple[Tensor, Tensor]:
    """For each piece, room for fp32 vectors and for fp64 results."""
    pieces = split["groups"] * split["splits"]
    room = torch.empty(pieces * vectors * split["width"], dtype=torch.float32, device="cpu")
    return room, torch.empty(pieces * arrays * split["channels"], dtype=torch.float64, device="cpu")


def _both_passes(loop: Loop, by_groups: bool, split: dict[str, int], words: dict[str, Any]) -> None:
    if by_groups:
        loop(split["groups"], work=GROUPS, **split, **words)
    else:
        for work in (PIECES, AGAIN):
            loop(split["groups"] * split["splits"], work=work, **split, **words)


def statistics(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, groups: int, momentum: float, eps: float
) -> Tensor:
    """Moments fp32 [2, groups, C] of x, mean and 1 / sqrt(variance + eps); running statistics move in place."""
    split = _split(x.shape, groups)
    vectors, partial = _room(split, 3, 2)
    moments = torch.empty((2, groups, split["channels"]), dtype=torch.float32, device="cpu")
    words: dict[str, Any] = {"x": x, "vectors": vectors, "partial": partial, "moments": moments}
    words |= {"mean": running_mean, "variance": running_var, "momentum": momentum, "eps": eps}
    LOOPS[x.dtype].forward(groups * split["splits"], work=PIECES, **words, **split)
    return moments


Norm = tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]  # weight, bias, running statistics


def forward(
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
    split, (weight, bias, running) = _split(x.shape, groups), norm
    vectors, partial = _room(split, 3, 2)
    y, moments = torch.empty_like(x), x.new_empty((2, groups, split["channels"]), dtype=torch.float32)
    side_moments = None if residual_norm is None else torch.empty_like(moments)
    side = (residual, *(residual_norm or (None, None))[:2], side_moments)
    words = _by_name(weight, bias, moments, side) | {"x": x, "y": y, "vectors": vectors, "partial": partial}
    words |= dict(zip(("mean", "variance"), running or (), strict=False))
    if residual_norm is not None:
        words["residual_partial"] = torch.empty_like(partial)
        words |= dict(zip(("residual_mean", "residual_variance"), residual_norm[2] or (), strict=False))
    words |= {"momentum": momentum, "eps": eps, "floor": _floor(relu)}
    _both_passes(LOOPS[x.dtype].forward, _by_groups(x, groups), split, words)
    return y, moments, side_moments


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
    words = _by_name(weight, bias, moments, (residual, residual_weight, residual_bias, residual_moments))
    words |= {"x": x, "y": y, "vectors": _room(split, 3, 0)[0], "floor": _floor(relu)}
    LOOPS[x.dtype].forward(split["groups"] * split["splits"], work=AGAIN, **words, **split)
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
    side = (residual, residual_weight, residual_bias, residual_moments)
    split, words = _sums(grad, second_grad, x, weight, bias, moments, y, side, relu)
    grad_x, grad_residual = torch.empty_like(x), x.new_empty(0) if residual is None else torch.empty_like(x)
    words |= {"grad_x": grad_x, "grad_residual": grad_residual, "training": int(training)}
    _both_passes(LOOPS[x.dtype].backward, _by_groups(x, split["groups"]), split, words)
    masked_sum = x.new_empty(0) if words["masked"] is None else words["masked"]
    return grad_x, grad_residual, masked_sum, words["totals"]


def sums_of(
    grad: Tensor, second_grad: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor, moments: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The first pass of `gradients` alone, with ReLU: its `masked_sum` (or `grad`), sums of each group, and totals."""
    split, words = _sums(grad, second_grad, x, weight, bias, moments, None, (None,) * 4, True)
    LOOPS[x.dtype].backward(split["groups"] * split["splits"], work=PIECES, **words, **split)
    return grad if words["masked"] is None else words["masked"], words["sums"], words["totals"]


def _sums(
    grad: Tensor,
    second_grad: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    moments: Tensor,
    y: Tensor | None,
    side: tuple[Tensor | None, ...],
    relu: bool,
) -> tuple[dict[str, int], dict[str, Any]]:
    """How x is cut, and the words of the first pass of `gradients`, its results among them."""
    groups, channels, arrays = moments.shape[1], x.shape[1], 2 if side[0] is None else 3
    split = _split(x.shape, groups)
    vectors, partial = _room(split, VECTORS, 3)
    words = _by_name(weight, bias, moments, side)
    words |= {"grad": grad, "grad_2": second_grad, "x": x, "y": y, "vectors": vectors, "partial": partial}
    words["masked"] = torch.empty_like(x) if second_grad is not None or y is not None else None
    words["sums"] = torch.empty(groups * 3 * channels, dtype=torch.float64, device="cpu")
    words["totals"] = torch.empty((arrays, channels), dtype=torch.float32, device="cpu")
    return split, words | {"floor": _floor(relu)}


def _by_name(weight: Tensor, bias: Tensor, moments: Tensor, side: tuple[Tensor | None, ...]) -> dict[str, Any]:
    names = ("residual", "residual_weight", "residual_bias", "residual_moments")
    return {"weight": weight, "bias": bias, "moments": moments, **dict(zip(names, side, strict=True))}


def _floor(relu: bool) -> float:
    return 0.0 if relu else -math.inf
