"""Boxes of decoded images resized to crops, all of a batch in one call: uint8 [H, W, 3] -> uint8 [V, n, S, S, 3].

Bilinear with antialiasing, as Pillow and torchvision do it, and to the bit what torch's operator gives. Only on a CPU:
for a GPU, DALI resizes. Each thread of the loader that has nothing else to do takes part; there is no thread of OpenMP
among them, because a second team of them sends the training step's to sleep (bench/NOTES.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from torch import Tensor

from fastmoco.kernels import reference
from fastmoco.kernels.dispatch import HAS_NUMBA

__all__ = ["resizing"]


def resizing(
    images: Sequence[Tensor], boxes: np.ndarray, crops: Tensor, impl: Literal["auto", "reference"] = "auto"
) -> Callable[[], None]:
    """The work of cutting `boxes` of `images` and resizing them into `crops`: every thread that calls it takes part.

    A call returns when no box is left to begin, so the crops are whole when all calls have returned.

    images: n tensors, uint8 [H, W, 3], contiguous; boxes: whole numbers [V, n, 4], top, left, height and width of each
    box; crops: uint8 [V, n, S, S, 3], each crop contiguous. All on the CPU. Raises ValueError if they are others, or if
    a box is empty or not inside its image.
    """
    _check(images, boxes, crops)
    if impl == "reference" or not HAS_NUMBA:
        return reference.resizing(images, boxes, crops)
    from fastmoco.kernels.cpu import resize

    return resize.resizing(images, boxes, crops)


def _check(images: Sequence[Tensor], boxes: np.ndarray, crops: Tensor) -> None:
    views, count, size = crops.shape[:3]
    if crops.shape[2:] != (size, size, 3) or crops.stride()[2:] != (3 * size, 3, 1) or "uint8" not in str(crops.dtype):
        raise ValueError(f"crops are uint8 [V, n, S, S, 3], each contiguous, not {crops.dtype} {list(crops.shape)}")
    if boxes.shape != (views, count, 4) or len(images) != count:
        raise ValueError(f"{len(images)} images and boxes {list(boxes.shape)} do not go with crops {list(crops.shape)}")
    for image in images:
        if image.dtype != crops.dtype or not image.is_contiguous() or image.dim() != 3 or image.shape[2] != 3:
            raise ValueError(f"images are uint8 [H, W, 3], contiguous, not {image.dtype} {list(image.shape)}")
    sides = np.array([image.shape[:2] for image in images], np.int64).reshape(count, 2)
    if (boxes[..., :2] < 0).any() or (boxes[..., 2:] < 1).any() or (boxes[..., :2] + boxes[..., 2:] > sides).any():
        raise ValueError("a box is empty, or not inside its image")
