"""batch_norm_act in a torchvision-style ResNet: batch norm, ReLU and residual in one pass, with the same weights.

    model = fuse(torchvision.models.resnet50(weights=...)).to(memory_format=torch.channels_last)

Names of weights and buffers stay, and so do results, up to rounding; images must be channels-last. `groups` takes the
batch norm's statistics over that many equal parts of a batch, as so many GPUs would. Run this file to see both.
"""

from __future__ import annotations

import copy
from types import MethodType

import torch
from torch import Tensor, nn

from fastmoco.kernels import Norm, batch_norm_act


class NormAct(nn.BatchNorm2d):
    """nn.BatchNorm2d with what follows it: an optional residual, through the shortcut's own norm or not, and ReLU."""

    groups = 1

    def forward(self, x: Tensor, residual: Tensor | None = None, shortcut: NormAct | None = None) -> Tensor:
        """ReLU(BN(x)), ReLU(BN(x) + residual), or ReLU(BN(x) + BN'(residual)); x [N, C, H, W], channels-last."""
        norms = [norm for norm in (self, shortcut) if norm is not None]
        for norm in norms if self.training else ():
            norm.num_batches_tracked += 1
        own, *others = (Norm(norm.weight, norm.bias, (norm.running_mean, norm.running_var)) for norm in norms)
        groups = self.groups if self.training else 1
        rest = {"momentum": self.momentum, "eps": self.eps, "training": self.training}
        return batch_norm_act(x, *own, groups, residual=residual, residual_norm=others[0] if others else None, **rest)


def fuse(model: nn.Module, groups: int = 1) -> nn.Module:
    """Change a ResNet of torchvision's layout in place, and return it.

    A block has conv1, bn1, conv2, bn2, perhaps conv3 and bn3, and downsample (None, or a convolution and a norm); the
    stem has conv1, bn1 and relu. Raises ValueError for a batch norm without weights or running statistics.
    """
    for module in list(model.modules()):
        if isinstance(module, nn.BatchNorm2d):
            if not (module.affine and module.track_running_stats) or module.momentum is None:
                raise ValueError("batch norm must have weights, running statistics and a momentum")
            module.__class__ = NormAct
            module.groups = groups
    for module in list(model.modules()):
        if hasattr(module, "downsample"):
            module.forward = MethodType(_block, module)
        elif hasattr(module, "bn1") and hasattr(module, "relu"):
            module.relu = nn.Identity()  # the stem's: its norm has done it
    return model


def _block(self: nn.Module, x: Tensor) -> Tensor:
    y = self.bn1(self.conv1(x))
    if hasattr(self, "conv3"):
        y = self.bn2(self.conv2(y))
    conv, norm = (self.conv3, self.bn3) if hasattr(self, "conv3") else (self.conv2, self.bn2)
    if self.downsample is None:
        return norm(conv(y), x)
    shortcut_conv, shortcut_norm = self.downsample
    return norm(conv(y), shortcut_conv(x), shortcut_norm)


class Block(nn.Module):
    """A block as torchvision writes it, so that this file runs without torchvision."""

    def __init__(self, entry: int, out: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(entry, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        shortcut = nn.Sequential(nn.Conv2d(entry, out, 1, bias=False), nn.BatchNorm2d(out))
        self.downsample = None if entry == out else shortcut

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, out, H, W]."""
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + shortcut)


def main() -> None:
    """One batch through two blocks, fused and not."""
    torch.manual_seed(0)
    plain = nn.Sequential(Block(8, 16), Block(16, 16)).to(memory_format=torch.channels_last)
    fused = fuse(copy.deepcopy(plain))
    x = torch.randn(8, 8, 14, 14).to(memory_format=torch.channels_last)
    theirs, ours = plain(x), fused(x)
    print(f"largest difference of an output: {(ours - theirs).abs().max():.1e}")
    theirs.square().mean().backward()
    ours.square().mean().backward()
    pairs = zip(fused.parameters(), plain.parameters(), strict=True)
    print(f"largest difference of a gradient: {max((a.grad - b.grad).abs().max().item() for a, b in pairs):.1e}")


if __name__ == "__main__":
    main()
