"""Batch norm + ReLU (+ residual, + the shortcut's own batch norm), statistics over groups of consecutive samples."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastmoco.kernels import reference


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

    x is [N, C, H, W] channels-last or [N, C]. In training the statistics are those of each group of N / groups
    consecutive samples, and `running` moves in place by the mean over groups of torch's update (unbiased variance).
    Otherwise `running` normalises. Raises ValueError for what does not fit.
    """
    _check(x, groups, residual, residual_norm, running, training)
    return reference.batch_norm_act(x, weight, bias, running, groups, residual=residual, residual_norm=residual_norm,
                                    relu=relu, momentum=momentum, eps=eps, training=training)


def _check(x, groups, residual, residual_norm, running, training):
    if x.dim() not in (2, 4):
        raise ValueError(f"x must be [N, C] or [N, C, H, W], not {list(x.shape)}")
    if x.dim() == 4 and not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError("x must be channels-last: x.to(memory_format=torch.channels_last)")
    if groups < 1 or x.shape[0] < 1 or x.shape[0] % groups:
        raise ValueError(f"{x.shape[0]} samples do not divide into {groups} equal groups")
    if training and x.numel() // x.shape[1] // groups < 2:
        raise ValueError(f"training batch norm needs more than one value per channel and group: {list(x.shape)}, "
                         f"groups={groups}")
    if residual_norm is not None and residual is None:
        raise ValueError("residual_norm needs a residual")
    if not training and running is None:
        raise ValueError("training=False needs running statistics")
