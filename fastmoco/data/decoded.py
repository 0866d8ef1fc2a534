"""Decoded images kept in memory, so that a run decodes an image once where there is room for it.

Who comes first stays. An epoch shows every image once, in a new order, so putting one out for another gains nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastmoco.data.plan import Sizes

SMALL = 256 * 10**6  # bytes: a CPU keeps the images of a set that takes no more, unless it is told otherwise
SIZES_AT_ONCE = 4096
# A PPM image of one pixel, for a decoder to decode in the place of what it should not.
PIXEL = np.frombuffer(b"P6 1 1 255\n\0\0\0", np.uint8)


def bytes_decoded(sizes: Sizes, most: int) -> int:
    """Bytes of all images of `sizes` int32 [n, 2] once decoded, or `most` if they take more."""
    total = 0
    for at in range(0, len(sizes), SIZES_AT_ONCE):
        total += 3 * int(sizes[at : at + SIZES_AT_ONCE].astype(np.int64).prod(1).sum())
        if total >= most:  # of a large set no more rows are read
            return most
    return total


class PixelCache:
    """Pixels by sample, in one block of `budget` bytes on `device`.

    A GPU's memory is taken at once, a CPU's as the block fills. Raises ValueError if so much cannot be had, or not even
    promised. Threads may fill it at once, and look meanwhile.
    """

    def __init__(self, budget: int, device: torch.device = torch.device("cpu")) -> None:
        try:
            self._block = torch.empty(budget, dtype=torch.uint8, device=device)
        except RuntimeError as error:
            message = f"no room for {budget / 1e9:g} GB of decoded images: use a smaller --decoded-cache"
            raise ValueError(message) from error
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # until what used this memory before is done with it
        self._images: dict[int, Tensor] = {}
        self._filling = threading.Lock()
        self.fill = 0
        """Bytes that are taken."""

    def __len__(self) -> int:
        return len(self._images)

    def __contains__(self, sample: int) -> bool:
        return sample in self._images

    def lend(self, stream: torch.cuda.Stream) -> None:
        """Say that it is used on `stream`: its memory goes to no one else before that has come so far."""
        self._block.record_stream(stream)

    def put(self, sample: int, image: Tensor) -> None:
        """Keep a copy of uint8 [H, W, 3], unless it is there or does not fit."""
        with self._filling:
            end = self.fill + image.numel()
            if sample in self._images or end > len(self._block):
                return
            place = self._block[self.fill : end].view(image.shape)
            if place.is_cuda:
                place.copy_(image)
            else:  # torch would start threads of its own in the loader's, which stand in the way of the step's
                np.copyto(place.numpy(), image.numpy())
            self._images[sample] = place
            self.fill = end

    def complete(self, samples: np.ndarray, encoded: Sequence[object], images: Sequence[Tensor]) -> list[Tensor]:
        """Fill the gaps: the kept image where `encoded` holds PIXEL, else the next decoded one, which is kept."""
        decoded, result = iter(images), []
        for sample, data in zip(samples.tolist(), encoded, strict=True):
            image = self._images[sample] if data is PIXEL else next(decoded)
            self.put(sample, image)
            result.append(image)
        return result
