"""Photometric augmentation on a CPU: one view after the other, each in memory that stays in a core's cache.

A view is three planes of fp32 numbers in [0, 1]. Grey and each of the jitters are one pass over them, in the order that
was drawn; the blur is one pass down and one along the rows; the last pass flips, normalises, casts and joins the
planes to pixels. The arithmetic is that of the twin, in fp32; sums of a plane are fp64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numba
import numpy as np
import torch
from torch import Tensor

from fastmoco.kernels import reference
from fastmoco.kernels.cpu.loops import Words, bytes_, floats, halves, longs, loop, narrow, part, take

FLIP, GRAY, ORDER, FIRST_FACTOR, SIGMA = (
    getattr(reference, name) for name in ("FLIP", "GRAY", "ORDER", "BRIGHTNESS", "SIGMA")
)
GRAY_BEFORE_JITTER, GRAY_AFTER_JITTER = reference.GRAY_BEFORE_JITTER, reference.GRAY_AFTER_JITTER
MIN_SIGMA, MAX_TAPS = reference.MIN_SIGMA, math.ceil(3 * reference.MAX_SIGMA) + 1
RED, GREEN, BLUE = np.float32(0.299), np.float32(0.587), np.float32(0.114)
ZERO, ONE, TINY = np.float32(0), np.float32(1), np.finfo(np.float32).tiny

PHOTOMETRIC = Words("crops parameters rows views scales size channels", floats="max_sigma")


@part
def _clip(x):
    return min(max(x, ZERO), ONE)


@part
def _open(crop, pixels, r, g, b):
    for i in range(pixels):
        r[i] = np.float32(crop[3 * i]) / np.float32(255)
        g[i] = np.float32(crop[3 * i + 1]) / np.float32(255)
        b[i] = np.float32(crop[3 * i + 2]) / np.float32(255)


@part
def _gray(pixels, r, g, b):
    for i in range(pixels):
        gray = RED * r[i] + GREEN * g[i] + BLUE * b[i]
        r[i] = gray
        g[i] = gray
        b[i] = gray


@part
def _toward(pixels, plane, factor, center):
    for i in range(pixels):
        plane[i] = _clip(plane[i] * factor + center)


@part
def _mean(pixels, plane):
    # 32 sums, which LLVM makes vectors of; one would have to be added to number by number.
    sums = np.zeros(32, np.float32)
    total = 0.0
    for start in range(0, pixels, 2048):
        sums[:] = 0
        stop = min(start + 2048, pixels)
        whole = start + (stop - start) // 32 * 32
        for i in range(start, whole, 32):
            for k in range(32):
                sums[k] += plane[np.uint64(i) + np.uint64(k)]
        for k in range(32):
            total += sums[k]
        for i in range(whole, stop):
            total += plane[i]
    return np.float32(total / pixels)


@part
def _contrast(pixels, r, g, b, factor):
    mean = RED * _mean(pixels, r) + GREEN * _mean(pixels, g) + BLUE * _mean(pixels, b)
    center = (ONE - factor) * mean
    _toward(pixels, r, factor, center)
    _toward(pixels, g, factor, center)
    _toward(pixels, b, factor, center)


@part
def _saturation(pixels, r, g, b, factor):
    rest = ONE - factor
    for i in range(pixels):
        gray = (RED * r[i] + GREEN * g[i] + BLUE * b[i]) * rest
        r[i] = _clip(r[i] * factor + gray)
        g[i] = _clip(g[i] * factor + gray)
        b[i] = _clip(b[i] * factor + gray)


@part
def _hue(pixels, r, g, b, turns):
    """From red, the hue is 1 + (g + b - r - low) / chroma sixths of a turn away, towards green where g > b."""
    for i in range(pixels):
        red, green, blue = r[i], g[i], b[i]
        low = min(min(red, green), blue)
        chroma = max(max(red, green), blue) - low
        hue = ONE + (green + blue - red - low) / max(chroma, TINY)
        hue = (hue if green >= blue else -hue) + np.float32(6) * turns
        hue -= np.float32(6) * np.floor(hue / np.float32(6))
        r[i] = low + chroma * _clip(abs(hue - np.float32(3)) - ONE)
        g[i] = low + chroma * _clip(np.float32(2) - abs(hue - np.float32(2)))
        b[i] = low + chroma * _clip(np.float32(2) - abs(hue - np.float32(4)))


@part
def _jitter(pixels, r, g, b, draws):
    order = np.int64(draws[ORDER])
    for position in range(4):
        code = (order >> (2 * position)) & 3
        factor = draws[FIRST_FACTOR + code]
        if code == 0:
            _toward(pixels, r, factor, ZERO)
            _toward(pixels, g, factor, ZERO)
            _toward(pixels, b, factor, ZERO)
        elif code == 1:
            _contrast(pixels, r, g, b, factor)
        elif code == 2:
            _saturation(pixels, r, g, b, factor)
        else:
            _hue(pixels, r, g, b, factor)


@part
def _reflect(i, size):
    i = abs(i)
    return min(i, 2 * (size - 1) - i)


@part
def _weigh(size, target, first, second, weight):
    for i in range(size):
        target[i] += weight * (first[i] + second[i])


@part
def _scale(size, target, source, weight):
    for i in range(size):
        target[i] = weight * source[i]


@part
def _blur(size, plane, other, line, weights, radius):
    """The plane at the address `plane`, blurred in place; `other` has room for it, `line` for a row and its margins."""
    row = 4 * size
    for y in range(size):
        _scale(size, floats(other + y * row), floats(plane + y * row), weights[0])
        for tap in range(1, radius + 1):
            above, below = plane + _reflect(y - tap, size) * row, plane + _reflect(y + tap, size) * row
            _weigh(size, floats(other + y * row), floats(above), floats(below), weights[tap])
    for y in range(size):
        source, padded, middle = floats(other + y * row), floats(line), line + 4 * radius
        for x in range(size):
            padded[radius + x] = source[x]
        for x in range(radius):
            padded[x] = source[_reflect(x - radius, size)]
            padded[radius + size + x] = source[_reflect(size + x, size)]
        _scale(size, floats(plane + y * row), floats(middle), weights[0])
        for tap in range(1, radius + 1):
            before, after = floats(middle - 4 * tap), floats(middle + 4 * tap)
            _weigh(size, floats(plane + y * row), before, after, weights[tap])


@part
def _taps(sigma, radius, weights):
    total = 0.0
    for tap in range(radius + 1):
        weights[tap] = math.exp(-0.5 * (tap / sigma) ** 2)
        total += weights[tap] * (1 if tap == 0 else 2)
    for tap in range(radius + 1):
        weights[tap] = weights[tap] / total


@part
def _close(size, channels, r, g, b, flip, scales, view):
    for y in range(size):
        for x in range(size):
            i = y * size + (size - 1 - x if flip else x)
            place = (y * size + x) * channels
            view[place] = narrow((r[i] - scales[0]) / scales[3], view)
            view[place + 1] = narrow((g[i] - scales[1]) / scales[4], view)
            view[place + 2] = narrow((b[i] - scales[2]) / scales[5], view)
            if channels == 4:
                view[place + 3] = narrow(ZERO, view)


@part
def _augment(a, piece, planes, weights, view):
    size, pixels = a.size, a.size * a.size
    draws = floats(a.parameters + 32 * piece)
    r, g, b, other = planes, planes + 4 * pixels, planes + 8 * pixels, planes + 12 * pixels
    _open(bytes_(a.crops + 3 * pixels * piece), pixels, floats(r), floats(g), floats(b))
    if draws[GRAY] == GRAY_BEFORE_JITTER:
        _gray(pixels, floats(r), floats(g), floats(b))
    if draws[ORDER] >= 0:
        _jitter(pixels, floats(r), floats(g), floats(b), draws)
    if draws[GRAY] == GRAY_AFTER_JITTER:
        _gray(pixels, floats(r), floats(g), floats(b))
    if draws[SIGMA] > 0:
        sigma = max(min(np.float64(draws[SIGMA]), a.max_sigma), MIN_SIGMA)
        radius = min(np.int64(math.ceil(np.float32(3) * np.float32(sigma))), size - 1)
        _taps(sigma, radius, weights)
        for plane in (r, g, b):
            _blur(size, plane, other, other + 4 * pixels, weights, radius)
    _close(size, a.channels, floats(r), floats(g), floats(b), draws[FLIP] > 0, floats(a.scales), view)


@part
def _room(size):
    """fp32 numbers that a thread needs: four planes, and a row with its margins."""
    return 4 * size * size + size + 2 * MAX_TAPS


@loop(PHOTOMETRIC)
def _photometric_bf16(words):
    a = numba.carray(words, 1)[0]
    planes, weights = np.empty(_room(a.size), np.float32), np.empty(MAX_TAPS, np.float32)
    piece = take(words)
    while piece < a.pieces:
        row = piece if a.rows == 0 else longs(a.rows)[piece]
        view = halves(a.views + 2 * row * a.size * a.size * a.channels)
        _augment(a, piece, np.int64(planes.ctypes.data), weights, view)
        piece = take(words)
    planes[0] = 0  # a last use: numba frees an array after its last, and knows nothing of addresses


@loop(PHOTOMETRIC)
def _photometric_fp32(words):
    a = numba.carray(words, 1)[0]
    planes, weights = np.empty(_room(a.size), np.float32), np.empty(MAX_TAPS, np.float32)
    piece = take(words)
    while piece < a.pieces:
        row = piece if a.rows == 0 else longs(a.rows)[piece]
        view = floats(a.views + 4 * row * a.size * a.size * a.channels)
        _augment(a, piece, np.int64(planes.ctypes.data), weights, view)
        piece = take(words)
    planes[0] = 0  # as above


LOOPS = {torch.bfloat16: _photometric_bf16, torch.float32: _photometric_fp32}


def photometric(
    crops: Tensor,
    parameters: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    dtype: torch.dtype,
    channels: int,
    rows: Tensor | None,
    max_sigma: float,
) -> Tensor:
    """Views of crops: `kernels.photometric` for fp32 and bf16. Raises ValueError if `rows` is no permutation."""
    count, size = crops.shape[:2]
    if rows is not None:
        reference.inverse(rows)
    views = torch.empty((count, size, size, channels), dtype=dtype, device="cpu")
    scales = torch.tensor([*mean, *std], dtype=torch.float32, device="cpu")
    arguments = {"crops": crops, "parameters": parameters, "rows": rows, "views": views, "scales": scales}
    LOOPS[dtype](count, size=size, channels=channels, max_sigma=max_sigma, **arguments)
    return views.permute(0, 3, 1, 2)
