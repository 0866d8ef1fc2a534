"""One dimension of each transform of Winograd's algorithm (`winograd.py`), for tiles of 2 and of 4 numbers.

Each is a product with one of its matrices: `input` with B', `filter` with G, `output` with A', and for the weights'
gradient `gradient` with A and `filter_gradient` with G'. They are functions of numbers or of `Vector`s.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from fastmoco.kernels.cpu.vectors import Formula

Tile = Literal[2, 4]


class Formulas(NamedTuple):
    """Those of one size of tile, m: `input` of n = m + 2 numbers to n, `filter` of 3 to n, `output` of n to m."""

    input: Formula
    filter: Formula
    output: Formula
    gradient: Formula
    filter_gradient: Formula


def _input2(a, b, c, d):
    return a - c, b + c, c - b, b - d


def _filter2(a, b, c):
    return a, 0.5 * ((a + c) + b), 0.5 * ((a + c) - b), c


def _output2(a, b, c, d):
    return a + b + c, b - c - d


def _gradient2(a, b):
    return a, a + b, a - b, -b


def _filter_gradient2(a, b, c, d):
    return a + 0.5 * (b + c), 0.5 * (b - c), 0.5 * (b + c) + d


def _input4(a, b, c, d, e, f):
    even, odd = e - c, d - b
    return (
        even + (a - c) + 1.5 * odd,
        (e - b) + 0.5 * c + 2.5 * d,
        (e + b) - 2.5 * c + 0.5 * d,
        even + 2 * odd,
        even - 0.5 * odd,
        (b + f) + 1.5 * even - 2 * d,
    )


def _filter4(a, b, c):
    return (
        a,
        (1 / 3) * (b + (a + c)),
        (1 / 3) * (b - (a + c)),
        (-4 / 15) * (4 * a + 2 * b + c),
        (1 / 15) * (a - 2 * b + 4 * c),
        c,
    )


def _output4(a, b, c, d, e, f):
    return (
        a + (b + c) + (d + e),
        (b - c) + 0.5 * d - 2 * e,
        (b + c) + 0.25 * d + 4 * e,
        (b - c) + 0.125 * d - 8 * e + f,
    )


def _gradient4(a, b, c, d):
    even, odd = a + c, b + d
    return (
        a,
        even + odd,
        even - odd,
        (a + 0.25 * c) + (0.5 * b + 0.125 * d),
        (a + 4 * c) - (2 * b + 8 * d),
        d,
    )


def _filter_gradient4(a, b, c, d, e, f):
    outer, inner = (1 / 3) * (b - c), (1 / 3) * (b + c)
    return (
        a + outer - (16 / 15) * d + (1 / 15) * e,
        inner - (8 / 15) * d - (2 / 15) * e,
        f + outer - (4 / 15) * d + (4 / 15) * e,
    )


FORMULAS: dict[Tile, Formulas] = {
    2: Formulas(_input2, _filter2, _output2, _gradient2, _filter_gradient2),
    4: Formulas(_input4, _filter4, _output4, _gradient4, _filter_gradient4),
}
