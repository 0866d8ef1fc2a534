"""Residual networks with torchvision's names and numerics (He et al., 2016; v1.5: the 3x3 convolution strides).

Differences from torchvision's: batch norm is grouped and fused with ReLU and residual, memory is channels-last, every
channel count can be scaled, and the stem can be that for small images.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmoco.encoder.norm import BatchNormAct
from fastmoco.encoder.projection import projection, reset_linear
from fastmoco.kernels.convolution import conv2d

STAGE_CHANNELS = (64, 128, 256, 512)


class Architecture(NamedTuple):
    """Blocks of the four stages, channels out of a block per channel in, and width of a bottleneck's 3x3 layer."""

    blocks: tuple[int, int, int, int]
    expansion: int = 4
    inner: int = 1


ARCHITECTURES = {
    "resnet18": Architecture((2, 2, 2, 2), expansion=1),
    "resnet34": Architecture((3, 4, 6, 3), expansion=1),
    "resnet50": Architecture((3, 4, 6, 3)),
    "resnet101": Architecture((3, 4, 23, 3)),
    "resnet152": Architecture((3, 8, 36, 3)),
    "wide_resnet50_2": Architecture((3, 4, 6, 3), inner=2),
    "wide_resnet101_2": Architecture((3, 4, 23, 3), inner=2),
}


class Convolution(nn.Conv2d):
    """nn.Conv2d without bias, computed by `kernels.convolution`."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, out, H/stride, W/stride], channels-last."""
        return conv2d(x, self.weight, stride=self.stride[0], padding=int(self.padding[0]))


Pair = tuple[Tensor, Tensor]


class Block(nn.Module):
    """Convolutions beside a shortcut; the last norm takes in the shortcut, and the shortcut's norm, in one pass.

    A block takes its input twice, for its convolutions and for its shortcut, and gives its output twice: then the two
    gradients of an output are added in the backward of the norm that made it.
    """

    downsample: nn.Sequential | None
    bn2: BatchNormAct

    def _join(self, norm: BatchNormAct, y: Tensor, x: Tensor) -> Pair:
        if self.downsample is None:
            return norm(y, x, twice=True)
        conv, shortcut = self.downsample
        return norm(y, conv(x), shortcut, twice=True)


class BasicBlock(Block):
    """Two 3x3 convolutions."""

    def __init__(self, entry: int, width: int, out: int, stride: int, group_size: int) -> None:
        super().__init__()
        self.conv1 = _conv(entry, width, 3, stride)
        self.bn1 = BatchNormAct(width, group_size=group_size)
        self.conv2 = _conv(width, out, 3)
        self.bn2 = BatchNormAct(out, group_size=group_size)
        self.downsample = _downsample(entry, out, stride, group_size)

    def forward(self, pair: Pair) -> Pair:
        """[N, C, H, W] -> [N, out, H/stride, W/stride], each twice."""
        x, again = pair
        return self._join(self.bn2, self.conv2(self.bn1(self.conv1(x))), again)


class Bottleneck(Block):
    """A 3x3 convolution between two 1x1 convolutions."""

    def __init__(self, entry: int, width: int, out: int, stride: int, group_size: int) -> None:
        super().__init__()
        self.conv1 = _conv(entry, width, 1)
        self.bn1 = BatchNormAct(width, group_size=group_size)
        self.conv2 = _conv(width, width, 3, stride)
        self.bn2 = BatchNormAct(width, group_size=group_size)
        self.conv3 = _conv(width, out, 1)
        self.bn3 = BatchNormAct(out, group_size=group_size)
        self.downsample = _downsample(entry, out, stride, group_size)

    def forward(self, pair: Pair) -> Pair:
        """[N, C, H, W] -> [N, out, H/stride, W/stride], each twice."""
        x, again = pair
        y = self.bn2(self.conv2(self.bn1(self.conv1(x))))
        return self._join(self.bn3, self.conv3(y), again)


class Encoder(nn.Module):
    """Residual network with a projection head `fc`; `features` are what is kept after pretraining.

    Input [N, 3, S, S] in any float type, best channels-last; or [N, 4, S, S], whose last channel is zero: pixels of
    whole 8 bytes are what cuDNN's tensor-core kernels for a first layer take. `state_dict` has torchvision's keys, and
    the head's.
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(
        self,
        arch: str,
        *,
        width: float,
        stem: str,
        head: str,
        dim: int,
        bn_group: int,
        generator: torch.Generator,
        zero_init: bool = False,
    ) -> None:
        super().__init__()
        shape = ARCHITECTURES[arch]
        channels = [max(1, round(count * width)) for count in STAGE_CHANNELS]
        # On the meta device nothing is allocated or drawn until the generator fills the weights.
        with torch.device("meta"):
            self._add_stem(stem, channels[0], bn_group)
            entry = channels[0]
            for stage, (base, blocks) in enumerate(zip(channels, shape.blocks, strict=True), start=1):
                layers = _stage(shape, entry, base, blocks, stride=1 if stage == 1 else 2, group_size=bn_group)
                self.add_module(f"layer{stage}", layers)
                entry = base * shape.expansion
            self.fc = projection(head, entry, dim, bn_group)
        self.feature_dim = entry
        self._norms = [module for module in self.modules() if isinstance(module, BatchNormAct)]
        # Not by to_empty: its empty_like of a meta tensor is Python code that imports sympy, 0.3 s.
        self._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu"))
        self._reset(generator, zero_init)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _add_stem(self, stem: str, channels: int, group_size: int) -> None:
        self.maxpool: nn.Module
        if stem == "imagenet":
            self.conv1, self.maxpool = _conv(3, channels, 7, 2), nn.MaxPool2d(3, stride=2, padding=1)
        else:
            self.conv1, self.maxpool = _conv(3, channels, 3), nn.Identity()
        self.bn1 = BatchNormAct(channels, group_size=group_size)

    @torch.no_grad()
    def _reset(self, generator: torch.Generator, zero_init: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu", generator=generator)
            elif isinstance(module, nn.Linear):
                reset_linear(module, generator)
            elif isinstance(module, BatchNormAct):
                module.reset()
        for module in self.modules():
            if zero_init and isinstance(module, Block):
                last = module.bn3 if isinstance(module, Bottleneck) else module.bn2
                last.weight.zero_()

    def _stem(self, x: Tensor) -> Tensor:
        if x.shape[1] == self.conv1.in_channels:
            return self.conv1(x)
        weight = F.pad(self.conv1.weight, (0, 0, 0, 0, 0, x.shape[1] - self.conv1.in_channels))
        return F.conv2d(x, weight, stride=self.conv1.stride, padding=self.conv1.padding)

    def _enter(self, x: Tensor) -> Pair:
        # The norm pools as well: `maxpool` says by its presence that it is to, and keeps torchvision's name.
        return self.bn1(x, twice=True) if isinstance(self.maxpool, nn.Identity) else self.bn1.pooled(x)

    def features(self, x: Tensor) -> Tensor:
        """[N, 3 or 4, S, S] -> [N, feature_dim]: the pooled output of the last stage."""
        if self.training:
            torch._foreach_add_([norm.num_batches_tracked for norm in self._norms], 1)
        x = x.to(self.conv1.weight.dtype, memory_format=torch.channels_last)
        pair = self._enter(self._stem(x))
        x, _ = self.layer4(self.layer3(self.layer2(self.layer1(pair))))
        return F.adaptive_avg_pool2d(x, 1).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3 or 4, S, S] -> [N, dim]: the projection, not normalised."""
        return self.fc(self.features(x))


def _stage(shape: Architecture, entry: int, base: int, blocks: int, *, stride: int, group_size: int) -> nn.Sequential:
    kind = BasicBlock if shape.expansion == 1 else Bottleneck
    width, out = base * shape.inner, base * shape.expansion
    layers = [kind(entry, width, out, stride, group_size)]
    layers += [kind(out, width, out, 1, group_size) for _ in range(blocks - 1)]
    return nn.Sequential(*layers)


def _downsample(entry: int, out: int, stride: int, group_size: int) -> nn.Sequential | None:
    if stride == 1 and entry == out:
        return None
    return nn.Sequential(_conv(entry, out, 1, stride), BatchNormAct(out, group_size=group_size, relu=False))


def _conv(entry: int, out: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return Convolution(entry, out, kernel, stride, padding=kernel // 2, bias=False)
