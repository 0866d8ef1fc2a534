"""Running statistics of batch norm as one tensor: kept, restored and averaged over ranks at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmoco.encoder import Encoder
from fastmoco.parallel import Parallel

NAMES = ("running_mean", "running_var")


class Statistics:
    """The running means and variances of all batch norms of `encoders`.

    They become views of one tensor, `flat` [n], in place: the encoders use them as before.
    """

    def __init__(self, *encoders: Encoder) -> None:
        places: list[tuple[dict[str, Any], str]] = [
            (module._buffers, name)
            for encoder in encoders
            for module in encoder.modules()
            for name in NAMES
            if module._buffers.get(name) is not None
        ]
        self.flat = torch.cat([buffers[name] for buffers, name in places])
        parts = self.flat.split([buffers[name].numel() for buffers, name in places])
        for (buffers, name), part in zip(places, parts, strict=True):
            buffers[name] = part

    def snapshot(self) -> Tensor:
        """A copy [n], for `keep_finite`."""
        return self.flat.clone()

    def keep_finite(self, before: Tensor) -> None:
        """Go back to the snapshot `before` where anything has become infinite or NaN since."""
        self.flat.copy_(torch.where(self.flat.isfinite().all(), self.flat, before))

    def merge(self, parallel: Parallel) -> None:
        """Take the mean over the ranks, on all of them."""
        if parallel.world > 1:
            self.flat.copy_(parallel.mean(self.flat))
