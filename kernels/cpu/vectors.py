"""Vectors of 16 fp32 numbers in compiled loops, written out where LLVM would have to find them itself.

A formula is a function of numbers, such as `lambda a, b: [a + b, a - b]`. Given `Vector`s it writes the instructions
that compute it for 16 numbers at once. What `square` and `products` make is called in a loop like a function. Addresses
and strides are whole numbers of bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fastmoco.kernels.cpu.loops import bf16_bits

LANES = 16
BYTES = 4 * LANES
FLOATS, WORDS, HALVES = (ir.VectorType(kind, LANES) for kind in (ir.FloatType(), ir.IntType(32), ir.IntType(16)))
MULTIPLY_ADD = ("contract",)  # a product and a sum may become one instruction

Formula = Callable[..., Sequence[Any]]


class Vector:
    """16 fp32 numbers in a register, with the arithmetic of fp32."""

    def __init__(self, builder: ir.IRBuilder, value: ir.Value) -> None:
        self.builder, self.value = builder, value

    def __add__(self, other: Vector) -> Vector:
        return Vector(self.builder, self.builder.fadd(self.value, other.value, flags=MULTIPLY_ADD))

    def __sub__(self, other: Vector) -> Vector:
        return Vector(self.builder, self.builder.fsub(self.value, other.value, flags=MULTIPLY_ADD))

    def __mul__(self, other: Vector) -> Vector:
        return Vector(self.builder, self.builder.fmul(self.value, other.value, flags=MULTIPLY_ADD))

    def __rmul__(self, factor: float) -> Vector:
        return Vector(self.builder, ir.Constant(FLOATS, [float(factor)] * LANES)) * self

    def __neg__(self) -> Vector:
        return Vector(self.builder, self.builder.fneg(self.value))

    @classmethod
    def repeat(cls, builder: ir.IRBuilder, address: ir.Value) -> Vector:
        """The fp32 number at an address, 16 times."""
        number = builder.load(builder.inttoptr(address, ir.FloatType().as_pointer()))
        first = builder.insert_element(ir.Constant(FLOATS, ir.Undefined), number, ir.IntType(32)(0))
        return cls(builder, builder.shuffle_vector(first, first, _all(0)))

    @classmethod
    def load(cls, builder: ir.IRBuilder, address: ir.Value, dtype: types.Type = types.float32) -> Vector:
        """16 numbers from an address on, of `dtype` as loops have it: float32, or uint16 for bf16."""
        if dtype == types.float32:
            return cls(builder, builder.load(builder.inttoptr(address, FLOATS.as_pointer()), align=4))
        halves = builder.load(builder.inttoptr(address, HALVES.as_pointer()), align=2)
        return cls(builder, builder.bitcast(builder.shl(builder.zext(halves, WORDS), _all(16)), FLOATS))

    def store(self, address: ir.Value, dtype: types.Type = types.float32) -> None:
        """Write them from an address on, rounded to `dtype`: to bf16 to the nearest, ties to even; NaN stays NaN."""
        builder = self.builder
        if dtype == types.float32:
            builder.store(self.value, builder.inttoptr(address, FLOATS.as_pointer()), align=4)
            return
        rounded = bf16_bits(builder, self.value)
        builder.store(rounded, builder.inttoptr(address, HALVES.as_pointer()), align=2)


def _all(number: int) -> ir.Constant:
    return ir.Constant(WORDS, [number] * LANES)


def room(numbers: int) -> Any:
    """An intrinsic: the address of so many fp32 numbers on the stack of the function that calls it, not yet written."""

    @intrinsic
    def make(typing_context):
        def generate(context, builder, signature, arguments):
            with builder.goto_entry_block():  # cgutils.alloca_once would write zeros, number by number
                place = builder.alloca(ir.ArrayType(ir.FloatType(), numbers))
                place.align = BYTES
                return builder.ptrtoint(place, ir.IntType(64))

        return types.int64(), generate

    return make


def square(formula: Formula, size: int, images: Literal["read", "written"]) -> Any:
    """Both dimensions of a transform of size x size numbers to k x k, for 16 channels: an intrinsic.

    It reads number (i, j) at source + i row + j column and writes number (i, j) of the result at to + i to_row + j
    to_column. `pointer` has the type of the side that is an image, read or written; the other one is fp32. The image
    ends: `elsewhere` is the address of its numbers where not 0 <= top + i < height, or not 0 <= left + j < width.
    """

    def transform(builder: ir.IRBuilder, dtype: types.Type, arguments: Sequence[ir.Value]) -> None:
        (source, row, column, to, to_row, to_column), edges = arguments[1:7], arguments[7:]
        kinds = (dtype, types.float32) if images == "read" else (types.float32, dtype)
        places = _grid(builder, source, row, column, size, edges if images == "read" else ())
        columns = [formula(*(Vector.load(builder, places[i][j], kinds[0]) for i in range(size))) for j in range(size)]
        rows = [formula(*numbers) for numbers in zip(*columns, strict=True)]
        places = _grid(builder, to, to_row, to_column, len(rows), edges if images == "written" else ())
        for i, results in enumerate(rows):
            for j, result in enumerate(results):
                result.store(places[i][j], kinds[1])

    @intrinsic
    def transform_square(
        typing_context, pointer, source, row, column, to, to_row, to_column, top, left, height, width, elsewhere
    ):
        def generate(context, builder, signature, arguments):
            transform(builder, pointer.dtype, arguments)
            return context.get_dummy_value()

        return types.void(pointer, *[types.int64] * 11), generate

    return transform_square


def _grid(
    builder: ir.IRBuilder, start: ir.Value, row: ir.Value, column: ir.Value, size: int, edges: Sequence[ir.Value]
) -> list[list[ir.Value]]:
    grid = [[_at(builder, _at(builder, start, i, row), j, column) for j in range(size)] for i in range(size)]
    if not edges:
        return grid
    top, left, height, width, elsewhere = edges
    inside_rows = [builder.icmp_unsigned("<", _at(builder, top, i), height) for i in range(size)]
    inside_columns = [builder.icmp_unsigned("<", _at(builder, left, j), width) for j in range(size)]
    return [
        [
            builder.select(builder.and_(inside_row, inside), place, elsewhere)
            for inside, place in zip(inside_columns, places, strict=True)
        ]
        for inside_row, places in zip(inside_rows, grid, strict=True)
    ]


def _at(builder: ir.IRBuilder, start: ir.Value, number: int, stride: ir.Value | None = None) -> ir.Value:
    offset = start.type(number)
    return builder.add(start, offset if stride is None else builder.mul(offset, stride))


class Strides(NamedTuple):
    """Of the numbers that `products` reads and writes, in bytes."""

    v_row: int
    v_sum: int
    v_block: int
    """From 16 numbers that are summed over to the next 16."""
    u_sum: int
    u_vector: int
    m_row: int


def products(rows: int, vectors: int, strides: Strides) -> Any:
    """Rows x vectors x 16 sums of products of fp32 numbers, kept in registers: an intrinsic of addresses.

    m[r, n] (+)= sum over 16 `blocks` numbers i of v[r, i] u[i, n]. With `add` 0 what m holds is not read. Vectors of m
    are m_vector apart.
    """
    every = [(r, n) for r in range(rows) for n in range(vectors)]

    def multiply(builder: ir.IRBuilder, arguments: Sequence[ir.Value]) -> None:
        v, u, m, m_vector, blocks, add = arguments
        places = [_at(builder, _at(builder, m, n, m_vector), r * strides.m_row) for r, n in every]
        sums = [cgutils.alloca_once(builder, FLOATS) for _ in every]  # which LLVM puts into registers
        for total in sums:
            builder.store(ir.Constant(FLOATS, [0.0] * LANES), total)
        with builder.if_then(builder.icmp_signed("!=", add, add.type(0))):
            for total, place in zip(sums, places, strict=True):
                builder.store(Vector.load(builder, place).value, total)
        with cgutils.for_range(builder, blocks) as loop:
            left = builder.add(v, builder.mul(loop.index, v.type(strides.v_block)))
            right = builder.add(u, builder.mul(loop.index, u.type(LANES * strides.u_sum)))
            for i in range(LANES):
                at = [_at(builder, right, i * strides.u_sum + n * strides.u_vector) for n in range(vectors)]
                factors = [Vector.load(builder, place) for place in at]
                for r in range(rows):
                    factor = Vector.repeat(builder, _at(builder, left, i * strides.v_sum + r * strides.v_row))
                    for n, other in enumerate(factors):
                        total = sums[r * vectors + n]
                        builder.store((Vector(builder, builder.load(total)) + factor * other).value, total)
        for total, place in zip(sums, places, strict=True):
            Vector(builder, builder.load(total)).store(place)

    @intrinsic
    def products_of(typing_context, v, u, m, m_vector, blocks, add):
        def generate(context, builder, signature, arguments):
            multiply(builder, arguments)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), generate

    return products_of
