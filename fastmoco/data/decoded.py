"""Decoded images kept in memory, so that a run decodes an image once where there is room for it.

Who comes first stays. An epoch shows every image once, in a new order, so putting one out for another gains nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

# A PPM image of one pixel, for a decoder to decode in the place of what it should not.
PIXEL = np.frombuffer(b"P6 1 1 255\n\0\0\0", np.uint8)


class Decoded:
    """Pixels by sample, in one block of `budget` bytes. The system gives the block's memory as it fills.

    ValueError where the system would not even promise so much. One thread may fill it while others look.
    """

    def __init__(self, budget: int) -> None:
        try:
            self._block = torch.empty(budget, dtype=torch.uint8)
        except RuntimeError as error:
            raise ValueError(f"no room for {budget / 1e9:g} GB of decoded images: use a smaller --decoded-cache") from error
        self._images: dict[int, Tensor] = {}
        self.used = 0
        """Bytes that are taken."""

    def __len__(self) -> int:
        return len(self._images)

    def __contains__(self, sample: int) -> bool:
        return sample in self._images

    def put(self, sample: int, image: Tensor) -> None:
        """Keep a copy of uint8 [H, W, 3], unless it is there or does not fit."""
        end = self.used + image.numel()
        if sample in self._images or end > len(self._block):
            return
        self._images[sample] = self._block[self.used : end].view(image.shape).copy_(image)
        self.used = end

    def completed(self, samples: np.ndarray, encoded: Sequence[object], images: Sequence[Tensor]) -> list[Tensor]:
        """`images` decoded from `encoded`, with what is kept where PIXEL was; and keep the others."""
        result = []
        for sample, data, image in zip(samples.tolist(), encoded, images, strict=True):
            if data is PIXEL:
                result.append(self._images[sample])
            else:
                self.put(sample, image)
                result.append(image)
        return result
