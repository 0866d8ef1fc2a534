"""Photometric augmentation: uint8 crops and one row of drawn parameters a view -> normalised channels-last views.

Three launches, each over all views, each leaving at once where a view has nothing for it:

1. mean grey, of views with jitter: applies what comes before contrast, sums 0.299 R + 0.587 G + 0.114 B over a block.
2. color: grey and jitters; a sharp view is flipped, normalised, cast and stored, a blurred one goes to scratch.
3. blur: two products of a square of pixels with a banded matrix, V X V' with V[o, i] = exp(-(i - o - r)^2 / 2 sigma^2)
   for |i - o - r| <= r = ceil(3 sigma), scaled to rows of sum 1; then flip, normalise, cast, store. The borders are
   reflected in the reads. A square of E pixels gives E - 2r. Operands are fp16 with fp32 accumulation: [0, 1] in fp16
   is 1/16 of an 8-bit level off at most. For fp32 results they are fp32, by three-term tf32. A program has one
   channel: three would share V and store whole pixels, but take 124 registers a thread on sm_90 and 252 on sm_80.

Pixels are read four at a time, 12 bytes by three loads, where the size is even, and a sharp pixel of four channels is
written by one store of 8 bytes.

Bytes a view of S x S pixels, C channels and e bytes an element: 3 S^2 read, 3 S^2 read again where jitter was drawn
(from L2 while a launch's crops fit there), C S^2 e written, and 12 S^2 through scratch where blur was drawn (24 for
fp32); besides, 32 of parameters, and 4 each block's sum. 512 views of 224 px in bf16 with MoCo v2's draws:
77 + 62 + 154 + 154 MB. Some 200 fp32 instructions a pixel take as long again. Scratch has room for every view, as the
shapes of the launches depend on N and S alone; nothing is read back, so a CUDA graph may hold them.

A view's sums are added in a fixed order: two runs give the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmoco.kernels import reference
from fastmoco.kernels.dispatch import (
    NAMES,
    Impl,
    cast,
    check_dtype,
    dot,
    is_traced,
    launch_options,
    machine,
    maker,
    variant,
)
from fastmoco.kernels.tiles import Tiles, Variant, tiles

__all__ = ["cost", "photometric", "variants"]

FLOPS_PER_PIXEL, BLUR_FLOPS_PER_PIXEL = 94, 156  # four jitters and normalisation; two passes of 13 taps on 3 channels
COLUMNS = tl.constexpr(8)
FLIP, GRAY, ORDER = (tl.constexpr(column) for column in (reference.FLIP, reference.GRAY, reference.ORDER))
FACTORS, SIGMA = tl.constexpr(reference.BRIGHTNESS), tl.constexpr(reference.SIGMA)
GRAY_BEFORE_JITTER = tl.constexpr(reference.GRAY_BEFORE_JITTER)
GRAY_AFTER_JITTER = tl.constexpr(reference.GRAY_AFTER_JITTER)
MIN_SIGMA = tl.constexpr(reference.MIN_SIGMA)
CONTRAST_CODE = tl.constexpr(1)


@triton.jit
def _luma(r, g, b):
    return 0.299 * r + 0.587 * g + 0.114 * b


@triton.jit
def _toward(x, center, factor):
    return tl.minimum(tl.maximum(factor * x + (1.0 - factor) * center, 0.0), 1.0)


@triton.jit
def _hue(r, g, b, turns):
    # From red, the hue is 1 + (g + b - r - low) / chroma sixths of a turn away, towards green where g > b.
    low = tl.minimum(tl.minimum(r, g), b)
    chroma = tl.maximum(tl.maximum(r, g), b) - low
    from_red = 1.0 + (g + b - r - low) / tl.maximum(chroma, 1e-12)
    hue = tl.where(g >= b, from_red, -from_red) + 6.0 * turns
    hue -= 6.0 * tl.floor(hue * (1.0 / 6.0))
    r = low + chroma * tl.minimum(tl.maximum(tl.abs(hue - 3.0) - 1.0, 0.0), 1.0)
    g = low + chroma * tl.minimum(tl.maximum(2.0 - tl.abs(hue - 2.0), 0.0), 1.0)
    b = low + chroma * tl.minimum(tl.maximum(2.0 - tl.abs(hue - 4.0), 0.0), 1.0)
    return r, g, b


@triton.jit
def _jitters(r, g, b, draws, order, center, count):
    for position in range(count):
        code = (order >> (2 * position)) & 3
        factor = tl.load(draws + FACTORS + code)
        if code == 3:
            r, g, b = _hue(r, g, b, factor)
        elif code == 2:
            gray = _luma(r, g, b)
            r, g, b = _toward(r, gray, factor), _toward(g, gray, factor), _toward(b, gray, factor)
        else:
            pivot = tl.where(code == CONTRAST_CODE, center, 0.0)
            r, g, b = _toward(r, pivot, factor), _toward(g, pivot, factor), _toward(b, pivot, factor)
    return r, g, b


@triton.jit
def _quads(first, second, third, fourth, BLOCK: tl.constexpr):
    # Four numbers of each of BLOCK / 4 quads of pixels, in the order of the pixels.
    return tl.reshape(tl.join(tl.join(first, third), tl.join(second, fourth)), [BLOCK])


@triton.jit
def _bytes(crop, start, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    # Pixels [start, start + BLOCK) of a crop, zero beyond its end. A crop of an even size is made of whole quads, 12
    # bytes that three loads fetch.
    if SIZE % 2 == 0:
        quad = start // 4 + tl.arange(0, BLOCK // 4)
        mask = quad < SIZE * SIZE // 4
        words = crop.to(tl.pointer_type(tl.uint32)) + quad * 3
        u = tl.load(words, mask=mask, other=0)
        v = tl.load(words + 1, mask=mask, other=0)
        w = tl.load(words + 2, mask=mask, other=0)
        r = _quads(u & 255, u >> 24, (v >> 16) & 255, (w >> 8) & 255, BLOCK)
        g = _quads((u >> 8) & 255, v & 255, v >> 24, (w >> 16) & 255, BLOCK)
        b = _quads((u >> 16) & 255, (v >> 8) & 255, w & 255, w >> 24, BLOCK)
    else:
        pixel = start + tl.arange(0, BLOCK)
        mask = pixel < SIZE * SIZE
        r = tl.load(crop + pixel * 3, mask=mask, other=0)
        g = tl.load(crop + pixel * 3 + 1, mask=mask, other=0)
        b = tl.load(crop + pixel * 3 + 2, mask=mask, other=0)
    return r, g, b


@triton.jit
def _pixels(crop, start, draws, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    r, g, b = _bytes(crop, start, SIZE, BLOCK)
    r, g, b = (
        r.to(tl.float32) * (1.0 / 255.0),
        g.to(tl.float32) * (1.0 / 255.0),
        b.to(tl.float32) * (1.0 / 255.0),
    )
    if tl.load(draws + GRAY) == GRAY_BEFORE_JITTER:
        gray = _luma(r, g, b)
        r, g, b = gray, gray, gray
    return r, g, b


@triton.jit
def _jittered_pixels(
    crop, start, draws, sums, SIZE: tl.constexpr, BLOCKS: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr
):
    r, g, b = _pixels(crop, start, draws, SIZE, BLOCK)
    order = tl.load(draws + ORDER).to(tl.int32)
    if order >= 0:
        lane = tl.arange(0, LANES)
        center = tl.sum(tl.load(sums + lane, mask=lane < BLOCKS, other=0.0), 0) / (SIZE * SIZE)
        r, g, b = _jitters(r, g, b, draws, order, center, 4)
    if tl.load(draws + GRAY) == GRAY_AFTER_JITTER:
        gray = _luma(r, g, b)
        r, g, b = gray, gray, gray
    return r, g, b


@triton.jit
def _flip(draws, pixel, SIZE: tl.constexpr):
    return tl.where(tl.load(draws + FLIP) > 0, pixel + (SIZE - 1 - 2 * (pixel % SIZE)), pixel)


@triton.jit
def _destination(rows, view):
    if rows is None:
        row = view
    else:
        row = tl.load(rows + view)
    return row


@triton.jit
def _band(offset, radius, sigma, OPERAND: tl.constexpr):
    ratio = offset.to(tl.float32) / sigma
    return tl.where(tl.abs(offset) <= radius, tl.exp2(-0.7213475204444817 * ratio * ratio), 0.0).to(OPERAND)


@triton.jit
def _reflect(index, SIZE: tl.constexpr):
    return tl.maximum(SIZE - 1 - tl.abs(SIZE - 1 - tl.abs(index)), 0)  # 0 only where no valid pixel looks


@triton.jit
def _pick(channel, first, second, third):
    return tl.where(channel == 0, first, tl.where(channel == 1, second, third))


@triton.jit
def _mean_gray_kernel(crops, parameters, sums, SIZE: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    view = tl.program_id(0).to(tl.int64) // BLOCKS
    start = tl.program_id(0) % BLOCKS * BLOCK
    draws = parameters + view * COLUMNS
    order = tl.load(draws + ORDER).to(tl.int32)
    if order >= 0:
        before = 0
        for position in range(1, 4):
            before = tl.where(((order >> (2 * position)) & 3) == CONTRAST_CODE, position, before)
        mask = start + tl.arange(0, BLOCK) < SIZE * SIZE
        r, g, b = _pixels(crops + view * (SIZE * SIZE * 3), start, draws, SIZE, BLOCK)
        r, g, b = _jitters(r, g, b, draws, order, 0.0, before)
        tl.store(sums + tl.program_id(0), tl.sum(tl.where(mask, _luma(r, g, b), 0.0), 0))


@triton.jit
def _color_kernel(
    crops,
    parameters,
    sums,
    rows,
    views,
    scratch,
    scale_r,
    scale_g,
    scale_b,
    shift_r,
    shift_g,
    shift_b,
    SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCKS: tl.constexpr,
    LANES: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    view = tl.program_id(0).to(tl.int64) // TILES
    pixels: tl.constexpr = SIZE * SIZE
    start = tl.program_id(0) % TILES * BLOCK
    pixel = start + tl.arange(0, BLOCK)
    mask = pixel < pixels
    draws = parameters + view * COLUMNS
    r, g, b = _jittered_pixels(
        crops + view * (pixels * 3), start, draws, sums + view * BLOCKS, SIZE, BLOCKS, LANES, BLOCK
    )
    if tl.load(draws + SIGMA) > 0:
        plane = scratch + view * (pixels * 3) + pixel
        tl.store(plane, r.to(scratch.dtype.element_ty), mask=mask)
        tl.store(plane + pixels, g.to(scratch.dtype.element_ty), mask=mask)
        tl.store(plane + 2 * pixels, b.to(scratch.dtype.element_ty), mask=mask)
    else:
        dtype: tl.constexpr = views.dtype.element_ty
        red = cast(r * scale_r + shift_r, dtype)
        green = cast(g * scale_g + shift_g, dtype)
        blue = cast(b * scale_b + shift_b, dtype)
        place = views + _destination(rows, view) * (pixels * CHANNELS)
        offset = _flip(draws, pixel, SIZE) * CHANNELS
        if CHANNELS == 4:  # a whole pixel by one store; [BLOCK, 2, 2] holds red green, blue 0
            whole = tl.join(tl.join(red, blue), tl.join(green, tl.zeros_like(blue)))
            at = offset[:, None] + tl.arange(0, 4)[None, :]
            tl.store(place + at, tl.reshape(whole, [BLOCK, 4]), mask=mask[:, None])
        else:
            tl.store(place + offset, red, mask=mask)
            tl.store(place + offset + 1, green, mask=mask)
            tl.store(place + offset + 2, blue, mask=mask)


@triton.jit
def _blur_kernel(
    parameters,
    rows,
    views,
    scratch,
    scale_r,
    scale_g,
    scale_b,
    shift_r,
    shift_g,
    shift_b,
    SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    TILES: tl.constexpr,
    EDGE: tl.constexpr,
    MAX_SIGMA: tl.constexpr,
    MAX_RADIUS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    channel = tl.program_id(0) % 3  # neighbours share sectors of the views, which L2 joins
    view = tl.program_id(0).to(tl.int64) // (3 * TILES * TILES)
    tile = tl.program_id(0) // 3 % (TILES * TILES)
    draws = parameters + view * COLUMNS
    drawn_sigma = tl.load(draws + SIGMA)
    sigma = tl.maximum(tl.minimum(drawn_sigma, MAX_SIGMA), MIN_SIGMA)
    radius = tl.minimum(tl.ceil(3.0 * sigma).to(tl.int32), MAX_RADIUS)
    step = EDGE - 2 * radius
    top, left = tile // TILES * step, tile % TILES * step
    if (drawn_sigma > 0) & (tl.maximum(top, left) < SIZE):
        operand: tl.constexpr = scratch.dtype.element_ty
        at = tl.arange(0, EDGE)
        down = _band(at[None, :] - at[:, None] - radius, radius, sigma, operand)
        scale = 1.0 / tl.sum(_band(at - EDGE // 2, radius, sigma, operand).to(tl.float32), 0)
        # V is symmetric, so a view is as well flipped where it is read; and rows and columns make short addresses.
        row, column = _reflect(top + at - radius, SIZE), _flip(draws, _reflect(left + at - radius, SIZE), SIZE)
        source = scratch + (view * 3 + channel) * (SIZE * SIZE) + row * SIZE
        x = dot(down, tl.load(source[:, None] + column[None, :]), None, PRECISION) * scale
        x = dot(x.to(operand), tl.trans(down), None, PRECISION) * scale
        x = x * _pick(channel, scale_r, scale_g, scale_b) + _pick(channel, shift_r, shift_g, shift_b)
        x = cast(x, views.dtype.element_ty)
        place = views + _destination(rows, view) * (SIZE * SIZE * CHANNELS) + channel + (top + at) * (SIZE * CHANNELS)
        place = place[:, None] + ((left + at) * CHANNELS)[None, :]
        mask = ((at < step) & (top + at < SIZE))[:, None] & ((at < step) & (left + at < SIZE))[None, :]
        tl.store(place, x, mask=mask)
        if CHANNELS == 4:
            if channel == 2:  # not by the colours' kernel: half-written sectors would leave the L2 cache in between
                tl.store(place + 1, tl.zeros_like(x), mask=mask)


class _Plan(NamedTuple):
    kernel: Any
    programs: int
    tile: Tiles
    constants: dict[str, Any]

    def launch(self, views: int, *arguments: Any) -> None:
        self.kernel[(views * self.programs,)](*arguments, **self.constants, **launch_options(self.tile))


def _plans(
    size: int, channels: int, dtype: torch.dtype, max_sigma: float, capability: tuple[int, int] | int | None
) -> list[_Plan]:
    wide = dtype is torch.float32
    gray, color = (tiles(f"photometric.{phase}", capability) for phase in ("mean_gray", "color"))
    blur = tiles("photometric.blur.fp32" if wide else "photometric.blur", capability)
    pixels, edge = size * size, blur.block[0]
    blocks, strips = triton.cdiv(pixels, gray.block[0]), triton.cdiv(pixels, color.block[0])
    max_radius = min(math.ceil(np.float32(3) * np.float32(max_sigma)), size - 1)  # as the kernel rounds
    squares = triton.cdiv(size, edge - 2 * max_radius)
    view = {"SIZE": size, "CHANNELS": channels}
    sums = {"BLOCKS": blocks, "LANES": triton.next_power_of_2(blocks)}
    square = {"TILES": squares, "EDGE": edge, "MAX_SIGMA": max_sigma, "MAX_RADIUS": max_radius}
    square["PRECISION"] = "tf32x3" if wide else "tf32"
    return [
        _Plan(_mean_gray_kernel, blocks, gray, {"SIZE": size, "BLOCKS": blocks, "BLOCK": gray.block[0]}),
        _Plan(_color_kernel, strips, color, view | sums | {"TILES": strips, "BLOCK": color.block[0]}),
        _Plan(_blur_kernel, 3 * squares**2, blur, view | square),
    ]


def _scratch_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype is torch.float32 else torch.float16


def _empty_views(crops: Tensor, dtype: torch.dtype, channels: int) -> Tensor:
    return crops.new_empty((*crops.shape[:3], channels), dtype=dtype).permute(0, 3, 1, 2)


def _launch(
    crops: Tensor,
    parameters: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    channels: int,
    rows: Tensor | None,
    max_sigma: float,
    by: str,
) -> Tensor:
    if by != "triton":
        options = {"dtype": dtype, "channels": channels, "rows": rows, "max_sigma": max_sigma}
        return _on_cpu(by)(crops, parameters, mean, std, **options)
    n, size = crops.shape[:2]
    views = _empty_views(crops, dtype, channels)
    gray, color, blur = _plans(size, channels, dtype, max_sigma, machine(crops.device).capability)
    if crops.data_ptr() % 4:
        crops = crops.clone()  # its pixels are read by words
    sums = crops.new_empty((n, gray.constants["BLOCKS"]), dtype=torch.float32)
    scratch = crops.new_empty((n, 3, size, size), dtype=_scratch_dtype(dtype))
    affine = [1 / value for value in std] + [-center / value for center, value in zip(mean, std)]
    with torch.cuda.device_of(crops):
        gray.launch(n, crops, parameters, sums)
        color.launch(n, crops, parameters, sums, rows, views, scratch, *affine)
        blur.launch(n, parameters, rows, views, scratch, *affine)
    return views


def _on_cpu(by: str) -> Callable[..., Tensor]:
    if by == "reference":
        return reference.photometric
    from fastmoco.kernels.cpu.photometric import photometric as loops  # imports numba, which only a CPU wants

    return loops


_operator = torch.library.custom_op("fastmoco::photometric", _launch, mutates_args=())


@_operator.register_fake
def _(crops, parameters, mean, std, dtype, channels, rows, max_sigma, by):
    return _empty_views(crops, dtype, channels)


def _check(crops, parameters, mean, std, dtype, channels, rows, max_sigma):
    n = crops.shape[0] if crops.dim() else 0
    if crops.dtype != torch.uint8 or crops.dim() != 4 or crops.shape[3] != 3 or crops.shape[1] != crops.shape[2]:
        raise ValueError(f"crops must be uint8 [N, S, S, 3], not {crops.dtype} {list(crops.shape)}")
    if not crops.is_contiguous() or crops.numel() == 0:
        raise ValueError(f"crops must be contiguous and hold at least one pixel: {list(crops.shape)}")
    if parameters.dtype != torch.float32 or parameters.shape != (n, 8) or not parameters.is_contiguous():
        raise ValueError(f"parameters must be contiguous float32 [{n}, 8], not {_kind(parameters)}")
    if rows is not None and (rows.dtype != torch.int64 or rows.shape != (n,) or not rows.is_contiguous()):
        raise ValueError(f"rows must be contiguous int64 [{n}], not {_kind(rows)}")
    for name, tensor in (("parameters", parameters), ("rows", rows)):
        if tensor is not None and tensor.device != crops.device:
            raise ValueError(f"{name} on {tensor.device} must be where crops are: {crops.device}")
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(f"mean and std must have three values, std positive: {tuple(mean)}, {tuple(std)}")
    if not 0 <= max_sigma <= reference.MAX_SIGMA:
        raise ValueError(f"max_sigma must be from 0 to {reference.MAX_SIGMA:g}, not {max_sigma}")
    if channels not in (3, 4):
        raise ValueError(f"channels must be 3 or 4, not {channels}")
    check_dtype("dtype", dtype)


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} of strides {tensor.stride()}"


def photometric(
    crops: Tensor,
    parameters: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    dtype: torch.dtype = torch.float32,
    channels: int = 3,
    rows: Tensor | None = None,
    max_sigma: float = reference.MAX_SIGMA,
    impl: Impl = "auto",
) -> Tensor:
    """Augmented, normalised views [N, channels, S, S] of `dtype`, channels-last, of uint8 crops [N, S, S, 3].

    Row i of `parameters` (float32 [N, 8], columns named in `kernels.reference`) says what happens to crop i: grey
    before the jitters, the jitters in the drawn order with torchvision's semantics (brightness x f; contrast about the
    mean grey of the crop at that moment; saturation about grey 0.299 R + 0.587 G + 0.114 B; HSV hue shift in turns;
    each clamped to [0, 1]), grey after them, a Gaussian blur of deviation SIGMA pixels (none at 0) over a radius of
    ceil(3 SIGMA) pixels (at most S - 1) with reflected borders, horizontal flip, (x - mean) / std, cast. A SIGMA above
    `max_sigma` (at most 4) is taken for it: the largest that is drawn, given here, spares the kernel work.
    View i goes to row rows[i] (int64 [N], a permutation; on a GPU that is not checked), or i. With 4 channels the last
    is zero. impl="auto" is Triton on a GPU, compiled loops on a CPU; float64 is served by the reference alone.
    Raises ValueError for what does not fit.
    """
    _check(crops, parameters, mean, std, dtype, channels, rows, max_sigma)
    by = maker(impl, crops.device, dtype)
    mean, std = [float(value) for value in mean], [float(value) for value in std]
    call = _operator if is_traced(crops) else _launch
    return call(crops, parameters, mean, std, dtype, channels, rows, float(max_sigma), by)


def cost(
    n: int, size: int, *, dtype: torch.dtype, channels: int = 3, permuted: bool = False, blurred: float = 0.0
) -> tuple[int, int]:
    """(bytes, flops) no implementation can avoid for n views of `size` pixels square.

    Bytes: crops, parameters and, where `permuted`, destination rows read once, views written once. Flops: of a pixel's
    four jitters and normalisation, and of a separable blur of radius 6 (sigma 2) for the share `blurred` of the views.
    """
    pixels = n * size * size
    bytes_moved = 3 * pixels + 32 * n + 8 * n * permuted + channels * pixels * dtype.itemsize
    return bytes_moved, pixels * (FLOPS_PER_PIXEL + round(blurred * BLUR_FLOPS_PER_PIXEL))


def variants(arch: int) -> list[Variant]:
    """What the compile gate compiles: the launches at 224 px in bf16, with and without padding and destination rows,
    and in fp32, whose blur is another; with MoCo v2's deviations and the largest.
    """
    launches = ((torch.bfloat16, 3, True, 2.0), (torch.bfloat16, 4, False, 4.0), (torch.float32, 3, False, 2.0))
    return [
        _variant(plan, dtype, channels, permuted)
        for dtype, channels, permuted, max_sigma in launches
        for plan in _plans(224, channels, dtype, max_sigma, arch)
    ]


def _variant(plan: _Plan, dtype: torch.dtype, channels: int, permuted: bool) -> Variant:
    arguments = plan.kernel.arg_names
    types = dict.fromkeys(arguments, "fp32") | {"crops": "*u8", "parameters": "*fp32", "sums": "*fp32", "rows": "*i64"}
    types |= {"views": f"*{NAMES[dtype]}", "scratch": f"*{NAMES[_scratch_dtype(dtype)]}"}
    constants = plan.constants | ({"rows": None} if "rows" in arguments and not permuted else {})
    phase = plan.kernel.__name__.removeprefix("_").removesuffix("_kernel")
    label = f"photometric.{phase} {NAMES[dtype]} C={channels}{' permuted' * permuted}"
    return variant(label, plan.kernel, plan.tile, types, constants, streaming=True)
