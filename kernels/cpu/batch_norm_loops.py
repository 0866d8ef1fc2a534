"""Batch norm + ReLU (+ residual) on a CPU: moments and application as compiled loops.

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

from fastmoco.kernels.cpu.loops import Words, doubles, floats, halves, last, loop, narrow_or_nan, part, take, widen

STRETCH = 64  # runs that are summed in fp32
PIVOTS = 16  # rows whose mean is subtracted, at most


PIECES, AGAIN, GROUPS = range(3)
"""What a call is for: the first pass, the second, piece by piece; or both passes, group by group.

A thread that does both passes over a group finds in its cache at the second what it read or wrote at the first. It goes
back over the pieces, since the last ones are those that the cache still holds.
"""


@part
def _piece(number, splits, size, width):
    """The group of a piece, and where in the group's array it begins and ends."""
    runs = (size + width - 1) // width
    each = (runs + splits - 1) // splits * width
    first = number % splits * each
    return number // splits, min(first, size), min(first + each, size)


@part
def bounds(a, piece):
    """Where a piece begins and ends in the whole array."""
    group, first, end = _piece(piece, a.splits, a.rows * a.channels, a.width)
    start = group * a.rows * a.channels
    return start + first, start + end


@part
def repeat(vector, channels, width):
    for c in range(channels, width):
        vector[c] = vector[c - channels]


@part
def flush(sums, width, channels, total):
    for start in range(0, width, channels):
        for c in range(channels):
            total[c] += np.float64(sums[start + c])
            sums[start + c] = 0


# `vectors` fp32 [pieces, 3, width]: pivots, sums and squares; then scale, shift and the residual's scale. `partial` and
# `residual_partial` fp64 [pieces, 2, C]: mean and squared deviations of a piece. The latter is there where the
# residual's moments are to be taken, too.

FORWARD = Words(
    "x y weight bias moments mean variance partial residual residual_weight residual_bias residual_moments "
    "residual_mean residual_variance residual_partial vectors rows channels width splits groups work",
    floats="momentum eps floor",
)


@part
def _pivots(x, first, end, channels, width, pivots):
    rows = min((end - first) // channels, PIVOTS)
    for c in range(channels):
        pivots[c] = 0
    for row in range(rows):
        for c in range(channels):
            pivots[c] += widen(x[first + row * channels + c]) / np.float32(rows)
    repeat(pivots, channels, width)


@part
def _add_moments(x, start, count, pivots, sums, squares):
    for c in range(count):
        a = widen(x[start + c]) - pivots[c]
        sums[c] += a
        squares[c] += a * a


@part
def _moments(x, first, end, channels, width, pivots, sums, squares, mean, deviations):
    _pivots(x, first, end, channels, width, pivots)
    for c in range(width):
        sums[c] = 0
        squares[c] = 0
    for c in range(channels):
        mean[c] = 0
        deviations[c] = 0
    start = first
    while start < end:
        stop = min(end, start + STRETCH * width)
        while start < stop:
            _add_moments(x, start, min(width, stop - start), pivots, sums, squares)
            start += width
        flush(sums, width, channels, mean)
        flush(squares, width, channels, deviations)
    count = (end - first) // channels
    for c in range(channels):
        away = mean[c] / max(count, 1)
        mean[c] = pivots[c] + away
        deviations[c] -= count * away * away


@part
def _moments_of(a, piece, x, partial, v):
    first, end = bounds(a, piece)
    pivots, sums, squares = floats(v), floats(v + 4 * a.width), floats(v + 8 * a.width)
    mean, deviations = doubles(partial + 16 * piece * a.channels), doubles(partial + 8 * (2 * piece + 1) * a.channels)
    _moments(x, first, end, a.channels, a.width, pivots, sums, squares, mean, deviations)


@part
def _join(a, partial, group):
    """The moments of a group's pieces, joined one after the other in the place of its first."""
    size, channels = a.rows * a.channels, a.channels
    whole = doubles(partial + 16 * group * a.splits * channels)
    _, first, end = _piece(0, a.splits, size, a.width)
    count = (end - first) // channels
    for split in range(1, a.splits):
        _, first, end = _piece(split, a.splits, size, a.width)
        more = (end - first) // channels
        if more > 0:
            share, weight = more / (count + more), count * more / (count + more)
            joining = doubles(partial + 16 * (group * a.splits + split) * channels)
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


@part
def _finish_group(a, partial, moments, group):
    """Moments of a group from those of its pieces."""
    _join(a, partial, group)
    numbers, moments, channels = doubles(partial), floats(moments), a.channels
    first = 2 * group * a.splits * channels
    for c in range(channels):
        moments[group * channels + c] = numbers[first + c]
        variance = numbers[first + channels + c] / a.rows
        moments[(a.groups + group) * channels + c] = 1 / math.sqrt(variance + a.eps)


@part
def _move_both(a, partial, mean, variance):
    """The running statistics move by the mean over groups."""
    if mean != 0:
        _move(floats(mean), a.momentum, a.channels, a.splits, a.groups, doubles(partial), 0, 1)
        _move(floats(variance), a.momentum, a.channels, a.splits, a.groups, doubles(partial), 1, a.rows - 1)


# Application.


@part
def affine(a, group, scale, shift, residual_scale):
    """scale and shift of a group's channels, repeated over a run; the residual's shift is in shift."""
    groups, channels = a.groups, a.channels
    weight, bias, moments = floats(a.weight), floats(a.bias), floats(a.moments)
    for c in range(channels):
        scale[c] = weight[c] * moments[(groups + group) * channels + c]
        shift[c] = bias[c] - moments[group * channels + c] * scale[c]
    if a.residual_moments != 0:
        weight, bias, moments = floats(a.residual_weight), floats(a.residual_bias), floats(a.residual_moments)
        for c in range(channels):
            residual_scale[c] = weight[c] * moments[(groups + group) * channels + c]
            shift[c] += bias[c] - moments[group * channels + c] * residual_scale[c]
        repeat(residual_scale, channels, a.width)
    repeat(scale, channels, a.width)
    repeat(shift, channels, a.width)


@part
def _apply(x, residual, y, first, end, width, scale, shift, residual_scale, floor):
    for start in range(first, end, width):
        for c in range(min(width, end - start)):
            value = widen(x[start + c]) * scale[c] + shift[c]
            if residual_scale is not None:
                value += widen(residual[start + c]) * residual_scale[c]
            elif residual is not None:
                value += widen(residual[start + c])
            y[start + c] = narrow_or_nan(floor if value < floor else value, y)


@part
def _apply_to(a, piece, x, residual, y, v):
    first, end = bounds(a, piece)
    scale, shift, residual_scale, floor = (
        floats(v),
        floats(v + 4 * a.width),
        floats(v + 8 * a.width),
        np.float32(a.floor),
    )
    if a.residual == 0:
        _apply(x, None, y, first, end, a.width, scale, shift, None, floor)
    elif a.residual_moments == 0:
        _apply(x, residual, y, first, end, a.width, scale, shift, None, floor)
    else:
        _apply(x, residual, y, first, end, a.width, scale, shift, residual_scale, floor)


@part
def _take_moments(a, start, stop, x, residual, v):
    for piece in range(start, stop):
        _moments_of(a, piece, x, a.partial, v)
    if a.residual_partial != 0:
        for piece in range(start, stop):
            _moments_of(a, piece, residual, a.residual_partial, v)


@part
def _finish_moments(a, first, end):
    for group in range(first, end):
        _finish_group(a, a.partial, a.moments, group)
        if a.residual_partial != 0:
            _finish_group(a, a.residual_partial, a.residual_moments, group)


@part
def _forward(words, a, x, residual, y):
    each = a.splits if a.work == GROUPS else 1
    number = take(words)
    while number < a.pieces:
        start, stop, v = number * each, (number + 1) * each, a.vectors + 12 * number * a.width
        group = start // a.splits
        if a.work != AGAIN:
            _take_moments(a, start, stop, x, residual, v)
        if a.work == GROUPS:
            _finish_moments(a, group, group + 1)
        if a.work != PIECES:
            affine(a, group, floats(v), floats(v + 4 * a.width), floats(v + 8 * a.width))
            for piece in range(stop - 1, start - 1, -1):
                _apply_to(a, piece, x, residual, y, v)
        if last(words, a.pieces) and a.work != AGAIN:
            if a.work == PIECES:
                _finish_moments(a, 0, a.groups)
            _move_both(a, a.partial, a.mean, a.variance)
            if a.residual_partial != 0:
                _move_both(a, a.residual_partial, a.residual_mean, a.residual_variance)
        number = take(words)


@loop(FORWARD)
def forward_bf16(words):
    a = numba.carray(words, 1)[0]
    _forward(words, a, halves(a.x), halves(a.residual), halves(a.y))


@loop(FORWARD)
def forward_fp32(words):
    a = numba.carray(words, 1)[0]
    _forward(words, a, floats(a.x), floats(a.residual), floats(a.y))
