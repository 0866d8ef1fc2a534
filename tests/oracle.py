"""The published algorithm, written once for all tests: plain modules and loops, nothing of this project.

He et al., 2020 (arXiv:1911.05722), algorithm 1, in the form of the released code. Networks carry torchvision's names,
so that the weights of ours load into them.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PlainBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al., 2016)."""

    def __init__(self, entry: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(entry, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.downsample = nn.Identity()
        if stride > 1:
            self.downsample = nn.Sequential(nn.Conv2d(entry, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.downsample(x))


class PlainResNet18(nn.Module):
    """ResNet-18 with the CIFAR stem: `channels` in its first stage, doubled in each of the three others."""

    def __init__(self, channels: int, dim: int, head: str = "mlp") -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels)
        entry = channels
        for stage in range(4):
            out = channels << stage
            blocks = nn.Sequential(PlainBlock(entry, out, 2 if stage else 1), PlainBlock(out, out, 1))
            setattr(self, f"layer{stage + 1}", blocks)
            entry = out
        self.fc = nn.Linear(entry, dim)
        if head == "mlp":
            self.fc = nn.Sequential(nn.Linear(entry, entry), nn.ReLU(), self.fc)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        return self.fc(x.mean((2, 3)))


@torch.no_grad()
def momentum_update(keys: Iterable[Tensor], queries: Iterable[Tensor], m: float) -> None:
    """k <- m k + (1 - m) q, tensor by tensor."""
    for k, q in zip(keys, queries, strict=True):
        k.copy_(k * m + q * (1 - m))


def contrastive_loss(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of the positive, column 0, among K + 1 logits: q, k [N, C] of unit length, queue [C, K]."""
    l_pos = torch.einsum("nc,nc->n", q, k).unsqueeze(-1)
    l_neg = torch.einsum("nc,ck->nk", q, queue.clone().detach())
    logits = torch.cat([l_pos, l_neg], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long))


@torch.no_grad()
def enqueue(queue: Tensor, pointer: int, keys: Tensor) -> int:
    """Write keys [N, C] into the columns of queue [C, K] one by one, so that any K will do; the new pointer."""
    for key in keys:
        queue[:, pointer] = key
        pointer = (pointer + 1) % queue.shape[1]
    return pointer
