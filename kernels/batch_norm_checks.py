"""What batch norm can be asked for: layouts, dtypes, groups and vectors that fit together."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmoco.kernels.dispatch import NAMES

Running = tuple[Tensor, Tensor]


def check_vector(name: str, vector: Tensor, x: Tensor, channels: int) -> None:
    """Raise ValueError unless `vector` is contiguous [channels], fp32 (fp64 beside an fp64 x), and where x is."""
    dtypes = (torch.float32,) if x.dtype in NAMES else (torch.float32, torch.float64)
    if vector.shape != (channels,) or not vector.is_contiguous():
        raise ValueError(f"{name} must be contiguous [{channels}], not {list(vector.shape)}")
    if vector.dtype not in dtypes or vector.device != x.device:
        raise ValueError(f"{name} must be fp32 on {x.device}, not {vector.dtype} on {vector.device}")


def check(x: Tensor, weight: Tensor, bias: Tensor, running: Running | None, groups: int, training: bool) -> None:
    """Raise ValueError unless x can be normalised so."""
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


def check_residual(x: Tensor, residual: Tensor) -> None:
    """Raise ValueError unless the residual can be added to x."""
    if (residual.shape, residual.dtype, residual.device) != (x.shape, x.dtype, x.device):
        raise ValueError(
            f"the residual must be {list(x.shape)} {x.dtype} on {x.device}, not {list(residual.shape)} "
            f"{residual.dtype} on {residual.device}"
        )
    if x.dim() == 4 and not residual.is_contiguous(memory_format=torch.channels_last):
        raise ValueError("the residual must be channels-last, as x")
