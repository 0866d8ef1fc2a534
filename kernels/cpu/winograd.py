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
are shorter than a convolution's. Beside oneDNN's errors in fp32, those of y and dx are smaller for m = 2 and two to
three times as large for m = 4; those of dw are one to three times as large for m = 2 and up to seven times for m = 4.
So m = 4 is for activations in bf16, whose rounding is a thousand times as coarse.

Layers of few channels are multiplied block by block, in a core's cache (`winograd_blocks.py`), others by matrix
products of as many tiles as the caches of two cores hold; so are weights' gradients whose sums exceed BLOCK_SUMS. The
transforms are in `winograd_transforms.py`. Channels are multiples of 16.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastmoco.kernels.cpu import winograd_blocks
from fastmoco.kernels.cpu.loops import Loop
from fastmoco.kernels.cpu.vectors import BYTES, LANES
from fastmoco.kernels.cpu.winograd_formulas import Tile
from fastmoco.kernels.cpu.winograd_transforms import GROUP, LOOPS, TILES

__all__ = ["Tile", "forward", "input_gradient", "weight_gradient"]

CHUNK = 2**21  # numbers that are multiplied at once, about: 8 MB stay in the caches of two cores
BLOCK_SUMS = 2**17  # most numbers of a sum of products that is made block by block: half a megabyte, in a core's cache
RUN = 4  # blocks, at least, whose products are added to one sum
SUMS = 16  # of one gradient, at most: they are read again


def forward(x: Tensor, weight: Tensor, tile: Tile) -> Tensor:
    """The convolution [N, O, H, W] of x [N, C, H, W] and weight [O, C, 3, 3], padding 1; all channels-last."""
    return _convolve(x, weight, tile, mirrored=False)


def input_gradient(grad: Tensor, weight: Tensor, tile: Tile) -> Tensor:
    """The gradient [N, C, H, W] of x from that of the output, [N, O, H, W]."""
    return _convolve(grad, weight, tile, mirrored=True)


def weight_gradient(grad: Tensor, x: Tensor, tile: Tile) -> Tensor:
    """The gradient [O, C, 3, 3] of the weights."""
    outputs, channels = grad.shape[1], x.shape[1]
    sizes = {"outputs": outputs, "channels": channels, "tile": tile, "size": x.element_size()}
    by_blocks = max(outputs, channels) <= winograd_blocks.CHANNELS
    if by_blocks and (tile + 2) ** 2 * outputs * channels <= BLOCK_SUMS:
        transformed = _sums_by_blocks(grad, x, tile)
        layout = {"sums": len(transformed), "wide": 1, "step": BYTES, "column": outputs * BYTES}
    else:
        transformed = _sum_by_products(grad, x, tile)
        layout = {"sums": 1, "wide": GROUP, "step": channels * 4, "column": BYTES}
    weight = x.new_empty(outputs, 3, 3, channels)
    LOOPS[x.dtype].sums(outputs, weight=weight, transformed=transformed, **sizes, **layout)
    return weight.permute(0, 3, 1, 2)


def _convolve(x: Tensor, weight: Tensor, tile: Tile, mirrored: bool) -> Tensor:
    outputs = weight.shape[1 if mirrored else 0]
    y = x.new_empty(x.shape[0], *x.shape[2:], outputs).permute(0, 3, 1, 2)
    if max(weight.shape[:2]) <= winograd_blocks.CHANNELS:
        count, sizes = _sizes(x, tile)
        factor = _filters_for_blocks(weight, tile, mirrored)
        convolve = winograd_blocks.LOOPS[x.dtype].convolve
        convolve(-(-count // TILES), x=x, y=y, factor=factor, outputs=outputs, run=1, **sizes)
        return y
    factor = _filters_for_products(weight, tile, mirrored)
    for of_x, of_y in zip(_parts(x, outputs, tile), _parts(y, x.shape[1], tile), strict=True):
        _transform_back(torch.bmm(_transformed_images(of_x, tile), factor), of_y, tile)
    return y


def _sums_by_blocks(grad: Tensor, x: Tensor, tile: Tile) -> Tensor:
    outputs, channels = grad.shape[1], x.shape[1]
    count, sizes = _sizes(x, tile)
    blocks = -(-count // TILES)
    run = max(RUN, -(-blocks // SUMS))
    sums = x.new_empty((-(-blocks // run), (tile + 2) ** 2, outputs * channels), dtype=torch.float32)
    sum_products = winograd_blocks.LOOPS[x.dtype].sum_products
    sum_products(len(sums), x=x, y=grad, factor=sums, outputs=outputs, run=run, **sizes)
    return sums


def _sum_by_products(grad: Tensor, x: Tensor, tile: Tile) -> Tensor:
    total: Tensor | None = None
    for of_grad, of_x in zip(_parts(grad, x.shape[1], tile), _parts(x, grad.shape[1], tile), strict=True):
        factors = _transformed_images(of_grad, tile, gradient=True).transpose(1, 2), _transformed_images(of_x, tile)
        total = torch.bmm(*factors) if total is None else total.baddbmm_(*factors)
    assert total is not None, "a batch is not empty"
    return total


def _parts(x: Tensor, others: int, tile: Tile) -> Iterator[Tensor]:
    # So many samples that what they are transformed to, and as many of `others` channels, is a chunk; or as many
    # numbers as the weights are transformed to, which every chunk reads.
    samples, channels, height, width = x.shape
    points = (tile + 2) ** 2
    each = points * -(-height // tile) * -(-width // tile) * (channels + others)
    count = -(-samples * each // max(CHUNK, points * channels * others))
    return iter(x.split(-(-samples // count)))


def _sizes(x: Tensor, tile: Tile) -> tuple[int, dict[str, int]]:
    # The number of tiles, and what loops are told of images.
    samples, channels, height, width = x.shape
    count = samples * -(-height // tile) * -(-width // tile)
    sizes = {"height": height, "width": width, "channels": channels, "tile": tile}
    return count, sizes | {"tiles": count, "size": x.element_size()}


def _transformed_images(x: Tensor, tile: Tile, gradient: bool = False) -> Tensor:
    count, sizes = _sizes(x, tile)
    transformed = x.new_empty(((tile + 2) ** 2, count, x.shape[1]), dtype=torch.float32)
    LOOPS[x.dtype].images(-(-count // TILES), x=x, transformed=transformed, gradient=int(gradient), **sizes)
    return transformed


def _transform_back(transformed: Tensor, y: Tensor, tile: Tile) -> None:
    count, sizes = _sizes(y, tile)
    LOOPS[y.dtype].back(-(-count // TILES), x=y, transformed=transformed, gradient=0, **sizes)


def _filters_for_products(weight: Tensor, tile: Tile, mirrored: bool) -> Tensor:
    # [n n, O, C] for the input's gradient, whose sums are over O, and transposed for the forward pass.
    outputs, channels = weight.shape[:2]
    transformed = weight.new_empty(((tile + 2) ** 2, outputs, channels), dtype=torch.float32)
    layout = {"wide": GROUP, "step": channels * 4, "group": GROUP * BYTES}
    _transform_filters(LOOPS[weight.dtype].filters, outputs, weight, transformed, tile, mirrored, layout)
    return transformed if mirrored else transformed.transpose(1, 2)


def _filters_for_blocks(weight: Tensor, tile: Tile, mirrored: bool) -> Tensor:
    # [n n, J / 16 wide, I, 16 wide], where sums are over I: C forward, O for the input's gradient.
    outputs, channels = weight.shape[:2]
    wide = 2 if (channels if mirrored else outputs) % (2 * LANES) == 0 else 1
    transformed = weight.new_empty(((tile + 2) ** 2, outputs, channels), dtype=torch.float32)
    layout = {"wide": wide, "step": wide * BYTES, "group": outputs * wide * BYTES}
    loops = LOOPS[weight.dtype]
    loop, pieces = (loops.filters, outputs) if mirrored else (loops.turned_filters, outputs // LANES)
    _transform_filters(loop, pieces, weight, transformed, tile, mirrored, layout)
    return transformed


def _transform_filters(
    loop: Loop, pieces: int, weight: Tensor, to: Tensor, tile: Tile, mirrored: bool, layout: dict[str, int]
) -> None:
    sizes = {"outputs": len(weight), "channels": weight.shape[1], "tile": tile, "size": weight.element_size()}
    loop(pieces, weight=weight, transformed=to, mirrored=int(mirrored), **sizes, **layout)
