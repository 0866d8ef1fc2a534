"""Batch norm + ReLU (+ residual) on a CPU: both passes of the gradient as compiled loops.

Pieces, runs, sums and what a call is for are those of `batch_norm_loops`.
"""

from __future__ import annotations

import numba
import numpy as np

from fastmoco.kernels.cpu.batch_norm_loops import AGAIN, GROUPS, PIECES, STRETCH, affine, bounds, flush, repeat
from fastmoco.kernels.cpu.loops import (
    Words,
    doubles,
    floats,
    halves,
    last,
    loop,
    narrow_or_nan,
    part,
    take,
    times,
    widen,
)

VECTORS = 14
"""Of a piece, fp32 [width]: scale, shift and the residual's scale for the mask, two means, three sums, the slopes of
the gradient and of x and the shift, and the same three for the residual."""

# `partial` fp64 [pieces, 3, C], `sums` fp64 [3, groups, C] and `totals` fp32 [2 or 3, C] are of g, g (x - mean) and
# g (residual - its mean), g being the masked gradient; totals are the gradients of bias and weights.
BACKWARD = Words(
    "grad grad_2 x y masked grad_x grad_residual weight bias moments residual residual_weight residual_bias "
    "residual_moments vectors partial sums totals rows channels width splits groups work training",
    floats="floor",
)


@part
def _add_sums(
    grad, grad_2, x, residual, y, masked, start, count, scale, shift, residual_scale, means, sums, floor, width
):
    for c in range(count):
        k = start + c
        g, value = widen(grad[k]), widen(x[k])
        if grad_2 is not None:
            g += widen(grad_2[k])
        away = value - means[c]
        if y is not None:
            value = widen(y[k])
        else:
            value = value * scale[c] + shift[c]
            if residual is not None:
                value += widen(residual[k]) * residual_scale[c]
        if value <= floor:
            g = np.float32(0)
        if masked is not None:
            masked[k] = narrow_or_nan(g, masked)
        sums[c] += g
        sums[width + c] += g * away
        if residual is not None:
            sums[2 * width + c] += g * (widen(residual[k]) - means[width + c])


@part
def _sums(grad, grad_2, x, residual, y, masked, first, end, channels, width, vectors, partial, floor):
    """Sums over a piece of g, of g (x - mean) and of g (residual - its mean), g being the masked gradient."""
    scale, shift = floats(vectors), floats(vectors + 4 * width)
    residual_scale, means, sums = (
        floats(vectors + 8 * width),
        floats(vectors + 12 * width),
        floats(vectors + 20 * width),
    )
    for c in range(3 * width):
        sums[c] = 0
    total = doubles(partial)
    for c in range(3 * channels):
        total[c] = 0
    start = first
    while start < end:
        stop = min(end, start + STRETCH * width)
        while start < stop:
            _add_sums(
                grad,
                grad_2,
                x,
                residual,
                y,
                masked,
                start,
                min(width, stop - start),
                scale,
                shift,
                residual_scale,
                means,
                sums,
                floor,
                width,
            )
            start += width
        for array in range(3):
            flush(floats(vectors + 4 * (5 + array) * width), width, channels, doubles(partial + 8 * array * channels))


@part
def _means(a, group, mean, residual_mean):
    moments, channels = floats(a.moments), a.channels
    for c in range(channels):
        mean[c] = moments[group * channels + c]
    repeat(mean, channels, a.width)
    if a.residual_moments != 0:
        moments = floats(a.residual_moments)
        for c in range(channels):
            residual_mean[c] = moments[group * channels + c]
        repeat(residual_mean, channels, a.width)


@part
def _sums_of(a, piece, grad, grad_2, x, residual, y, masked, v):
    (first, end), floor, p = bounds(a, piece), np.float32(a.floor), a.partial + 24 * piece * a.channels
    width, channels = a.width, a.channels
    if a.residual_moments != 0 and a.grad_2 != 0:
        _sums(grad, grad_2, x, residual, None, masked, first, end, channels, width, v, p, floor)
    elif a.residual_moments != 0:
        _sums(grad, None, x, residual, None, None, first, end, channels, width, v, p, floor)
    elif a.y != 0 and a.grad_2 != 0:
        _sums(grad, grad_2, x, None, y, masked, first, end, channels, width, v, p, floor)
    elif a.y != 0:
        _sums(grad, None, x, None, y, masked, first, end, channels, width, v, p, floor)
    elif a.grad_2 != 0:
        _sums(grad, grad_2, x, None, None, masked, first, end, channels, width, v, p, floor)
    else:
        _sums(grad, None, x, None, None, None, first, end, channels, width, v, p, floor)


@part
def _finish_sums(a, first, end):
    """Sums of groups from those of their pieces."""
    channels = a.channels
    for group in range(first, end):
        for array in range(3 if a.residual_moments != 0 else 2):
            sums = doubles(a.sums + 8 * (array * a.groups + group) * channels)
            for c in range(channels):
                sums[c] = 0
            for split in range(a.splits):
                piece = doubles(a.partial + 8 * (3 * (group * a.splits + split) + array) * channels)
                for c in range(channels):
                    sums[c] += piece[c]


@part
def _total(a):
    """The gradients of bias and weights, over groups."""
    channels, groups = a.channels, a.groups
    for array in range(3 if a.residual_moments != 0 else 2):
        totals = floats(a.totals + 4 * array * channels)
        moments = floats(a.residual_moments if array == 2 else a.moments)
        for c in range(channels):
            totals[c] = 0
        for group in range(groups):
            sums = doubles(a.sums + 8 * (array * groups + group) * channels)
            for c in range(channels):
                totals[c] += sums[c] * (1.0 if array == 0 else moments[(groups + group) * channels + c])


# The gradient itself, slope_g g + slope_x x + shift for each input.


@part
def slopes(a, group, weight, moments, product, vectors):
    """From dL/dx = w s (g - mean(g) - (x - mean) s^2 mean(g (x - mean))), s being 1 / deviation."""
    groups, channels, width = a.groups, a.channels, a.width
    sums = doubles(a.sums)
    of_g, of_x, shift = floats(vectors), floats(vectors + 4 * width), floats(vectors + 8 * width)
    for c in range(channels):
        inverse = np.float64(moments[(groups + group) * channels + c])
        scale = np.float64(weight[c]) * inverse
        of_g[c] = scale
        of_x[c] = 0
        shift[c] = 0
        if a.training != 0:
            slope = -scale * inverse * inverse * sums[(product * groups + group) * channels + c] / a.rows
            of_x[c] = slope
            shift[c] = -scale * sums[group * channels + c] / a.rows - slope * moments[group * channels + c]
    for vector in range(3):
        repeat(floats(vectors + 4 * vector * width), channels, width)


@part
def _gradient(grad, x, residual, grad_x, grad_residual, first, end, width, vectors, floor):
    scale, shift, residual_scale = floats(vectors), floats(vectors + 4 * width), floats(vectors + 8 * width)
    g_x, x_x, shift_x = floats(vectors + 32 * width), floats(vectors + 36 * width), floats(vectors + 40 * width)
    g_r, r_r, shift_r = floats(vectors + 44 * width), floats(vectors + 48 * width), floats(vectors + 52 * width)
    for start in range(first, end, width):
        for c in range(min(width, end - start)):
            k = start + c
            g, value = widen(grad[k]), widen(x[k])
            output = value * scale[c] + shift[c]
            if residual is not None:
                other = widen(residual[k])
                output += other * residual_scale[c]
            if output <= floor:
                g = np.float32(0)
            grad_x[k] = narrow_or_nan(g * g_x[c] + times(value, x_x[c]) + shift_x[c], grad_x)
            if residual is not None:
                grad_residual[k] = narrow_or_nan(g * g_r[c] + times(other, r_r[c]) + shift_r[c], grad_residual)


@part
def _gradient_of(a, piece, grad, x, residual, grad_x, grad_residual, v):
    (first, end), floor = bounds(a, piece), np.float32(a.floor if a.masked == 0 else -np.inf)
    if a.residual_moments != 0:
        _gradient(grad, x, residual, grad_x, grad_residual, first, end, a.width, v, floor)
    else:
        _gradient(grad, x, None, grad_x, None, first, end, a.width, v, floor)


@part
def _all_slopes(a, group, v):
    slopes(a, group, floats(a.weight), floats(a.moments), 1, v + 32 * a.width)
    if a.residual_moments != 0:
        slopes(a, group, floats(a.residual_weight), floats(a.residual_moments), 2, v + 44 * a.width)


@part
def _backward(words, a, grad, grad_2, x, residual, y, masked, grad_x, grad_residual):
    each = a.splits if a.work == GROUPS else 1
    number = take(words)
    while number < a.pieces:
        start, stop, v = number * each, (number + 1) * each, a.vectors + 4 * VECTORS * number * a.width
        group = start // a.splits
        affine(a, group, floats(v), floats(v + 4 * a.width), floats(v + 8 * a.width))
        if a.work != AGAIN:
            _means(a, group, floats(v + 12 * a.width), floats(v + 16 * a.width))
            for piece in range(start, stop):
                _sums_of(a, piece, grad, grad_2, x, residual, y, masked, v)
        if a.work == GROUPS:
            _finish_sums(a, group, group + 1)
        if a.work != PIECES:
            _all_slopes(a, group, v)
            for piece in range(stop - 1, start - 1, -1):
                g = grad if a.masked == 0 else masked
                _gradient_of(a, piece, g, x, residual, grad_x, grad_residual, v)
        if last(words, a.pieces) and a.work != AGAIN:
            if a.work == PIECES:
                _finish_sums(a, 0, a.groups)
            _total(a)
        number = take(words)


@loop(BACKWARD)
def backward_bf16(words):
    a = numba.carray(words, 1)[0]
    given = halves(a.grad), halves(a.grad_2), halves(a.x), halves(a.residual), halves(a.y)
    _backward(words, a, *given, halves(a.masked), halves(a.grad_x), halves(a.grad_residual))


@loop(BACKWARD)
def backward_fp32(words):
    a = numba.carray(words, 1)[0]
    given = floats(a.grad), floats(a.grad_2), floats(a.x), floats(a.residual), floats(a.y)
    _backward(words, a, *given, floats(a.masked), floats(a.grad_x), floats(a.grad_residual))
