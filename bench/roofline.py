"""What one MoCo step must cost: arithmetic and memory traffic of an encoder, layer by layer, by level of fusion.

Every convolution is read off the encoder itself. Around it stand passes over its output, and how many depends on what
is fused with what:

  eager    convolution | statistics | normalise | ReLU | add, each a kernel of its own
  bnrelu   normalise + ReLU (+ add, or + the shortcut's batch norm, or + the stem's max-pooling) in one kernel, backward
           in two passes, the first of which adds the gradients of a block's two readers: what our kernels do, pass by
           pass
  stats    and the statistics in the convolutions' epilogues, forward and backward
  main     and normalise + ReLU in the next convolution's prologue, so that inner activations are never written

A kernel takes the larger of its arithmetic and its memory time. Assumed: activations of `ACTIVATION_BYTES` each,
weights read once a batch, nothing stays in the cache from one kernel to the next, no gaps between launches. The key
encoder runs forward only. Per image pair: query forward, query backward, key forward.

That is a physical bound: `flops` is what a matrix product reaches. No convolution does. With `flops` at the rate that
convolutions reach, `CONVOLUTION_RATES`, the same sum is a practical bound, which a very good implementation comes near.
On a CPU both count the multiplications that `kernels.convolution` makes, which Winograd's algorithm has fewer of.
`forecast.py` makes a table of both, of four GPUs, and of what is expected of ours.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import nn

from fastmoco.kernels.convolution import Layer, saving

LEVELS = ("eager", "bnrelu", "stats", "main")  # what fuses more comes later
ACTIVATION_BYTES = 2
# Operations a second of a ResNet-50's convolutions, by GPU: at least and at most. The lower is what explains a
# published training rate with batch norm inside the convolutions, the upper one with plain convolutions. Of an H100 and
# an H200: MLPerf Training v4.0, 7,159 and 7,945 images a second, which is 1.11 times for 1.43 times the bandwidth;
# plain ones by the ratio of an A100 at equal fusion, 1 / 0.84. Of an A100, at 90 % of its 2.04 TB/s: MLPerf Training
# v2.0, 3,399 images a second on each of 8, and NVIDIA's DeepLearningExamples (MXNet 22.10, fused batch norm, one GPU),
# 3,410.
CONVOLUTION_RATES = {"A100": (104e12, 139e12), "H100": (270e12, 340e12), "H200": (270e12, 340e12)}
# Of a B200 no training rate of a ResNet-50 is published: MLPerf had left it out by then. Assumed: those of an H100
# times what RetinaNet gained, 37.0 minutes on 8 H100 (MLPerf Training v3.0) and 21.5 on 8 B200 (v5.1), 1.72 times.
ASSUMED_CONVOLUTION_RATES = {"B200": (464e12, 585e12)}

# Passes over a convolution's output, beside the convolution itself, by level and by the place of the convolution:
# stem, inner (followed by BN + ReLU), last (of a block: BN + add + ReLU), shortcut (BN alone, or fused with the last).
FORWARD_PASSES = {
    "eager": {"stem": 5, "inner": 5, "last": 8, "shortcut": 3},
    "bnrelu": {"stem": 3, "inner": 3, "last": 4, "shortcut": 1},
    "stats": {"stem": 2, "inner": 2, "last": 3, "shortcut": 0},
    "main": {"stem": 2, "inner": 0, "last": 3, "shortcut": 0},
}
BACKWARD_PASSES = {
    "eager": {"stem": 8, "inner": 8, "last": 8, "shortcut": 5},
    "bnrelu": {"stem": 5, "inner": 5, "last": 7, "shortcut": 1},
    "stats": {"stem": 5, "inner": 3, "last": 6, "shortcut": 2},
    "main": {"stem": 2, "inner": 0, "last": 3, "shortcut": 2},
}
# Of a stem whose max-pooling is fused with its batch norm, forward and backward; what is pooled comes on top.
POOLED_STEM_PASSES = {"bnrelu": (2, 2), "stats": (1, 2), "main": (1, 2)}


@dataclass(frozen=True)
class Conv:
    """One convolution of an encoder, per image: elements in, channels and side out, weights, operations, its place."""

    name: str
    place: str  # stem, inner, last or shortcut
    inputs: int
    channels: int
    side: int
    weights: int
    flops: float
    stride: int
    kernel: int
    opens_block: bool
    after_inner: bool
    pooled: int  # outputs of the max-pooling that follows, 0 where none does

    @property
    def outputs(self) -> int:
        """Output elements."""
        return self.channels * self.side**2

    @property
    def reads(self) -> float:
        """Input elements that are read: a strided 1x1 convolution skips pixels."""
        return self.inputs / self.stride**2 if self.kernel == 1 else self.inputs


@dataclass(frozen=True)
class Work:
    """Least work of one kernel for one image: floating-point operations and bytes."""

    part: str
    flops: float
    nbytes: float


def convolutions(encoder: nn.Module, pixels: int) -> list[Conv]:
    """The convolutions of a ResNet of `fastmoco.encoder`, in forward order, at `pixels` x `pixels`."""
    layers: list[tuple[str, nn.Conv2d, torch.Size, torch.Size]] = []
    hooks = []
    for name, module in encoder.named_modules():
        if isinstance(module, nn.Conv2d):
            hooks.append(
                module.register_forward_hook(
                    lambda layer, x, y, name=name: layers.append((name, layer, x[0].shape, y.shape))
                )
            )
    parameter = next(encoder.parameters())
    try:
        with torch.no_grad():
            encoder.eval()(torch.empty(1, 3, pixels, pixels, dtype=parameter.dtype, device=parameter.device))
    finally:
        for hook in hooks:
            hook.remove()
    blocks = _last_in_block([name for name, *_ in layers])
    pools = any(isinstance(module, nn.MaxPool2d) for module in encoder.modules())
    return [_conv(*layer, blocks, pools) for layer in layers]


def saved(convs: list[Conv], batch: int, dtype: torch.dtype) -> list[Conv]:
    """The convolutions with what they multiply on this CPU, in `dtype`: less where Winograd's algorithm is taken."""

    def layer(conv: Conv) -> Layer:
        inputs = conv.weights // conv.channels // conv.kernel**2
        return Layer(inputs, conv.channels, conv.kernel, conv.stride, conv.kernel // 2, batch * conv.side**2)

    return [dataclasses.replace(conv, flops=conv.flops / saving(layer(conv), dtype)) for conv in convs]


def forward_work(convs: list[Conv], level: str, batch: int, keep: bool = True) -> list[Work]:
    """Kernels of one forward pass, per image of a batch of `batch`; `keep` what backward needs, as queries do."""
    works = []
    for conv in convs:
        nbytes = ACTIVATION_BYTES * (conv.reads + conv.outputs + conv.weights / batch)
        works.append(Work("conv", conv.flops, nbytes))
        passes = POOLED_STEM_PASSES[level][0] if conv.pooled and level != "eager" else FORWARD_PASSES[level][conv.place]
        works.append(Work("norm", 0, ACTIVATION_BYTES * passes * conv.outputs))
        if conv.pooled and level == "eager":
            works.append(_eager_pool(conv))
        elif conv.pooled:  # the result, and for backward the picked values and their places of a byte
            works.append(Work("pool", 0, (ACTIVATION_BYTES + keep * (ACTIVATION_BYTES + 1)) * conv.pooled))
    return works


def backward_work(convs: list[Conv], level: str, batch: int) -> list[Work]:
    """Kernels of one backward pass, per image of a batch of `batch`."""
    works = []
    reader_passes = (
        2  # passes that the second reader of the last output costs: batch norm alone would read one gradient twice
    )
    for conv in convs:
        weights = conv.weights / batch
        passes = (
            POOLED_STEM_PASSES[level][1] if conv.pooled and level != "eager" else BACKWARD_PASSES[level][conv.place]
        )
        works.append(Work("norm", 0, ACTIVATION_BYTES * passes * conv.outputs))
        if conv.pooled and level == "eager":
            works.append(_eager_pool(conv))
        elif conv.pooled:  # the gradient twice, the picked values, and their places
            works.append(Work("pool", 0, (3 * ACTIVATION_BYTES + 1) * conv.pooled))
        gradient = conv.outputs * (2 if level == "main" else 1)  # main forms it from two tensors in the prologue
        if conv.place != "stem":
            epilogue = conv.inputs if level in ("stats", "main") and conv.after_inner else 0
            nbytes = ACTIVATION_BYTES * (gradient + conv.inputs + epilogue + weights)
            works.append(Work("dgrad", conv.flops, nbytes))
        works.append(Work("wgrad", conv.flops, ACTIVATION_BYTES * (gradient + conv.reads + 2 * weights)))
        if conv.opens_block:
            passes = {"eager": 3, "bnrelu": reader_passes}.get(level, 1)
            works.append(Work("gradient add", 0, ACTIVATION_BYTES * passes * conv.inputs))
        # A plain residual's batch norm writes the masked gradient anyway; the others read one more and write that.
        reader_passes = {"last": 1, "shortcut": 2}.get(conv.place, reader_passes)
    return works


def seconds_per_pair(
    convs: list[Conv], level: str, batch: int, flops: float, bandwidth: float, element_bytes: int = ACTIVATION_BYTES
) -> float:
    """Least seconds for one image pair at `flops` and `bandwidth` a second; raises ValueError for an unknown level."""
    if level not in LEVELS:
        raise ValueError(f"level is {level!r}: use one of {', '.join(LEVELS)}")
    query, key = (forward_work(convs, level, batch, keep) for keep in (True, False))
    backward = backward_work(convs, level, batch)
    bandwidth *= ACTIVATION_BYTES / element_bytes  # wider elements are as many more bytes
    return sum(max(work.flops / flops, work.nbytes / bandwidth) for work in [*query, *key, *backward])


def flops_per_pair(convs: list[Conv]) -> float:
    """Floating-point operations of one pair: two forward passes, and a backward that spares the input's gradient."""
    return sum(conv.flops * (3 if conv.place == "stem" else 4) for conv in convs)


def _eager_pool(conv: Conv) -> Work:
    return Work("pool", 0, ACTIVATION_BYTES * (conv.outputs + conv.pooled) + 8 * conv.pooled)  # arg-max in int64


def _last_in_block(names: list[str]) -> dict[str, str]:
    last: dict[str, str] = {}
    for name in names:
        block, _, layer = name.rpartition(".conv")
        if block:
            last[block] = max(layer, last.get(block, ""))
    return last


def _conv(name: str, layer: nn.Conv2d, x: torch.Size, y: torch.Size, last: dict[str, str], pools: bool) -> Conv:
    block, _, number = name.rpartition(".conv")
    place = "inner" if block else "stem"
    if "downsample" in name:
        place, number = "shortcut", ""
    elif block and number == last[block]:
        place = "last"
    # Four channels are read for three: the stem's input is padded to whole 8-byte pixels.
    inputs = x[1:].numel() * 4 // 3 if place == "stem" else x[1:].numel()
    macs = layer.weight.numel() * y[2] * y[3]
    return Conv(
        name,
        place,
        inputs,
        y[1],
        y[2],
        layer.weight.numel(),
        2.0 * macs,
        layer.stride[0],
        layer.kernel_size[0],
        opens_block=bool(block) and number == "1",
        after_inner=bool(block) and number > "1",
        pooled=y[1] * ((y[2] + 1) // 2) ** 2 if pools and place == "stem" else 0,
    )
