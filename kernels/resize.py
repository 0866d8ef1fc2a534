"""Boxes of decoded images resized to crops, all of a batch in one call: uint8 [H, W, 3] -> uint8 [V, n, S, S, 3].

Bilinear with antialiasing, as Pillow and torchvision do it, and to the bit what torch's operator gives. Only on a CPU:
for a GPU, DALI resizes. Each thread of the loader that has nothing else to do takes part; there is no thread of OpenMP
among them, because a second team of them sends the training step's to sleep (bench/NOTES.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fastmoco.kernels import reference
from fastmoco.kernels.dispatch import HAS_NUMBA

__all__ = ["resizing"]


def resizing(
    images: Sequence[Tensor], boxes: np.ndarray, crops: Tensor, impl: Literal["auto", "reference"] = "auto"
) -> Callable[[], None]:
    """The work of cutting `boxes` of `images` and resizing them into `crops`: every thread that calls it takes part.

    A call returns when no box is left to begin, so the crops are whole when all calls have returned.

    images: n tensors, uint8 [H, W, 3], contiguous; boxes: integers [V, n, 4], top, left, height and width of each box;
    crops: uint8 [V, n, S, S, 3], each crop contiguous. All on the CPU. Raises ValueError if they are others, or if a
    box is empty or not inside its image.
    """
    boxes = _checked(images, boxes, crops)
    if impl == "reference" or not HAS_NUMBA:
        return reference.resizing(images, boxes, crops)
    from fastmoco.kernels.cpu import resize

    return resize.resizing(images, boxes, crops)


def _checked(images: Sequence[Tensor], boxes: np.ndarray, crops: Tensor) -> np.ndarray:
    views, count, size = crops.shape[:3]
    if crops.shape[2:] != (size, size, 3) or crops.stride()[2:] != (3 * size, 3, 1) or not _is_of_bytes(crops):
        found = f"{crops.dtype} {list(crops.shape)} on {crops.device}"
        raise ValueError(f"crops are uint8 [V, n, S, S, 3] on the CPU, each contiguous, not {found}")
    if boxes.dtype.kind not in "iu":
        raise ValueError(f"boxes are integers [V, n, 4], not {boxes.dtype}")
    if boxes.shape != (views, count, 4) or len(images) != count:
        raise ValueError(f"{len(images)} images and boxes {list(boxes.shape)} do not go with crops {list(crops.shape)}")
    shapes = [image.shape for image in images]
    for image, shape in zip(images, shapes, strict=True):
        if not _is_of_bytes(image) or not image.is_contiguous() or len(shape) != 3 or shape[2] != 3:
            found = f"{image.dtype} {list(image.shape)} on {image.device}"
            raise ValueError(f"images are uint8 [H, W, 3] on the CPU, contiguous, not {found}")
    boxes = boxes.astype(np.int64, copy=False)
    sides = np.array(shapes, np.int64).reshape(count, 3)[:, :2]
    corners, lengths = boxes[..., :2], boxes[..., 2:]  # whose sum may be more than an integer holds
    if (corners < 0).any() or (lengths < 1).any() or (lengths > sides - corners).any():
        raise ValueError("a box is empty, or not inside its image")
    return boxes


def _is_of_bytes(tensor: Tensor) -> bool:
    return tensor.dtype == torch.uint8 and tensor.is_cpu
