"""The stem's end on a CPU: batch norm + ReLU + max-pool and its gradient as compiled loops, sample by sample.

The method and the passes are those of `kernels.batch_norm_pool`.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np
import torch
from torch import Tensor

from fastmoco.kernels.cpu.batch_norm import sums_of
from fastmoco.kernels.cpu.batch_norm_gradient_loops import slopes
from fastmoco.kernels.cpu.batch_norm_loops import affine
from fastmoco.kernels.cpu.loops import (
    Loop,
    Words,
    alike,
    bytes_,
    floats,
    halves,
    loop,
    narrow_or_nan,
    part,
    take,
    times,
    widen,
)

NOWHERE = 9  # the place of a result that the ReLU has clipped
NEVER = 255  # no place

# A piece is a sample, and a group has `splits`. `vectors` fp32 [pieces, 7, C]: scale, shift, room for a residual's
# scale, the scale's sign; of a window the largest value times the sign, that value, and its place.
POOL = Words(
    "x y peaks places weight bias moments residual_weight residual_bias residual_moments vectors "
    "height across channels width splits groups"
)


@part
def _look(x, channels, sign, at, best, value, place):
    """Whether a pixel of the window is larger than those before it: the first of equals, and NaN, as torch picks."""
    for c in range(channels):
        v = widen(x[c])
        candidate = v * sign[c]
        better = (candidate > best[c]) | (candidate != candidate)
        best[c] = candidate if better else best[c]
        value[c] = v if better else value[c]
        place[c] = at if better else place[c]


@part
def _start(channels, best, value, place):
    for c in range(channels):
        best[c] = -np.inf
        value[c] = 0
        place[c] = 0


@part
def _write(channels, scale, shift, value, place, y, peaks, places):
    for c in range(channels):
        out = value[c] * scale[c] + shift[c]
        if peaks is not None:
            peaks[c] = narrow_or_nan(value[c], peaks)
            places[c] = np.uint8(np.int32(np.float32(NOWHERE) if out <= 0 else place[c]))
        y[c] = narrow_or_nan(np.float32(0) if out < 0 else out, y)


@part
def _pool_row(a, x, y, peaks, places, row, vectors, size, kind):
    """A row of results; x, y, peaks and places are addresses, numbers of `size` bytes, as `kind` points to."""
    c, wide = a.channels, (a.across + 1) // 2
    scale, shift, sign = floats(vectors), floats(vectors + 4 * c), floats(vectors + 12 * c)
    best, value, place = floats(vectors + 16 * c), floats(vectors + 20 * c), floats(vectors + 24 * c)
    for column in range(wide):
        _start(c, best, value, place)
        for at in range(9):
            h, w = 2 * row - 1 + at // 3, 2 * column - 1 + at % 3
            if 0 <= h < a.height and 0 <= w < a.across:
                pixel = alike(kind, x + size * (h * a.across + w) * c)
                _look(pixel, c, sign, np.float32(at), best, value, place)
        to = (row * wide + column) * c
        if peaks != 0:
            kept = bytes_(places + to)
            _write(c, scale, shift, value, place, alike(kind, y + size * to), alike(kind, peaks + size * to), kept)
        else:
            _write(c, scale, shift, value, place, alike(kind, y + size * to), None, None)


@part
def _pool_all(words, a, size, kind):
    c = a.channels
    piece = take(words)
    while piece < a.pieces:
        vectors, scale, sign = a.vectors + 28 * piece * c, floats(a.vectors + 28 * piece * c), piece
        affine(a, piece // a.splits, scale, floats(vectors + 4 * c), floats(vectors + 8 * c))
        sign = floats(vectors + 12 * c)
        for k in range(c):
            sign[k] = np.float32(1) if scale[k] > 0 else np.float32(-1) if scale[k] < 0 else np.float32(0)
        pixels, results = a.height * a.across * c, (a.height + 1) // 2 * ((a.across + 1) // 2) * c
        peaks = 0 if a.peaks == 0 else a.peaks + size * piece * results
        for row in range((a.height + 1) // 2):
            _pool_row(
                a,
                a.x + size * piece * pixels,
                a.y + size * piece * results,
                peaks,
                a.places + piece * results,
                row,
                vectors,
                size,
                kind,
            )
        piece = take(words)


@loop(POOL)
def _pool_bf16(words):
    _pool_all(words, numba.carray(words, 1)[0], 2, halves(0))


@loop(POOL)
def _pool_fp32(words):
    _pool_all(words, numba.carray(words, 1)[0], 4, floats(0))


# `vectors` fp32 [pieces, 3, C]: slopes of the gradient and of x, and shift; `rows` are those of x in a group.
UNPOOL = Words(
    "grad places x grad_x weight moments sums vectors height across channels width splits groups rows training"
)


@part
def _spread(g, p, codes, offsets, x, grad_x, channels, of_g, of_x, shift):
    """The gradient of a pixel of x: from each window that it lies in, if it has the place `codes` says it would."""
    for c in range(channels):
        total = np.float32(0)
        total += widen(g[offsets[0] + c]) if p[offsets[0] + c] == codes[0] else np.float32(0)
        total += widen(g[offsets[1] + c]) if p[offsets[1] + c] == codes[1] else np.float32(0)
        total += widen(g[offsets[2] + c]) if p[offsets[2] + c] == codes[2] else np.float32(0)
        total += widen(g[offsets[3] + c]) if p[offsets[3] + c] == codes[3] else np.float32(0)
        grad_x[c] = narrow_or_nan(total * of_g[c] + times(widen(x[c]), of_x[c]) + shift[c], grad_x)


@part
def _unpool_pixel(a, grad, places, x, grad_x, h, w, vectors, size, kind):
    c, high, wide = a.channels, (a.height + 1) // 2, (a.across + 1) // 2
    row, column, down, along = h // 2, w // 2, h % 2, w % 2
    right, below = along == 1 and column + 1 < wide, down == 1 and row + 1 < high
    here = (row * wide + column) * c
    offsets = (
        here,
        here + (c if right else 0),
        here + (wide * c if below else 0),
        here + ((wide + 1) * c if right and below else 0),
    )
    codes = (
        4 + 3 * down + along,
        3 + 3 * down if right else NEVER,
        1 + along if below else NEVER,
        0 if right and below else NEVER,
    )
    pixel = size * (h * a.across + w) * c
    of_g, of_x, shift = floats(vectors), floats(vectors + 4 * c), floats(vectors + 8 * c)
    _spread(grad, places, codes, offsets, alike(kind, x + pixel), alike(kind, grad_x + pixel), c, of_g, of_x, shift)


@part
def _unpool_all(words, a, size, kind):
    c = a.channels
    piece = take(words)
    while piece < a.pieces:
        vectors = a.vectors + 12 * piece * c
        slopes(a, piece // a.splits, floats(a.weight), floats(a.moments), 1, vectors)
        pixels, results = a.height * a.across * c, (a.height + 1) // 2 * ((a.across + 1) // 2) * c
        grad, places = alike(kind, a.grad + size * piece * results), bytes_(a.places + piece * results)
        x, grad_x = a.x + size * piece * pixels, a.grad_x + size * piece * pixels
        for h in range(a.height):
            for w in range(a.across):
                _unpool_pixel(a, grad, places, x, grad_x, h, w, vectors, size, kind)
        piece = take(words)


@loop(UNPOOL)
def _unpool_bf16(words):
    _unpool_all(words, numba.carray(words, 1)[0], 2, halves(0))


@loop(UNPOOL)
def _unpool_fp32(words):
    _unpool_all(words, numba.carray(words, 1)[0], 4, floats(0))


class _Loops(NamedTuple):
    pool: Loop
    unpool: Loop


LOOPS = {torch.bfloat16: _Loops(_pool_bf16, _unpool_bf16), torch.float32: _Loops(_pool_fp32, _unpool_fp32)}


def pool(x: Tensor, weight: Tensor, bias: Tensor, moments: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The result; and for backward the values of x that won (peaks) and their places uint8, else nothing."""
    samples, channels, height, width = x.shape
    shape = (samples, (height + 1) // 2, (width + 1) // 2, channels)
    y = x.new_empty(shape).permute(0, 3, 1, 2)
    peaks, places = (torch.empty_like(y, dtype=dtype) for dtype in (x.dtype, torch.uint8))
    vectors = torch.empty(samples * 7 * channels, dtype=torch.float32, device="cpu")
    tensors = {"x": x, "y": y, "peaks": peaks if keep else None, "places": places, "vectors": vectors}
    tensors |= {"weight": weight, "bias": bias, "moments": moments}
    LOOPS[x.dtype].pool(samples, **tensors, **_sizes(x, moments))
    if not keep:
        peaks, places = peaks.new_empty(0), places.new_empty(0)
    return y, peaks, places


def gradients(
    grad: Tensor,
    second_grad: Tensor | None,
    x: Tensor,
    peaks: Tensor,
    places: Tensor,
    weight: Tensor,
    bias: Tensor,
    moments: Tensor,
    training: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of x, and of [bias, weight], fp32 [2, C]."""
    masked_sum, sums, totals = sums_of(grad, second_grad, peaks, weight, bias, moments)
    grad_x, rows = torch.empty_like(x), x.numel() // x.shape[1] // moments.shape[1]
    vectors = torch.empty(x.shape[0] * 3 * x.shape[1], dtype=torch.float32, device="cpu")
    tensors = {"grad": masked_sum, "places": places, "x": x, "grad_x": grad_x, "sums": sums, "vectors": vectors}
    tensors |= {"weight": weight, "moments": moments}
    LOOPS[x.dtype].unpool(x.shape[0], rows=rows, training=int(training), **tensors, **_sizes(x, moments))
    return grad_x, totals


def _sizes(x: Tensor, moments: Tensor) -> dict[str, int]:
    samples, channels, height, width = x.shape
    groups = moments.shape[1]
    sizes = {"height": height, "across": width, "channels": channels, "width": channels}
    return sizes | {"splits": samples // groups, "groups": groups}
