"""The transforms of Winograd's algorithm (`winograd.py`) as compiled loops, of any layout of what is multiplied.

A point is one of the n n numbers of a transformed tile. Channels are multiples of 16: a column is 16 of them.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import torch

from fastmoco.kernels.cpu.loops import Loop, Words, floats, halves, loop, part, take, widen
from fastmoco.kernels.cpu.vectors import BYTES, LANES, room, square
from fastmoco.kernels.cpu.winograd_formulas import FORMULAS

TILES = 16  # of a piece
POINTS = 36  # n n, at most
GROUP = 4  # columns that are copied together

_input2, _input4 = (square(FORMULAS[tile].input, tile + 2, "read") for tile in (2, 4))
_gradient2, _gradient4 = (square(FORMULAS[tile].gradient, tile, "read") for tile in (2, 4))
_output2, _output4 = (square(FORMULAS[tile].output, tile + 2, "written") for tile in (2, 4))
_filter2, _filter4 = (square(FORMULAS[tile].filter, 3, "read") for tile in (2, 4))
_weight2, _weight4 = (square(FORMULAS[tile].filter_gradient, tile + 2, "written") for tile in (2, 4))

vector = room(LANES)
"""16 numbers: the zeros beyond an image's edge, or what is written there."""
_filter = room(9 * LANES)
_group = room(POINTS * GROUP * LANES)


@part
def zero(address, numbers):
    """Write so many zeros."""
    place = floats(address)
    for i in range(numbers):
        place[i] = 0


@part
def _corner(a, number):
    """Image, top and left of a tile; tiles are counted from left to right, then down, then image by image."""
    down, across = (a.height + a.tile - 1) // a.tile, (a.width + a.tile - 1) // a.tile
    row = number // across
    return row // down, row % down * a.tile, number % across * a.tile


@part
def _next(a, image, top, left):
    left += a.tile
    if left >= a.width:
        left = 0
        top += a.tile
        if top >= a.height:
            top = 0
            image += 1
    return image, top, left


@part
def from_images(a, pointer, images, gradient, channels, first, last, begin, count, to, point, step, column, zeros):
    """Tiles from number `begin` on of images [images, height, width, channels] transformed as inputs or as gradients.

    Of columns `first` to `last`; the numbers of tile t in the c-th of them go to `to` + k point + t step + c column.
    `zeros` is the address of 16 zeros.
    """
    size, margin, n = a.size, (0 if gradient else 1), a.tile + 2
    of_row, of_column = a.width * channels * size, channels * size
    image, top, left = _corner(a, begin)
    for t in range(count):
        row, left_edge = top - margin, left - margin
        start = images + ((image * a.height + row) * a.width + left_edge) * of_column
        for c in range(first, last):
            at, place = start + c * LANES * size, to + t * step + (c - first) * column
            edges = row, left_edge, a.height, a.width, zeros
            if a.tile == 2 and gradient:
                _gradient2(pointer, at, of_row, of_column, place, n * point, point, *edges)
            elif a.tile == 2:
                _input2(pointer, at, of_row, of_column, place, n * point, point, *edges)
            elif gradient:
                _gradient4(pointer, at, of_row, of_column, place, n * point, point, *edges)
            else:
                _input4(pointer, at, of_row, of_column, place, n * point, point, *edges)
        image, top, left = _next(a, image, top, left)


@part
def to_images(a, pointer, images, channels, first, last, begin, count, source, point, step, column, elsewhere):
    """Transformed outputs, laid out as by `from_images`, to tiles of images; what lies beyond them goes `elsewhere`."""
    size, n = a.size, a.tile + 2
    of_row, of_column = a.width * channels * size, channels * size
    image, top, left = _corner(a, begin)
    for t in range(count):
        start = images + ((image * a.height + top) * a.width + left) * of_column
        for c in range(first, last):
            at, place = source + t * step + (c - first) * column, start + c * LANES * size
            edges = top, left, a.height, a.width, elsewhere
            if a.tile == 2:
                _output2(pointer, at, n * point, point, place, of_row, of_column, *edges)
            else:
                _output4(pointer, at, n * point, point, place, of_row, of_column, *edges)
        image, top, left = _next(a, image, top, left)


# Images and their gradients to fp32 [n n, tiles, C], and back. A piece is TILES tiles. The points of one tile lie in as
# many pages of memory, more than a core keeps the addresses of: so each is visited once for GROUP columns.


@part
def _scatter(group, to, point, points, columns):
    for k in range(points):
        source, place = floats(group + k * GROUP * BYTES), floats(to + k * point)
        for i in range(columns * LANES):
            place[i] = source[i]


@part
def _gather(source, group, point, points, columns):
    for k in range(points):
        place, numbers = floats(group + k * GROUP * BYTES), floats(source + k * point)
        for i in range(columns * LANES):
            place[i] = numbers[i]


IMAGES = Words("x transformed height width channels tile tiles size gradient")


@part
def _transform_images(words, a, x):
    group, zeros, points = _group(), vector(), (a.tile + 2) * (a.tile + 2)
    zero(zeros, LANES)
    columns, step = a.channels // LANES, a.channels * 4
    piece = take(words)
    while piece < a.pieces:
        for tile in range(piece * TILES, min(piece * TILES + TILES, a.tiles)):
            for c in range(0, columns, GROUP):
                last = min(c + GROUP, columns)
                from_images(
                    a, x, a.x, a.gradient != 0, a.channels, c, last, tile, 1, group, GROUP * BYTES, 0, BYTES, zeros
                )
                _scatter(group, a.transformed + tile * step + c * BYTES, a.tiles * step, points, last - c)
        piece = take(words)


@loop(IMAGES)
def transform_images_fp32(words):
    a = numba.carray(words, 1)[0]
    _transform_images(words, a, floats(a.x))


@loop(IMAGES)
def transform_images_bf16(words):
    a = numba.carray(words, 1)[0]
    _transform_images(words, a, halves(a.x))


@part
def _transform_back(words, a, x):
    group, elsewhere, points = _group(), vector(), (a.tile + 2) * (a.tile + 2)
    columns, step = a.channels // LANES, a.channels * 4
    piece = take(words)
    while piece < a.pieces:
        for tile in range(piece * TILES, min(piece * TILES + TILES, a.tiles)):
            for c in range(0, columns, GROUP):
                last = min(c + GROUP, columns)
                _gather(a.transformed + tile * step + c * BYTES, group, a.tiles * step, points, last - c)
                to_images(a, x, a.x, a.channels, c, last, tile, 1, group, GROUP * BYTES, 0, BYTES, elsewhere)
        piece = take(words)


@loop(IMAGES)
def transform_back_fp32(words):
    a = numba.carray(words, 1)[0]
    _transform_back(words, a, floats(a.x))


@loop(IMAGES)
def transform_back_bf16(words):
    a = numba.carray(words, 1)[0]
    _transform_back(words, a, halves(a.x))


# Weights [O, 3, 3, C], mirrored or not, to fp32 with 16 channels of an output next to each other: for output o and the
# c-th column of channels at o step + c // wide group + c % wide 64, wide at most GROUP. A piece is an output.

FILTERS = Words("weight transformed outputs channels tile size mirrored wide step group")


@part
def _transform_filters(words, a, weight):
    group, n, point, column = _group(), a.tile + 2, a.outputs * a.channels * 4, a.channels * a.size
    first, direction = (8, -column) if a.mirrored != 0 else (0, column)
    columns, step = a.channels // LANES, GROUP * BYTES
    piece = take(words)
    while piece < a.pieces:
        for c in range(columns):
            at, to = a.weight + (piece * 9 + first) * column + c * LANES * a.size, group + c % a.wide * BYTES
            if a.tile == 2:
                _filter2(weight, at, 3 * direction, direction, to, n * step, step, 0, 0, 3, 3, at)
            else:
                _filter4(weight, at, 3 * direction, direction, to, n * step, step, 0, 0, 3, 3, at)
            if c % a.wide == a.wide - 1 or c == columns - 1:
                to = a.transformed + piece * a.step + c // a.wide * a.group
                _scatter(group, to, point, n * n, c % a.wide + 1)
        piece = take(words)


@loop(FILTERS)
def transform_filters_fp32(words):
    a = numba.carray(words, 1)[0]
    _transform_filters(words, a, floats(a.weight))


@loop(FILTERS)
def transform_filters_bf16(words):
    a = numba.carray(words, 1)[0]
    _transform_filters(words, a, halves(a.weight))


# The same to fp32 [n n, O / 16 wide, C, 16 wide], with outputs next to each other. A piece is 16 outputs.


@part
def _turn_filters(words, a, weight):
    s, n, point = _filter(), a.tile + 2, a.outputs * a.channels * 4
    gathered = floats(s)
    piece = take(words)
    while piece < a.pieces:
        for c in range(a.channels):
            for k in range(9):
                for lane in range(LANES):
                    gathered[k * LANES + lane] = widen(weight[((piece * LANES + lane) * 9 + k) * a.channels + c])
            to = a.transformed + ((piece // a.wide * a.channels + c) * a.wide + piece % a.wide) * BYTES
            if a.tile == 2:
                _filter2(gathered, s, 3 * BYTES, BYTES, to, n * point, point, 0, 0, 3, 3, s)
            else:
                _filter4(gathered, s, 3 * BYTES, BYTES, to, n * point, point, 0, 0, 3, 3, s)
        piece = take(words)


@loop(FILTERS)
def turn_filters_fp32(words):
    a = numba.carray(words, 1)[0]
    _turn_filters(words, a, floats(a.weight))


@loop(FILTERS)
def turn_filters_bf16(words):
    a = numba.carray(words, 1)[0]
    _turn_filters(words, a, halves(a.weight))


# Sums of products fp32 [sums, n n, O, C], with output o and column c at o step + c column and `wide` columns next to
# each other, to a gradient of weights [O, 3, 3, C]. A piece is an output.

SUMS = Words("weight transformed outputs channels tile size sums wide step column")


@part
def _transform_sums(words, a, weight):
    group, n, point, step = _group(), a.tile + 2, a.outputs * a.channels * 4, GROUP * BYTES
    row, of_column, columns = 3 * a.channels * a.size, a.channels * a.size, a.channels // LANES
    piece = take(words)
    while piece < a.pieces:
        for first in range(0, columns, a.wide):
            last = min(first + a.wide, columns)
            zero(group, n * n * GROUP * LANES)
            for k in range(a.sums * n * n):
                sums = floats(a.transformed + k * point + piece * a.step + first * a.column)
                total = floats(group + k % (n * n) * step)
                for i in range((last - first) * LANES):
                    total[i] += sums[i]
            for c in range(first, last):
                at, to = group + (c - first) * BYTES, a.weight + (piece * 9 * a.channels + c * LANES) * a.size
                if a.tile == 2:
                    _weight2(weight, at, n * step, step, to, row, of_column, 0, 0, 3, 3, to)
                else:
                    _weight4(weight, at, n * step, step, to, row, of_column, 0, 0, 3, 3, to)
        piece = take(words)


@loop(SUMS)
def transform_sums_fp32(words):
    a = numba.carray(words, 1)[0]
    _transform_sums(words, a, floats(a.weight))


@loop(SUMS)
def transform_sums_bf16(words):
    a = numba.carray(words, 1)[0]
    _transform_sums(words, a, halves(a.weight))


class Loops(NamedTuple):
    """The loops over activations and weights of one type."""

    images: Loop
    back: Loop
    filters: Loop
    turned_filters: Loop
    sums: Loop


LOOPS = {
    torch.float32: Loops(
        transform_images_fp32, transform_back_fp32, transform_filters_fp32, turn_filters_fp32, transform_sums_fp32
    ),
    torch.bfloat16: Loops(
        transform_images_bf16, transform_back_bf16, transform_filters_bf16, turn_filters_bf16, transform_sums_bf16
    ),
}
