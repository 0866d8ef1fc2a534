"""A bottleneck where no gradient will ever be asked for, as in the key encoder: fewer passes over its activations.

The 1x1 convolutions measure what they write, for the batch norm behind them; the last one also applies, as it reads,
the batch norm and ReLU before it. So of the three inner tensors the first is rewritten in place, the second read once
for its statistics and never stored normalised, and the third read once, for batch norm, shortcut and ReLU. Where that
does not pay (`conv1x1.pays`; in a ResNet-50, the third and fourth stage) torch convolves, and the statistics and the
batch norm are passes of their own, in place. Running statistics move as in the plain forward pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from fastmoco.encoder.norm import BatchNormAct
from fastmoco.kernels.batch_norm import Measured, measure, normalise
from fastmoco.kernels.conv1x1 import conv1x1, pays

if TYPE_CHECKING:
    from fastmoco.encoder.resnet import Bottleneck


def bottleneck(block: Bottleneck, x: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, out, H/stride, W/stride], channels-last: what `block` computes in training."""
    impl = block.bn1.impl
    y, norm = _convolve(block.conv1, block.bn1, x)
    y = block.conv2(normalise(y, norm, overwrite=True, impl=impl))
    y, norm = _convolve(block.conv3, block.bn3, y, entry=_measure(block.bn2, y))
    shortcut, side = _shortcut(block.downsample, x)
    return normalise(y, norm, residual=shortcut, residual_norm=side, overwrite=True, impl=impl)


def _shortcut(downsample: nn.Sequential | None, x: Tensor) -> tuple[Tensor, Measured | None]:
    if downsample is None:
        return x, None
    conv, norm = downsample
    if conv.stride == (1, 1):
        return _convolve(conv, norm, x)
    y = conv(x)
    return y, _measure(norm, y)


def _convolve(conv: nn.Conv2d, norm: BatchNormAct, x: Tensor, entry: Measured | None = None) -> tuple[Tensor, Measured]:
    if not pays(conv.in_channels, conv.out_channels):
        y = conv(x if entry is None else normalise(x, entry, overwrite=True, impl=norm.impl))
        return y, _measure(norm, y)
    given = {"momentum": norm.momentum, "eps": norm.eps, "impl": norm.impl}
    return conv1x1(x, conv.weight, norm.norm, norm.groups(x.shape[0]), entry=entry, **given)


def _measure(norm: BatchNormAct, x: Tensor) -> Measured:
    given = {"momentum": norm.momentum, "eps": norm.eps, "impl": norm.impl}
    return measure(x, norm.norm, norm.groups(x.shape[0]), **given)
