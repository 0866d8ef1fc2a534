"""Photometric augmentation: uint8 crops and one row of drawn parameters a view -> normalised channels-last views."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fastmoco.kernels import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def photometric(
    crops: Tensor,
    parameters: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    dtype: torch.dtype = torch.float32,
    channels: int = 3,
    rows: Tensor | None = None,
    impl: Literal["auto", "triton", "reference"] = "auto",
) -> Tensor:
    """Augmented, normalised views [N, channels, S, S], channels-last, of uint8 crops [N, S, S, 3].

    Row i of `parameters` (float32 [N, 8], columns named in `kernels.reference`) says what happens to crop i: grey
    before the jitters, the jitters in the drawn order with torchvision's semantics (brightness x f; contrast about the
    mean grey of the crop at that moment; saturation about grey 0.299 R + 0.587 G + 0.114 B; HSV hue shift in turns;
    each clamped to [0, 1]), grey after them, a Gaussian blur of deviation SIGMA pixels (none at 0, at most 4) over a
    radius of ceil(3 SIGMA) pixels (at most S - 1) with reflected borders, horizontal flip, (x - mean) / std, cast.
    View i goes to row rows[i] (int64 [N], a permutation), or i. With 4 channels the last is zero.
    float64 is served by the reference alone. Raises ValueError for what does not fit.
    """
    _check(crops, parameters, mean, std, dtype, channels, rows)
    triton = impl == "triton" or impl == "auto" and crops.is_cuda
    mean, std = [float(value) for value in mean], [float(value) for value in std]
    return _photometric(crops, parameters, mean, std, dtype, channels, rows, triton)


@torch.library.custom_op("fastmoco::photometric", mutates_args=())
def _photometric(
    crops: Tensor,
    parameters: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    channels: int,
    rows: Tensor | None,
    triton: bool,
) -> Tensor:
    return reference.photometric(crops, parameters, mean, std, dtype=dtype, channels=channels, rows=rows)


@_photometric.register_fake
def _(crops, parameters, mean, std, dtype, channels, rows, triton):
    n, size = crops.shape[:2]
    return crops.new_empty((n, size, size, channels), dtype=dtype).permute(0, 3, 1, 2)


def _check(crops, parameters, mean, std, dtype, channels, rows):
    n = crops.shape[0] if crops.dim() else 0
    if crops.dtype != torch.uint8 or crops.dim() != 4 or crops.shape[3] != 3 or crops.shape[1] != crops.shape[2]:
        raise ValueError(f"crops must be uint8 [N, S, S, 3], not {crops.dtype} {list(crops.shape)}")
    if not crops.is_contiguous() or crops.numel() == 0:
        raise ValueError(f"crops must be contiguous and hold at least one pixel: {list(crops.shape)}")
    if parameters.dtype != torch.float32 or parameters.shape != (n, 8) or not parameters.is_contiguous():
        raise ValueError(f"parameters must be contiguous float32 [{n}, 8], not {_kind(parameters)}")
    if rows is not None and (rows.dtype != torch.int64 or rows.shape != (n,) or not rows.is_contiguous()):
        raise ValueError(f"rows must be contiguous int64 [{n}], not {_kind(rows)}")
    for name, tensor in (("parameters", parameters), ("rows", rows)):
        if tensor is not None and tensor.device != crops.device:
            raise ValueError(f"{name} on {tensor.device} must be where crops are: {crops.device}")
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(f"mean and std must have three values, std positive: {tuple(mean)}, {tuple(std)}")
    if channels not in (3, 4):
        raise ValueError(f"channels must be 3 or 4, not {channels}")
    if dtype not in (*DTYPES, torch.float64):
        raise ValueError(f"dtype must be a floating-point type of 16, 32 or 64 bits, not {dtype}")


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} of strides {tensor.stride()}"
