"""The queue of negative keys: a ring of unit vectors, written at a pointer that lives on the device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmoco.kernels.enqueue import enqueue


class Queue(nn.Module):
    """Ring of `size` keys of length `dim`, filled at first with random unit vectors.

    Buffers: `keys` [K, D] in `dtype`; `pointer` int64 [1], the row written next; `count` int64 [], keys ever enqueued.
    Any K goes with any batch: writing wraps around.
    """

    def __init__(self, size: int, dim: int, dtype: torch.dtype, generator: torch.Generator) -> None:
        super().__init__()
        keys = F.normalize(torch.randn(size, dim, generator=generator), dim=1)
        self.register_buffer("keys", keys.to(dtype))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def enqueue(self, keys: Tensor) -> None:
        """Replace the oldest keys by `keys` [B, D], in their order; where one is not finite, the old key stays.

        One bad key would make every later loss infinite or NaN, until the queue had gone round.
        """
        rows = (self.pointer + torch.arange(keys.shape[0], device=keys.device)) % self.keys.shape[0]
        finite = keys.isfinite().all(1, keepdim=True)
        enqueue(self.keys, self.pointer, torch.where(finite, keys, self.keys[rows].to(keys.dtype)))
        self.count.add_(keys.shape[0])

    @property
    def filled(self) -> Tensor:
        """Share of the rows that hold keys rather than the random start: 0 to 1, on the device."""
        return (self.count / self.keys.shape[0]).clamp(max=1)
