"""3x3 convolutions of stride 1 on a CPU by Winograd's minimal filtering (Lavin and Gray, 2016, arXiv:1509.09308).

An output is cut into tiles of m x m, each of which depends on n x n numbers of the input, n = m + 2. With the matrices
A, B and G of Toom and Cook's algorithm for n points

    forward             y  = A' [(G w G') * (B' x B)] A        summed over input channels
    input's gradient    dx = A' [(G w' G') * (B' dy B)] A      of the weights mirrored, summed over output channels
    weights' gradient   dw = G' [(B' x B) * (A dy A')] G       the adjoint of the forward pass, summed over tiles

where * multiplies number by number, so that each sum is n n matrix products of [tiles, C] and [C, O]. They make
m m 9 / (n n) times fewer multiplications than the convolution: 2.25 for m = 2, 4 for m = 4. In return what is
multiplied has n n / (m m) times as many numbers as the input: 4 for m = 2, 2.25 for m = 4.

The points are 0, 1, -1 and infinity, and for m = 4 also 1/2 and -2, which lose fewer digits than 2 and -2 do. The sums
are shorter than a convolution's: for m = 2 its results have smaller errors than oneDNN's, for m = 4 two to three times
larger ones. So m = 4 is for activations in bf16, whose rounding is a thousand times as coarse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from fastmoco.kernels.cpu.loops import Loop, Words, floats, halves, loop, narrow, part, take, widen

Tile = Literal[2, 4]
RUN = 64  # channels that are transformed at once
MOST = 36  # numbers of a window, n n
CHUNK = 2**21  # numbers that are multiplied at once, about: 8 MB stay in the caches of two cores

HALF, QUARTER, EIGHTH = np.float32(1 / 2), np.float32(1 / 4), np.float32(1 / 8)
TWO, FOUR, EIGHT = np.float32(2), np.float32(4), np.float32(8)
WIDE, MORE = np.float32(3 / 2), np.float32(5 / 2)
THIRD, FIFTEENTH = np.float32(1 / 3), np.float32(1 / 15)


@intrinsic
def _room(typing_context):
    """fp32 [MOST, RUN] on the stack of the function that calls this."""

    def generate(context, builder, signature, arguments):
        room = cgutils.alloca_once(builder, ir.ArrayType(ir.FloatType(), MOST * RUN))
        room.align = 64
        return builder.bitcast(room, ir.FloatType().as_pointer())

    return types.CPointer(types.float32)(), generate


# One dimension of each transform: of the numbers in `s` from `i` on, `p` apart, into `t` from `j` on, `q` apart.


@part
def _input2(s, i, p, t, j, q):
    a, b, c, d = s[i], s[i + p], s[i + 2 * p], s[i + 3 * p]
    t[j] = a - c
    t[j + q] = b + c
    t[j + 2 * q] = c - b
    t[j + 3 * q] = b - d


@part
def _input4(s, i, p, t, j, q):
    a, b, c = s[i], s[i + p], s[i + 2 * p]
    d, e, f = s[i + 3 * p], s[i + 4 * p], s[i + 5 * p]
    even, odd = e - c, d - b
    t[j] = even + (a - c) + WIDE * odd
    t[j + q] = (e - b) + HALF * c + MORE * d
    t[j + 2 * q] = (e + b) - MORE * c + HALF * d
    t[j + 3 * q] = even + TWO * odd
    t[j + 4 * q] = even - HALF * odd
    t[j + 5 * q] = (b + f) + WIDE * even - TWO * d


@part
def _gradient2(s, i, p, t, j, q):
    a, b = s[i], s[i + p]
    t[j] = a
    t[j + q] = a + b
    t[j + 2 * q] = a - b
    t[j + 3 * q] = -b


@part
def _gradient4(s, i, p, t, j, q):
    a, b, c, d = s[i], s[i + p], s[i + 2 * p], s[i + 3 * p]
    t[j] = a
    t[j + q] = (a + c) + (b + d)
    t[j + 2 * q] = (a + c) - (b + d)
    t[j + 3 * q] = (a + QUARTER * c) + (HALF * b + EIGHTH * d)
    t[j + 4 * q] = (a + FOUR * c) - (TWO * b + EIGHT * d)
    t[j + 5 * q] = d


@part
def _output2(s, i, p, t, j, q):
    a, b, c, d = s[i], s[i + p], s[i + 2 * p], s[i + 3 * p]
    t[j] = a + b + c
    t[j + q] = b - c - d


@part
def _output4(s, i, p, t, j, q):
    a, b, c = s[i], s[i + p], s[i + 2 * p]
    d, e, f = s[i + 3 * p], s[i + 4 * p], s[i + 5 * p]
    t[j] = a + (b + c) + (d + e)
    t[j + q] = (b - c) + HALF * d - TWO * e
    t[j + 2 * q] = (b + c) + QUARTER * d + FOUR * e
    t[j + 3 * q] = (b - c) + EIGHTH * d - EIGHT * e + f


@part
def _filter2(s, i, p, t, j, q):
    a, b, c = s[i], s[i + p], s[i + 2 * p]
    t[j] = a
    t[j + q] = HALF * ((a + c) + b)
    t[j + 2 * q] = HALF * ((a + c) - b)
    t[j + 3 * q] = c


@part
def _filter4(s, i, p, t, j, q):
    a, b, c = s[i], s[i + p], s[i + 2 * p]
    t[j] = a
    t[j + q] = THIRD * (b + (a + c))
    t[j + 2 * q] = THIRD * (b - (a + c))
    t[j + 3 * q] = -FOUR * FIFTEENTH * (FOUR * a + TWO * b + c)
    t[j + 4 * q] = FIFTEENTH * (a - TWO * b + FOUR * c)
    t[j + 5 * q] = c


@part
def _filter_gradient2(s, i, p, t, j, q):
    a, b, c, d = s[i], s[i + p], s[i + 2 * p], s[i + 3 * p]
    t[j] = a + HALF * (b + c)
    t[j + q] = HALF * (b - c)
    t[j + 2 * q] = HALF * (b + c) + d


@part
def _filter_gradient4(s, i, p, t, j, q):
    a, b, c = s[i], s[i + p], s[i + 2 * p]
    d, e, f = s[i + 3 * p], s[i + 4 * p], s[i + 5 * p]
    outer, inner, far = THIRD * (b - c), THIRD * (b + c), FOUR * FIFTEENTH
    t[j] = a + outer - FOUR * far * d + FIFTEENTH * e
    t[j + q] = inner - TWO * far * d - TWO * FIFTEENTH * e
    t[j + 2 * q] = f + outer - far * d + far * e


def _both(transform: Callable, size: int, to: int) -> Callable:
    """Both dimensions of a transform, for `count` channels: s fp32 [size, size, RUN] by way of t to v [to, to, RUN]."""

    @part
    def both(s, t, v, count):
        for j in range(size):
            for c in range(count):
                transform(s, j * RUN + c, size * RUN, t, j * RUN + c, size * RUN)
        for i in range(to):
            for c in range(count):
                transform(t, i * size * RUN + c, RUN, v, i * to * RUN + c, RUN)

    return both


_inputs2, _inputs4 = _both(_input2, 4, 4), _both(_input4, 6, 6)
_gradients2, _gradients4 = _both(_gradient2, 2, 4), _both(_gradient4, 4, 6)
_outputs2, _outputs4 = _both(_output2, 4, 2), _both(_output4, 6, 4)
_filters2, _filters4 = _both(_filter2, 3, 4), _both(_filter4, 3, 6)
_filter_gradients2, _filter_gradients4 = _both(_filter_gradient2, 4, 3), _both(_filter_gradient4, 6, 3)


@part
def _read(x, image, top, left, side, a, first, count, s):
    """A window of an image [height, width, channels], zero beyond its edges."""
    for i in range(side):
        for j in range(side):
            to, row, column = (i * side + j) * RUN, top + i, left + j
            if 0 <= row < a.height and 0 <= column < a.width:
                start = ((image * a.height + row) * a.width + column) * a.channels + first
                for c in range(count):
                    s[to + c] = widen(x[start + c])
            else:
                for c in range(count):
                    s[to + c] = 0


@part
def _write(v, points, out, row, rows, channels, first, count):
    """A row of each of n n matrices: `out` is [points, rows, channels]."""
    for k in range(points):
        start = (k * rows + row) * channels + first
        for c in range(count):
            out[start + c] = v[k * RUN + c]


@part
def _collect(m, points, row, rows, channels, first, count, s):
    for k in range(points):
        start = (k * rows + row) * channels + first
        for c in range(count):
            s[k * RUN + c] = m[start + c]


# The transforms of images and of their gradients, to fp32 [n n, tiles, C]. A piece is a row of tiles of an image.

IMAGES = Words("x transformed images height width channels tile gradient")


@part
def _data_transform(words, a, x):
    s, t, v, out = _room(), _room(), _room(), floats(a.transformed)
    down, across = (a.height + a.tile - 1) // a.tile, (a.width + a.tile - 1) // a.tile
    piece = take(words)
    while piece < a.pieces:
        image, top = piece // down, piece % down * a.tile
        for tile in range(across):
            for first in range(0, a.channels, RUN):
                count, left = min(RUN, a.channels - first), tile * a.tile
                if a.gradient != 0 and a.tile == 2:
                    _read(x, image, top, left, 2, a, first, count, s)
                    _gradients2(s, t, v, count)
                elif a.gradient != 0:
                    _read(x, image, top, left, 4, a, first, count, s)
                    _gradients4(s, t, v, count)
                elif a.tile == 2:
                    _read(x, image, top - 1, left - 1, 4, a, first, count, s)
                    _inputs2(s, t, v, count)
                else:
                    _read(x, image, top - 1, left - 1, 6, a, first, count, s)
                    _inputs4(s, t, v, count)
                points = (a.tile + 2) * (a.tile + 2)
                _write(v, points, out, piece * across + tile, a.images * down * across, a.channels, first, count)
        piece = take(words)


@loop(IMAGES)
def data_transform_fp32(words):
    a = numba.carray(words, 1)[0]
    _data_transform(words, a, floats(a.x))


@loop(IMAGES)
def data_transform_bf16(words):
    a = numba.carray(words, 1)[0]
    _data_transform(words, a, halves(a.x))


# The transform back to images.


@part
def _draw(v, y, image, top, left, side, a, first, count):
    for i in range(min(side, a.height - top)):
        for j in range(min(side, a.width - left)):
            start = ((image * a.height + top + i) * a.width + left + j) * a.channels + first
            for c in range(count):
                y[start + c] = narrow(v[(i * side + j) * RUN + c], y)


@part
def _inverse_transform(words, a, y):
    s, t, v, m = _room(), _room(), _room(), floats(a.transformed)
    down, across = (a.height + a.tile - 1) // a.tile, (a.width + a.tile - 1) // a.tile
    piece = take(words)
    while piece < a.pieces:
        image, top = piece // down, piece % down * a.tile
        for tile in range(across):
            for first in range(0, a.channels, RUN):
                count, row, rows = min(RUN, a.channels - first), piece * across + tile, a.images * down * across
                if a.tile == 2:
                    _collect(m, 16, row, rows, a.channels, first, count, s)
                    _outputs2(s, t, v, count)
                    _draw(v, y, image, top, 2 * tile, 2, a, first, count)
                else:
                    _collect(m, 36, row, rows, a.channels, first, count, s)
                    _outputs4(s, t, v, count)
                    _draw(v, y, image, top, 4 * tile, 4, a, first, count)
        piece = take(words)


@loop(IMAGES)
def inverse_transform_fp32(words):
    a = numba.carray(words, 1)[0]
    _inverse_transform(words, a, floats(a.x))


@loop(IMAGES)
def inverse_transform_bf16(words):
    a = numba.carray(words, 1)[0]
    _inverse_transform(words, a, halves(a.x))


# The transforms of weights [O, 3, 3, C] to fp32 [n n, O, C], mirrored or not, and of these to a gradient of weights. A
# piece is an output.

FILTERS = Words("weight transformed outputs channels tile mirrored")


@part
def _filter_transform(words, a, weight):
    s, t, v, out = _room(), _room(), _room(), floats(a.transformed)
    piece = take(words)
    while piece < a.pieces:
        for first in range(0, a.channels, RUN):
            count = min(RUN, a.channels - first)
            for k in range(9):
                start = (piece * 9 + (8 - k if a.mirrored != 0 else k)) * a.channels + first
                for c in range(count):
                    s[k * RUN + c] = widen(weight[start + c])
            if a.tile == 2:
                _filters2(s, t, v, count)
            else:
                _filters4(s, t, v, count)
            _write(v, (a.tile + 2) * (a.tile + 2), out, piece, a.outputs, a.channels, first, count)
        piece = take(words)


@loop(FILTERS)
def filter_transform_fp32(words):
    a = numba.carray(words, 1)[0]
    _filter_transform(words, a, floats(a.weight))


@loop(FILTERS)
def filter_transform_bf16(words):
    a = numba.carray(words, 1)[0]
    _filter_transform(words, a, halves(a.weight))


@part
def _filter_gradient(words, a, weight):
    s, t, v, m = _room(), _room(), _room(), floats(a.transformed)
    piece = take(words)
    while piece < a.pieces:
        for first in range(0, a.channels, RUN):
            count = min(RUN, a.channels - first)
            if a.tile == 2:
                _collect(m, 16, piece, a.outputs, a.channels, first, count, s)
                _filter_gradients2(s, t, v, count)
            else:
                _collect(m, 36, piece, a.outputs, a.channels, first, count, s)
                _filter_gradients4(s, t, v, count)
            for k in range(9):
                start = (piece * 9 + k) * a.channels + first
                for c in range(count):
                    weight[start + c] = narrow(v[k * RUN + c], weight)
        piece = take(words)


@loop(FILTERS)
def filter_gradient_fp32(words):
    a = numba.carray(words, 1)[0]
    _filter_gradient(words, a, floats(a.weight))


@loop(FILTERS)
def filter_gradient_bf16(words):
    a = numba.carray(words, 1)[0]
    _filter_gradient(words, a, halves(a.weight))


class Loops(NamedTuple):
    """The loops over activations and weights of one type."""

    data_transform: Loop
    inverse_transform: Loop
    filter_transform: Loop
    filter_gradient: Loop


LOOPS = {
    torch.float32: Loops(data_transform_fp32, inverse_transform_fp32, filter_transform_fp32, filter_gradient_fp32),
    torch.bfloat16: Loops(data_transform_bf16, inverse_transform_bf16, filter_transform_bf16, filter_gradient_bf16),
}


def forward(x: Tensor, weight: Tensor, tile: Tile) -> Tensor:
    """The convolution [N, O, H, W] of x [N, C, H, W] and weight [O, C, 3, 3], padding 1; all channels-last."""
    return _convolve(x, _transformed_filters(weight, tile, mirrored=False).transpose(1, 2), tile)


def input_gradient(grad: Tensor, weight: Tensor, tile: Tile) -> Tensor:
    """The gradient [N, C, H, W] of x from that of the output, [N, O, H, W]."""
    return _convolve(grad, _transformed_filters(weight, tile, mirrored=True), tile)


def weight_gradient(grad: Tensor, x: Tensor, tile: Tile) -> Tensor:
    """The gradient [O, C, 3, 3] of the weights."""
    total: Tensor | None = None
    for of_grad, of_x in zip(_parts(grad, x.shape[1], tile), _parts(x, grad.shape[1], tile), strict=True):
        factors = _transformed_images(of_grad, tile, gradient=True).transpose(1, 2), _transformed_images(of_x, tile)
        total = torch.bmm(*factors) if total is None else total.baddbmm_(*factors)
    assert total is not None, "a batch is not empty"
    outputs, channels = total.shape[1:]
    weight = x.new_empty(outputs, 3, 3, channels)
    sizes = {"outputs": outputs, "channels": channels, "tile": tile, "mirrored": 0}
    LOOPS[x.dtype].filter_gradient(outputs, weight=weight, transformed=total, **sizes)
    return weight.permute(0, 3, 1, 2)


def _convolve(x: Tensor, factor: Tensor, tile: Tile) -> Tensor:
    samples, _, height, width = x.shape
    y = x.new_empty(samples, height, width, factor.shape[2]).permute(0, 3, 1, 2)
    for of_x, of_y in zip(_parts(x, factor.shape[2], tile), _parts(y, factor.shape[1], tile), strict=True):
        pieces, sizes = _sizes(of_y, tile)
        products = torch.bmm(_transformed_images(of_x, tile), factor)
        LOOPS[x.dtype].inverse_transform(pieces, x=of_y, transformed=products, **sizes)
    return y


def _parts(x: Tensor, others: int, tile: Tile) -> Iterator[Tensor]:
    # So many samples that what they are transformed to, and as many of `others` channels, is a chunk; or as many
    # numbers as the weights are transformed to, which every chunk reads.
    samples, channels, height, width = x.shape
    points = (tile + 2) ** 2
    each = points * -(-height // tile) * -(-width // tile) * (channels + others)
    count = -(-samples * each // max(CHUNK, points * channels * others))
    return iter(x.split(-(-samples // count)))


def _sizes(x: Tensor, tile: Tile) -> tuple[int, dict[str, int]]:
    samples, channels, height, width = x.shape
    sizes = {"images": samples, "height": height, "width": width, "channels": channels, "tile": tile}
    return samples * -(-height // tile), sizes


def _transformed_images(x: Tensor, tile: Tile, gradient: bool = False) -> Tensor:
    pieces, sizes = _sizes(x, tile)
    shape = (tile + 2) ** 2, pieces * -(-x.shape[3] // tile), x.shape[1]
    transformed = x.new_empty(shape, dtype=torch.float32)
    LOOPS[x.dtype].data_transform(pieces, x=x, transformed=transformed, gradient=int(gradient), **sizes)
    return transformed


def _transformed_filters(weight: Tensor, tile: Tile, mirrored: bool) -> Tensor:
    outputs, channels = weight.shape[:2]
    transformed = weight.new_empty(((tile + 2) ** 2, outputs, channels), dtype=torch.float32)
    sizes = {"outputs": outputs, "channels": channels, "tile": tile, "mirrored": int(mirrored)}
    LOOPS[weight.dtype].filter_transform(outputs, weight=weight, transformed=transformed, **sizes)
    return transformed
