"""InfoNCE in the original MoCo builder: three lines, and no N x K logits.

The published builder (moco/builder.py of He et al., 2020) keeps its queue as [dim, K], multiplies queries with it,
joins the logits and leaves the loss to cross-entropy. In its `forward`:

    - logits = torch.cat([l_pos, l_neg], dim=1) / self.T, with labels 0, for nn.CrossEntropyLoss
    + queue = self.queue.T.contiguous()                       # [K, dim]; or keep it so, as `Contrast` below does
    + loss, rank = info_nce(q, k, queue, self.T)              # each [N]; top-1 accuracy is (rank == 0)
    + loss = loss.mean()

The kernel normalises q itself, so `q = nn.functional.normalize(q, dim=1)` may go, or stay. Run this file for the two
side by side on a random batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmoco.kernels import enqueue, info_nce


def published_loss(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Loss [] and top-1 share [] as the published code computes them: queue [dim, K], unit q and k [N, dim]."""
    positive = (q * k).sum(1, keepdim=True)
    logits = torch.cat([positive, q @ queue], dim=1) / temperature
    labels = torch.zeros(len(q), dtype=torch.long, device=q.device)
    return F.cross_entropy(logits, labels), (logits.argmax(1) == 0).float().mean()


class Contrast(nn.Module):
    """A queue of keys [K, dim] and the loss over it: what replaces queue and logits in a builder."""

    queue: Tensor
    queue_ptr: Tensor

    def __init__(self, dim: int = 128, size: int = 65536, temperature: float = 0.07) -> None:
        super().__init__()
        self.temperature = temperature
        self.register_buffer("queue", F.normalize(torch.randn(size, dim), dim=1))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.int64))

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Loss [] and top-1 share [] of queries q [N, dim] against unit keys k [N, dim] and the queue."""
        loss, rank = info_nce(q, k, self.queue, self.temperature)
        return loss.mean(), (rank == 0).float().mean()

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Keys [N, dim] of all ranks take the place of the oldest; after backward, which on a CPU needs the queue.

        Any N will do, since writing wraps around; the published code needs an N that divides K.
        """
        enqueue(self.queue, self.queue_ptr, keys)


def main() -> None:
    """One batch through both."""
    torch.manual_seed(0)
    contrast = Contrast(size=4096)
    projection = torch.randn(256, 128, requires_grad=True)
    k = F.normalize(projection.detach() + torch.randn(256, 128), dim=1)
    theirs = published_loss(F.normalize(projection, dim=1), k, contrast.queue.T.clone(), contrast.temperature)
    (their_gradient,) = torch.autograd.grad(theirs[0], projection)
    ours = contrast(projection, k)
    (our_gradient,) = torch.autograd.grad(ours[0], projection)
    contrast.enqueue(k)
    print(f"published {theirs[0]:.6f}, top-1 {theirs[1]:.1%}; fastmoco {ours[0]:.6f}, top-1 {ours[1]:.1%}")
    print(f"largest difference of a gradient: {(our_gradient - their_gradient).abs().max():.1e}")


if __name__ == "__main__":
    main()
