"""Batch norm + ReLU (+ residual) on a CPU: moments, application, and both passes of the gradient as compiled loops.

A group of samples in channels-last memory is an array of numbers whose channel is their place modulo C. A piece takes
it in runs of `width` numbers, a multiple of C: enough to fill the processor's vectors where there are few channels.
What is of a channel, such as its scale, is repeated over a run; sums are of a run's places, then of their channels.

Passes over activations are those of `kernels.batch_norm`. Sums are in fp32 over STRETCH runs at most, in fp64 beyond.
The moments of a piece are of x less the mean of its first rows, so that a mean much larger than the deviation costs no
digits, and pieces are joined as in Chan, Golub and LeVeque (1983), equation 1.5.
"""

from __future__ import annotations

import math

import numba
import numpy as np

from fastmoco.kernels.cpu.loops import Words, doubles, floats, halves, loop, narrow, part, take, times, widen

STRETCH = 64  # runs that are summed in fp32
PIVOTS = 16  # rows whose mean is subtracted, at most


@part
def _piece(number, splits, size, width):
    """The group of a piece, and where in the group's array it begins and ends."""
    runs = (size + width - 1) // width
    each = (runs + splits - 1) // splits * width
    first = number % splits * each
    return number // splits, min(first, size), min(first + each, size)


@part
def _repeat(vector, channels, width):
    for c in range(channels, width):
        vector[c] = vector[c - channels]


@part
def _flush(sums, width, channels, total):
    for start in range(0, width, channels):
        for c in range(channels):
            total[c] += np.float64(sums[start + c])
            sums[start + c] = 0


# Moments. `vectors` fp32 [pieces, 3, width], `partial` fp64 [pieces, 2, C]: mean and squared deviations of a piece.

MOMENTS = Words("x vectors partial rows channels width splits")


@part
def _pivots(x, first, last, channels, width, pivots):
    rows = min((last - first) // channels, PIVOTS)
    for c in range(channels):
        pivots[c] = 0
    for row in range(rows):
        for c in range(channels):
            pivots[c] += widen(x[first + row * channels + c]) / np.float32(rows)
    _repeat(pivots, channels, width)


@part
def _add_moments(x, start, count, pivots, sums, squares):
    for c in range(count):
        a = widen(x[start + c]) - pivots[c]
        sums[c] += a
        squares[c] += a * a


@part
def _moments(x, first, last, channels, width, pivots, sums, squares, mean, deviations):
    _pivots(x, first, last, channels, width, pivots)
    for c in range(width):
        sums[c] = 0
        squares[c] = 0
    for c in range(channels):
        mean[c] = 0
        deviations[c] = 0
    start = first
    while start < last:
        stop = min(last, start + STRETCH * width)
        while start < stop:
            _add_moments(x, start, min(width, stop - start), pivots, sums, squares)
            start += width
        _flush(sums, width, channels, mean)
        _flush(squares, width, channels, deviations)
    count = (last - first) // channels
    for c in range(channels):
        away = mean[c] / max(count, 1)
        mean[c] = pivots[c] + away
        deviations[c] -= count * away * away


@part
def _all_moments(words, a, x):
    piece = take(words)
    while piece < a.pieces:
        group, first, last = _piece(piece, a.splits, a.rows * a.channels, a.width)
        pivots = floats(a.vectors + 12 * piece * a.width)
        sums, squares = (
            floats(a.vectors + 4 * (3 * piece + 1) * a.width),
            floats(a.vectors + 4 * (3 * piece + 2) * a.width),
        )
        mean, deviations = (
            doubles(a.partial + 16 * piece * a.channels),
            doubles(a.partial + 8 * (2 * piece + 1) * a.channels),
        )
        start = group * a.rows * a.channels
        _moments(x, start + first, start + last, a.channels, a.width, pivots, sums, squares, mean, deviations)
        piece = take(words)


@loop(MOMENTS)
def moments_bf16(words):
    a = numba.carray(words, 1)[0]
    _all_moments(words, a, halves(a.x))


@loop(MOMENTS)
def moments_fp32(words):
    a = numba.carray(words, 1)[0]
    _all_moments(words, a, floats(a.x))


FINISH = Words("partial moments mean variance rows channels width splits groups", floats="momentum eps")


@part
def _join(a, group):
    """The moments of a group's pieces, joined one after the other in the place of its first."""
    size, channels = a.rows * a.channels, a.channels
    whole = doubles(a.partial + 16 * group * a.splits * channels)
    _, first, last = _piece(0, a.splits, size, a.width)
    count = (last - first) // channels
    for split in range(1, a.splits):
        _, first, last = _piece(split, a.splits, size, a.width)
        more = (last - first) // channels
        if more > 0:
            share, weight = more / (count + more), count * more / (count + more)
            joining = doubles(a.partial + 16 * (group * a.splits + split) * channels)
            for c in range(channels):
                away = joining[c] - whole[c]
                whole[c] += away * share
                whole[channels + c] += joining[channels + c] + away * away * weight
            count += more


@part
def _move(running, momentum, channels, splits, groups, partial, array, count):
    """Running statistics towards the mean over groups of what the groups' first pieces hold, over `count`."""
    for c in range(channels):
        total = 0.0
        for group in range(groups):
            total += partial[(2 * group * splits + array) * channels + c]
        running[c] += momentum * (total / count / groups - running[c])


@loop(FINISH)
def finish(words):
    """Moments of each group from those of its pieces; the running statistics move by the mean over groups."""
    a = numba.carray(words, 1)[0]
    while take(words) < a.pieces:
        partial, moments, channels = doubles(a.partial), floats(a.moments), a.channels
        for group in range(a.groups):
            _join(a, group)
            first = 2 * group * a.splits * channels
            for c in range(channels):
                moments[group * channels + c] = partial[first + c]
                variance = partial[first + channels + c] / a.rows
                moments[(a.groups + group) * channels + c] = 1 / math.sqrt(variance + a.eps)
        if a.mean != 0:
            _move(floats(a.mean), a.momentum, channels, a.splits, a.groups, partial, 0, 1)
            _move(floats(a.variance), a.momentum, channels, a.splits, a.groups, partial, 1, a.rows - 1)


# Application. `vectors` fp32 [pieces, 3, width]: scale, shift, the residual's scale.

APPLY = Words(
    "x y weight bias moments residual residual_weight residual_bias residual_moments "
    "vectors rows channels width splits",
    floats="floor",
)


@part
def affine(a, group, scale, shift, residual_scale):
    """scale and shift of a group's channels, repeated over a run; the residual's shift is in shift."""
    groups, channels = a.pieces // a.splits, a.channels
    weight, bias, moments = floats(a.weight), floats(a.bias), floats(a.moments)
    for c in range(channels):
        scale[c] = weight[c] * moments[(groups + group) * channels + c]
        shift[c] = bias[c] - moments[group * channels + c] * scale[c]
    if a.residual_moments != 0:
        weight, bias, moments = floats(a.residual_weight), floats(a.residual_bias), floats(a.residual_moments)
        for c in range(channels):
            residual_scale[c] = weight[c] * moments[(groups + group) * channels + c]
            shift[c] += bias[c] - moments[group * channels + c] * residual_scale[c]
        _repeat(residual_scale, channels, a.width)
    _repeat(scale, channels, a.width)
    _repeat(shift, channels, a.width)


@part
def _apply(x, residual, y, first, last, width, scale, shift, residual_scale, floor):
    for start in range(first, last, width):
        for c in range(min(width, last - start)):
            value = widen(x[start + c]) * scale[c] + shift[c]
            if residual_scale is not None:
                value += widen(residual[start + c]) * residual_scale[c]
            elif residual is not None:
                value += widen(residual[start + c])
            y[start + c] = narrow(floor if value < floor else value, y)


@part
def _apply_all(words, a, x, residual, y):
    floor = np.float32(a.floor)
    piece = take(words)
    while piece < a.pieces:
        group, first, last = _piece(piece, a.splits, a.rows * a.channels, a.width)
        scale, shift = floats(a.vectors + 12 * piece * a.width), floats(a.vectors + 4 * (3 * piece + 1) * a.width)
        residual_scale = floats(a.vectors + 4 * (3 * piece + 2) * a.width)
        affine(a, group, scale, shift, residual_scale)
        first, last = first + group * a.rows * a.channels, last + group * a.rows * a.channels
        if a.residual == 0:
            _apply(x, None, y, first, last, a.width, scale, shift, None, floor)
        elif a.residual_moments == 0:
            _apply(x, residual, y, first, last, a.width, scale, shift, None, floor)
        else:
            _apply(x, residual, y, first, last, a.width, scale, shift, residual_scale, floor)
        piece = take(words)


@loop(APPLY)
def apply_bf16(words):
    a = numba.carray(words, 1)[0]
    _apply_all(words, a, halves(a.x), halves(a.residual), halves(a.y))


@loop(APPLY)
def apply_fp32(words):
    a = numba.carray(words, 1)[0]
    _apply_all(words, a, floats(a.x), floats(a.residual), floats(a.y))


# Sums of the gradient. `vectors` fp32 [pieces, 8, width]: scale, shift, the residual's scale, the two means, and the
# three sums; `partial` fp64 [pieces, 3, C].

SUMS = Words(
    "grad grad_2 x y masked weight bias moments residual residual_weight residual_bias "
    "residual_moments vectors partial rows channels width splits",
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
            masked[k] = narrow(g, masked)
        sums[c] += g
        sums[width + c] += g * away
        if residual is not None:
            sums[2 * width + c] += g * (widen(residual[k]) - means[width + c])


@part
def _sums(grad, grad_2, x, residual, y, masked, first, last, channels, width, vectors, partial, floor):
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
    while start < last:
        stop = min(last, start + STRETCH * width)
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
            _flush(floats(vectors + 4 * (5 + array) * width), width, channels, doubles(partial + 8 * array * channels))


@part
def _means(a, group, mean, residual_mean):
    moments, channels = floats(a.moments), a.channels
    for c in range(channels):
        mean[c] = moments[group * channels + c]
    _repeat(mean, channels, a.width)
    if a.residual_moments != 0:
        moments = floats(a.residual_moments)
        for c in range(channels):
            residual_mean[c] = moments[group * channels + c]
        _repeat(residual_mean, channels, a.width)


@part
def _sums_all(words, a, grad, grad_2, x, residual, y, masked):
    floor = np.float32(a.floor)
    piece = take(words)
    while piece < a.pieces:
        group, first, last = _piece(piece, a.splits, a.rows * a.channels, a.width)
        width, channels, v = a.width, a.channels, a.vectors + 32 * piece * a.width
        p = a.partial + 24 * piece * a.channels
        affine(a, group, floats(v), floats(v + 4 * width), floats(v + 8 * width))
        _means(a, group, floats(v + 12 * width), floats(v + 16 * width))
        first, last = first + group * a.rows * channels, last + group * a.rows * channels
        if a.residual_moments != 0 and a.grad_2 != 0:
            _sums(grad, grad_2, x, residual, None, masked, first, last, channels, width, v, p, floor)
        elif a.residual_moments != 0:
            _sums(grad, None, x, residual, None, None, first, last, channels, width, v, p, floor)
        elif a.y != 0 and a.grad_2 != 0:
            _sums(grad, grad_2, x, None, y, masked, first, last, channels, width, v, p, floor)
        elif a.y != 0:
            _sums(grad, None, x, None, y, masked, first, last, channels, width, v, p, floor)
        elif a.grad_2 != 0:
            _sums(grad, grad_2, x, None, None, masked, first, last, channels, width, v, p, floor)
        else:
            _sums(grad, None, x, None, None, None, first, last, channels, width, v, p, floor)
        piece = take(words)


@loop(SUMS)
def sums_bf16(words):
    a = numba.carray(words, 1)[0]
    _sums_all(
        words, a, halves(a.grad), halves(a.grad_2), halves(a.x), halves(a.residual), halves(a.y), halves(a.masked)
    )


@loop(SUMS)
def sums_fp32(words):
    a = numba.carray(words, 1)[0]
    _sums_all(
        words, a, floats(a.grad), floats(a.grad_2), floats(a.x), floats(a.residual), floats(a.y), floats(a.masked)
    )


FINISH_SUMS = Words("partial sums totals moments residual_moments channels splits groups")


@loop(FINISH_SUMS)
def finish_sums(words):
    """Sums of each group from those of its pieces, fp64 [3, groups, C], and the gradients fp32 [3, C] over groups."""
    a = numba.carray(words, 1)[0]
    while take(words) < a.pieces:
        channels, groups = a.channels, a.groups
        for array in range(3 if a.residual_moments != 0 else 2):
            totals = floats(a.totals + 4 * array * channels)
            moments = floats(a.residual_moments if array == 2 else a.moments)
            for c in range(channels):
                totals[c] = 0
            for group in range(groups):
                sums = doubles(a.sums + 8 * (array * groups + group) * channels)
                for c in range(channels):
                    sums[c] = 0
                for split in range(a.splits):
                    piece = doubles(a.partial + 8 * (3 * (group * a.splits + split) + array) * channels)
                    for c in range(channels):
                        sums[c] += piece[c]
                for c in range(channels):
                    totals[c] += sums[c] * (1.0 if array == 0 else moments[(groups + group) * channels + c])


# The gradient itself, slope_g g + slope_x x + shift for each input. `vectors` fp32 [pieces, 9, width]: scale, shift and
# the residual's scale for the mask, then the three of x and the three of the residual.

GRADIENT = Words(
    "grad x grad_x grad_residual weight bias moments residual residual_weight residual_bias residual_moments "
    "sums vectors rows channels width splits training",
    floats="floor",
)


@part
def slopes(a, group, weight, moments, product, vectors):
    """From dL/dx = w s (g - mean(g) - (x - mean) s^2 mean(g (x - mean))), s being 1 / deviation."""
    groups, channels, width = a.pieces // a.splits, a.channels, a.width
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
        _repeat(floats(vectors + 4 * vector * width), channels, width)


@part
def _gradient(grad, x, residual, grad_x, grad_residual, first, last, width, vectors, floor):
    scale, shift, residual_scale = floats(vectors), floats(vectors + 4 * width), floats(vectors + 8 * width)
    g_x, x_x, shift_x = floats(vectors + 12 * width), floats(vectors + 16 * width), floats(vectors + 20 * width)
    g_r, r_r, shift_r = floats(vectors + 24 * width), floats(vectors + 28 * width), floats(vectors + 32 * width)
    for start in range(first, last, width):
        for c in range(min(width, last - start)):
            k = start + c
            g, value = widen(grad[k]), widen(x[k])
            output = value * scale[c] + shift[c]
            if residual is not None:
                other = widen(residual[k])
                output += other * residual_scale[c]
            if output <= floor:
                g = np.float32(0)
            grad_x[k] = narrow(g * g_x[c] + times(value, x_x[c]) + shift_x[c], grad_x)
            if residual is not None:
                grad_residual[k] = narrow(g * g_r[c] + times(other, r_r[c]) + shift_r[c], grad_residual)


@part
def _gradient_all(words, a, grad, x, residual, grad_x, grad_residual):
    floor = np.float32(a.floor)
    piece = take(words)
    while piece < a.pieces:
        group, first, last = _piece(piece, a.splits, a.rows * a.channels, a.width)
        width, v = a.width, a.vectors + 36 * piece * a.width
        affine(a, group, floats(v), floats(v + 4 * width), floats(v + 8 * width))
        slopes(a, group, floats(a.weight), floats(a.moments), 1, v + 12 * width)
        first, last = first + group * a.rows * a.channels, last + group * a.rows * a.channels
        if a.residual_moments != 0:
            slopes(a, group, floats(a.residual_weight), floats(a.residual_moments), 2, v + 24 * width)
            _gradient(grad, x, residual, grad_x, grad_residual, first, last, width, v, floor)
        else:
            _gradient(grad, x, None, grad_x, None, first, last, width, v, floor)
        piece = take(words)


@loop(GRADIENT)
def gradient_bf16(words):
    a = numba.carray(words, 1)[0]
    _gradient_all(words, a, halves(a.grad), halves(a.x), halves(a.residual), halves(a.grad_x), halves(a.grad_residual))


@loop(GRADIENT)
def gradient_fp32(words):
    a = numba.carray(words, 1)[0]
    _gradient_all(words, a, floats(a.grad), floats(a.x), floats(a.residual), floats(a.grad_x), floats(a.grad_residual))
