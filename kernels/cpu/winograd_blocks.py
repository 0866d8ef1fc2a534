"""The products of Winograd's algorithm (`winograd.py`) block by block: nothing but images goes to memory.

A matrix product of all tiles at once writes and reads n n / (m m) times the numbers of the images, which few channels
do not pay for. Here a block of TILES tiles is transformed, multiplied and transformed back while it lies in a core's
cache, with products of our own: of 8 tiles and 16 or 32 channels at a time, in registers. In a block numbers are laid
out as [n n, C / 16, TILES, 16].

The weights' gradient has a sum for each run of blocks, so that its bits do not depend on the number of threads.
Channels are multiples of 16.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import torch

from fastmoco.kernels.cpu.loops import Loop, Words, floats, halves, loop, part, take
from fastmoco.kernels.cpu.vectors import BYTES, LANES, Strides, products, room
from fastmoco.kernels.cpu.winograd_transforms import POINTS, TILES, from_images, to_images, vector, zero

CHANNELS = 128  # most of a layer: two blocks lie on the stack
COLUMN = TILES * BYTES  # 16 channels of a block
PAD = BYTES  # between points: strides of a power of two would share few lines of a cache

# Tiles [TILES, C] of a point times weights [C, O], these laid out as [O / 16 n, C, 16 n] for n of 1 or 2.
_products1, _products2 = (
    products(8, n, Strides(v_row=BYTES, v_sum=4, v_block=COLUMN, u_sum=n * BYTES, u_vector=BYTES, m_row=BYTES))
    for n in (1, 2)
)
# Gradients [TILES, O] of a point, transposed, times inputs [TILES, C]: all tiles are one block of what is summed over.
_outer1, _outer2 = (
    products(rows, n, Strides(v_row=4, v_sum=BYTES, v_block=0, u_sum=BYTES, u_vector=COLUMN, m_row=BYTES))
    for rows, n in ((16, 1), (8, 2))
)
_block = room(POINTS * (TILES * CHANNELS + PAD // 4))

IMAGES = Words("x y factor height width channels outputs tile tiles size run")


@part
def _multiply(a, v, m, count):
    v_point, m_point = a.channels * TILES * 4 + PAD, a.outputs * TILES * 4 + PAD
    wide = 2 if a.outputs % (2 * LANES) == 0 else 1
    for k in range((a.tile + 2) * (a.tile + 2)):
        for o in range(0, a.outputs // LANES, wide):
            u = a.factor + (k * a.outputs + o * LANES) * a.channels * 4
            for t in range(0, count, 8):
                of_v, of_m = v + k * v_point + t * BYTES, m + k * m_point + o * COLUMN + t * BYTES
                if wide == 2:
                    _products2(of_v, u, of_m, COLUMN, a.channels // LANES, 0)
                else:
                    _products1(of_v, u, of_m, COLUMN, a.channels // LANES, 0)


# The convolution y [images, height, width, O] of x [images, height, width, C] and a factor: a piece is a block.


@part
def _convolve(words, a, x):
    v, m, zeros, elsewhere = _block(), _block(), vector(), vector()
    zero(zeros, LANES)
    v_point, m_point = a.channels * TILES * 4 + PAD, a.outputs * TILES * 4 + PAD
    piece = take(words)
    while piece < a.pieces:
        begin = piece * TILES
        count = min(TILES, a.tiles - begin)
        from_images(
            a, x, a.x, False, a.channels, 0, a.channels // LANES, begin, count, v, v_point, BYTES, COLUMN, zeros
        )
        _multiply(a, v, m, count)
        to_images(a, x, a.y, a.outputs, 0, a.outputs // LANES, begin, count, m, m_point, BYTES, COLUMN, elsewhere)
        piece = take(words)


@loop(IMAGES)
def convolve_fp32(words):
    a = numba.carray(words, 1)[0]
    _convolve(words, a, floats(a.x))


@loop(IMAGES)
def convolve_bf16(words):
    a = numba.carray(words, 1)[0]
    _convolve(words, a, halves(a.x))


# Sums of products of a gradient y and an input x over the tiles of `run` blocks: factor [pieces, n n, C / 16, O, 16].


@part
def _clear_tail(v, channels, points, count):
    for k in range(points):
        for c in range(channels // LANES):
            start = v + k * (channels * TILES * 4 + PAD) + c * COLUMN
            zero(start + count * BYTES, (TILES - count) * LANES)


@part
def _add_products(a, g, v, to, add):
    v_point, g_point = a.channels * TILES * 4 + PAD, a.outputs * TILES * 4 + PAD
    column = a.outputs * BYTES
    for k in range((a.tile + 2) * (a.tile + 2)):
        for o in range(a.outputs // LANES):
            rows, sums = g + k * g_point + o * COLUMN, to + k * a.outputs * a.channels * 4 + o * LANES * BYTES
            for c in range(a.channels // LANES):
                of_v = v + k * v_point + c * COLUMN
                if a.channels % (2 * LANES) != 0:
                    _outer1(rows, of_v, sums + c * column, column, 1, add)
                elif c % 2 == 0:
                    _outer2(rows, of_v, sums + c * column, column, 1, add)
                    _outer2(rows + 8 * 4, of_v, sums + c * column + 8 * BYTES, column, 1, add)


@part
def _sum_products(words, a, x):
    v, g, zeros = _block(), _block(), vector()
    zero(zeros, LANES)
    points = (a.tile + 2) * (a.tile + 2)
    v_point, g_point = a.channels * TILES * 4 + PAD, a.outputs * TILES * 4 + PAD
    piece = take(words)
    while piece < a.pieces:
        first = piece * a.run * TILES
        last = min(first + a.run * TILES, a.tiles)
        for begin in range(first, last, TILES):
            count = min(TILES, last - begin)
            from_images(
                a, x, a.x, False, a.channels, 0, a.channels // LANES, begin, count, v, v_point, BYTES, COLUMN, zeros
            )
            from_images(
                a, x, a.y, True, a.outputs, 0, a.outputs // LANES, begin, count, g, g_point, BYTES, COLUMN, zeros
            )
            if count < TILES:
                _clear_tail(v, a.channels, points, count)
                _clear_tail(g, a.outputs, points, count)
            _add_products(a, g, v, a.factor + piece * points * a.channels * a.outputs * 4, 0 if begin == first else 1)
        piece = take(words)


@loop(IMAGES)
def sum_products_fp32(words):
    a = numba.carray(words, 1)[0]
    _sum_products(words, a, floats(a.x))


@loop(IMAGES)
def sum_products_bf16(words):
    a = numba.carray(words, 1)[0]
    _sum_products(words, a, halves(a.x))


class Loops(NamedTuple):
    """The loops over activations of one type."""

    convolve: Loop
    sum_products: Loop


LOOPS = {
    torch.float32: Loops(convolve_fp32, sum_products_fp32),
    torch.bfloat16: Loops(convolve_bf16, sum_products_bf16),
}
