"""The photometric steps as DALI operators: the alternative to our kernel, fed by the same plan.

Each operation runs on the samples that drew it, by DALI's conditionals. Values are float32 in [0, 1] and the arithmetic
is torchvision's, written out where DALI's operator differs: contrast turns about the crop's mean grey and not about
0.5, and hue turns in HSV, where DALI's own rotates I and Q of YIQ and is off by 13 to 17 levels of 255 at a tenth of a
turn.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from nvidia.dali import Pipeline, fn, math, pipeline_def, types
from nvidia.dali.data_node import DataNode
from torch import Tensor

from fastmoco.data.plan import (
    BRIGHTNESS,
    CONTRAST,
    FLIP,
    GRAY,
    GRAY_AFTER_JITTER,
    GRAY_BEFORE_JITTER,
    HUE,
    NO_JITTER,
    ORDER,
    SATURATION,
    SIGMA,
)


class DaliPhotometric:
    """Callable (crops uint8 [N, S, S, 3], parameters float32 [N, 8]) -> views float32 [N, 3, S, S], channels-last.

    What `kernels.photometric` computes, with the same parameters. `batch_size` bounds N; everything lies on `device`,
    and on a GPU the views are ordered on the stream current in the calling thread.
    """

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], *, batch_size: int, device: torch.device, threads: int
    ) -> None:
        self.device = device
        place = {"device_id": device.index or 0} if device.type == "cuda" else {"device_id": None}
        where = "gpu" if device.type == "cuda" else "cpu"
        options = {"batch_size": batch_size, "num_threads": threads, "prefetch_queue_depth": 1, **place}
        self._pipe: Pipeline = _chain(mean=list(mean), std=list(std), where=where, **options)
        self._pipe.build()

    def __call__(self, crops: Tensor, parameters: Tensor) -> Tensor:
        # DALI decides which branch a sample takes on the host, so the parameters are needed there.
        on_gpu = self.device.type == "cuda"
        stream = torch.cuda.current_stream(self.device) if on_gpu else None
        self._pipe.feed_input("crops", crops if on_gpu else crops.numpy(), layout="HWC", cuda_stream=stream)
        self._pipe.feed_input("parameters", parameters.cpu().numpy())
        (output,) = self._pipe.run(stream)
        views = torch.from_dlpack(output.as_tensor()).clone()  # the memory is DALI's, which writes to it again
        return views.permute(0, 3, 1, 2)


@pipeline_def(enable_conditionals=True)
def _chain(mean: list[float], std: list[float], where: str) -> DataNode:
    x = fn.external_source(name="crops", device=where, dtype=types.UINT8, ndim=3, layout="HWC")
    draws = fn.external_source(name="parameters", dtype=types.FLOAT, ndim=1)
    x = fn.cast(x, dtype=types.FLOAT) / 255.0
    gray, order = draws[GRAY], fn.cast(draws[ORDER], dtype=types.INT32)
    if gray == GRAY_BEFORE_JITTER:
        x = _gray(x)
    if order != NO_JITTER:
        x = _jitter(x, order & 3, draws)
        x = _jitter(x, (order // 4) & 3, draws)
        x = _jitter(x, (order // 16) & 3, draws)
        x = _jitter(x, (order // 64) & 3, draws)
    if gray == GRAY_AFTER_JITTER:
        x = _gray(x)
    if draws[SIGMA] > 0:
        x = fn.gaussian_blur(x, sigma=draws[SIGMA])
    mirror = fn.cast(draws[FLIP], dtype=types.INT32)
    return fn.crop_mirror_normalize(x, mean=mean, std=std, mirror=mirror, output_layout="HWC", dtype=types.FLOAT)


def _jitter(x: DataNode, which: DataNode, draws: DataNode) -> DataNode:
    if which == 0:
        x = math.clamp(x * draws[BRIGHTNESS], 0.0, 1.0)
    elif which == 1:
        x = _blend(x, fn.reductions.mean(_luma(x), axes=[0, 1, 2]), draws[CONTRAST])
    elif which == 2:
        x = _blend(x, _luma(x), draws[SATURATION])
    else:
        x = _turn_hue(x, draws[HUE])
    return x


def _blend(x: DataNode, other: DataNode, factor: DataNode) -> DataNode:
    return math.clamp(x * factor + other * (1.0 - factor), 0.0, 1.0)


def _luma(x: DataNode) -> DataNode:
    red, green, blue = _channels(x)
    return red * 0.299 + green * 0.587 + blue * 0.114


def _gray(x: DataNode) -> DataNode:
    return fn.cat(_luma(x), _luma(x), _luma(x), axis=2)


def _channels(x: DataNode) -> tuple[DataNode, DataNode, DataNode]:
    return x[:, :, 0:1], x[:, :, 1:2], x[:, :, 2:3]


def _turn_hue(x: DataNode, turn: DataNode) -> DataNode:
    red, green, blue = _channels(x)
    value = math.max(math.max(red, green), blue)
    chroma = value - math.min(math.min(red, green), blue)
    divisor = math.max(chroma, 1e-20)
    # The hue in sixths of a turn, from the channel that is highest; of equal ones the first.
    is_red = fn.cast(red == value, dtype=types.FLOAT)
    is_green = fn.cast(green == value, dtype=types.FLOAT) * (1.0 - is_red)
    is_blue = 1.0 - is_red - is_green
    from_red, from_green, from_blue = (green - blue) / divisor, (blue - red) / divisor, (red - green) / divisor
    sixth = is_red * from_red + is_green * (from_green + 2.0) + is_blue * (from_blue + 4.0) + turn * 6.0
    channels = [_channel(sixth + offset, value, chroma) for offset in (5.0, 3.0, 1.0)]
    return fn.cat(*channels, axis=2)


def _channel(k: DataNode, value: DataNode, chroma: DataNode) -> DataNode:
    # Smith's HSV to RGB in closed form: value - chroma * clamp(min(k, 4 - k), 0, 1), k modulo 6.
    k = k - math.floor(k / 6.0) * 6.0
    return value - chroma * math.clamp(math.min(k, 4.0 - k), 0.0, 1.0)
