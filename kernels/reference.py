"""Plain-torch twins of the kernels: the CPU path, the tests' oracle and the benchmarks' baseline.

Each function has the public signature of its kernel less `impl`. They compute in the widest of fp32 and the inputs'
type, so float64 inputs give a float64 oracle. None of them reads a value back to the host.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Columns of the photometric parameters, one row a view (float32 [N, 8]).
FLIP, GRAY, ORDER, BRIGHTNESS, CONTRAST, SATURATION, HUE, SIGMA = range(8)
GRAY_NEVER, GRAY_BEFORE_JITTER, GRAY_AFTER_JITTER = 0, 1, 2
NO_JITTER = -1  # in ORDER; otherwise four 2-bit codes, lowest bits first: 0 brightness, 1 contrast, 2 saturation, 3 hue


def info_nce(z_q: Tensor, k: Tensor, queue: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    """InfoNCE of normalised queries against one positive and the whole queue (He et al., 2020, equation 1)."""
    wide = torch.promote_types(z_q.dtype, torch.float32)
    q = F.normalize(z_q.to(wide), dim=1)
    positive = (q * k.detach().to(wide)).sum(1, keepdim=True)
    negatives = q @ queue.detach().to(wide).T
    loss = torch.logsumexp(torch.cat([positive, negatives], 1) / temperature, 1) - positive[:, 0] / temperature
    rank = (negatives > positive).sum(1, dtype=torch.int32)
    return loss, rank


def enqueue(queue: Tensor, pointer: Tensor, keys: Tensor) -> None:
    """Write `keys` into the ring at `pointer` and advance it, wrapping at the end; of too many keys the last K stay."""
    size = queue.shape[0]
    kept = keys[-size:]
    skipped = keys.shape[0] - kept.shape[0]
    rows = (pointer + skipped + torch.arange(kept.shape[0], device=queue.device)) % size
    queue.index_copy_(0, rows, kept.to(queue.dtype))
    pointer.copy_((pointer + keys.shape[0]) % size)
