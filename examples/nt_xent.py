"""NT-Xent in place of lightly's and pytorch-metric-learning's losses, on one process and over torch.distributed.

    - criterion = lightly.loss.NTXentLoss(temperature=0.1, gather_distributed=True)
    + criterion = NTXentLoss(temperature=0.1, gather_distributed=True)
      loss = criterion(z0, z1)

    - criterion = SelfSupervisedLoss(losses.NTXentLoss(temperature=0.1))       # of pytorch-metric-learning
    + criterion = NTXentLoss(temperature=0.1)
      loss = criterion(z0, z1)

No 2N x 2N logits are kept for backward, and over ranks no gradient travels. Run this file for one process; under
`torchrun --nproc-per-node 2 examples/nt_xent.py` two ranks share a batch and find the loss and gradient of one.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastmoco.kernels import nt_xent


class NTXentLoss(nn.Module):
    """Mean NT-Xent [] over the 2N rows of two views z0, z1 [N, D], normalised here (Chen et al., 2020, algorithm 1).

    D is a multiple of 16 up to 512. With `gather_distributed` negatives come from all ranks of the default group, all
    of which call this with equally many rows; gradients are then those of DistributedDataParallel's mean over ranks.
    """

    def __init__(self, temperature: float = 0.5, gather_distributed: bool = False) -> None:
        super().__init__()
        self.temperature, self.gather_distributed = temperature, gather_distributed

    def forward(self, z0: Tensor, z1: Tensor) -> Tensor:
        """The loss of this rank's rows."""
        if not (self.gather_distributed and dist.is_initialized() and dist.get_world_size() > 1):
            return nt_xent(z0, z1, self.temperature)[0]
        own = torch.arange(len(z0), device=z0.device) + dist.get_rank() * len(z0)
        rows = torch.cat([own, own + len(z0) * dist.get_world_size()])
        return nt_xent(z0, z1, self.temperature, gather=gather, rows=rows)[0]


def gather(rows: Tensor) -> Tensor:
    """Rows [2N, ...] of all ranks: those of their first views, then those of their second views, in rank order."""
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows.contiguous())
    first, second = zip(*(part.chunk(2) for part in parts), strict=True)
    return torch.cat([*first, *second])


def main() -> None:
    """The loss and the gradient's length of one batch of 64 pairs, whoever holds it."""
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    generator = torch.Generator().manual_seed(0)
    z0 = torch.randn(64, 128, generator=generator)
    z1 = z0 + torch.randn(64, 128, generator=generator)
    mine = slice(rank * 64 // world, (rank + 1) * 64 // world)
    z0, z1 = z0[mine].requires_grad_(), z1[mine].requires_grad_()
    loss = NTXentLoss(0.1, gather_distributed=True)(z0, z1)
    loss.backward()
    facts = torch.stack([loss.detach() / world, (z0.grad.square().sum() + z1.grad.square().sum()) / world**2])
    if world > 1:
        dist.all_reduce(facts)
    if rank == 0:
        print(f"{world} process(es): loss {facts[0]:.6f}, length of the gradient {facts[1].sqrt():.6f}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
