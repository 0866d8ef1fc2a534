"""What a step of MoCo v2 on a ResNet-50 can cost on four GPUs, and what is expected of ours, before any was measured.

    python -m fastmoco.bench.forecast

prints pairs a second for 32 and 256 pairs: the physical bound, the practical one, and the expectation. That also counts
what both leave out: batch norm that does not reach the whole bandwidth, augmentation, the update, and short kernels.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from fastmoco.bench import roofline
from fastmoco.bench.roofline import ASSUMED_CONVOLUTION_RATES, CONVOLUTION_RATES, Conv
from fastmoco.encoder import build_encoder
from fastmoco.presets import PRESETS
from fastmoco.recipe import Recipe

LEVEL = "bnrelu"
BATCHES = (32, 256)


class Gpu(NamedTuple):
    """What a GPU sustains: operations of a 16-bit matrix product and bytes of memory, a second."""

    flops: float
    bandwidth: float


# 80 to 83 % of the data sheets' dense bf16 rate and 86 to 90 % of their bandwidth.
GPUS = {
    "A100": Gpu(260e12, 1.75e12),
    "H100": Gpu(790e12, 3.0e12),
    "H200": Gpu(790e12, 4.3e12),
    "B200": Gpu(1800e12, 7.0e12),
}
NORM_SHARE = 0.85  # of the bandwidth that batch norm's passes reach: bytes in flight of the compiled kernels
UPDATE_BYTES = 32  # a parameter: SGD, momentum update and casts (`sgd_ema.cost`, bf16)
VIEWS = 2.1e-6  # seconds of augmentation a pair on an H100, by its instructions
SHORT = 159 * 3e-6 + 0.8e-3  # seconds a step: batch norm's second stages, and the ends of some 800 kernels


def expected_seconds(convs: list[Conv], batch: int, gpu: Gpu, rate: float, parameters: int) -> float:
    """Seconds of one step of `batch` pairs with convolutions at `rate` operations a second."""
    works = [work for keep in (True, False) for work in roofline.forward_work(convs, LEVEL, batch, keep)]
    works += roofline.backward_work(convs, LEVEL, batch)
    seconds = 0.0
    for work in works:
        share = 1.0 if work.flops else NORM_SHARE
        seconds += max(work.flops / min(rate, gpu.flops), work.nbytes / (share * gpu.bandwidth))
    return batch * (seconds + VIEWS) + UPDATE_BYTES * parameters / gpu.bandwidth + SHORT


def table(recipe: Recipe, batches: tuple[int, ...] = BATCHES) -> str:
    """Bounds and expectation of every GPU as a Markdown table, in pairs a second."""
    encoder = build_encoder(recipe)
    convs = roofline.convolutions(encoder, recipe.crop_size)
    parameters = sum(parameter.numel() for parameter in encoder.parameters())
    lines = ["| GPU | pairs | physical bound | practical bound | expected |", "|---|---:|---:|---:|---:|"]
    for name, gpu in GPUS.items():
        rates = (CONVOLUTION_RATES | ASSUMED_CONVOLUTION_RATES)[name]
        for batch in batches:
            bounds = [1 / roofline.seconds_per_pair(convs, LEVEL, batch, flops, gpu.bandwidth) for flops in rates]
            physical = 1 / roofline.seconds_per_pair(convs, LEVEL, batch, *gpu)
            expected = [batch / expected_seconds(convs, batch, gpu, rate, parameters) for rate in rates]
            ranges = " | ".join(f"{low:,.0f} to {high:,.0f}" for low, high in (bounds, expected))
            assumed = " (rates assumed)" * (name in ASSUMED_CONVOLUTION_RATES)
            lines.append(f"| {name}{assumed} | {batch} | {physical:,.0f} | {ranges} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(dataclasses.replace(PRESETS["v2"][1], arch="resnet50")))
