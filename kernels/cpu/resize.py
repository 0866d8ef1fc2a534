"""Resizing boxes of images on a CPU, bit-equal to torch's uint8 operator: one box after the other in a core's cache.

A box is resized along its rows and then along its columns. An output's weights form a triangle that reaches as far as
the next outputs, or the next inputs where these are farther away (Pillow's bilinear with antialiasing). They are whole
numbers with as many binary digits as 16 bits hold; each pass adds up in 32 bits, rounds and clips to uint8. A side that
keeps its length needs no pass.

Sums are sixteen at a time. Along rows these are four pixels of four bytes, one of each of four rows, which are woven
together as the box is copied: a fourth byte that belongs to the next pixel is summed up too, and overwritten by it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, register_model
from torch import Tensor

from fastmoco.kernels.cpu.loops import Words, bytes_, doubles, longs, loop, part, take, whole

ROWS, LANES = 4, 16  # that go along together; bytes of four pixels
MOST_DIGITS, LARGEST = 22, 1 << 15  # binary digits behind the point of a weight; what all weights stay below

RESIZE = Words("crops boxes images pitches views count size view_step image_step longest")


class _Sums(types.Type):
    """Sixteen int32 sums, a register or two of them."""


sums = _Sums("sixteen int32")


@register_model(_Sums)
class _SumsModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, ir.VectorType(ir.IntType(32), LANES))


def _splat(builder, number):
    vector = ir.Constant(ir.VectorType(number.type, LANES), ir.Undefined)
    first = builder.insert_element(vector, number, ir.Constant(ir.IntType(32), 0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    return builder.shuffle_vector(first, vector, zeros)


def _number(value):
    return ir.Constant(ir.VectorType(ir.IntType(32), LANES), [value] * LANES)


@intrinsic
def _all(typing_context, number):
    """Sixteen times the same int32."""
    return sums(types.int32), lambda context, builder, signature, arguments: _splat(builder, arguments[0])


@intrinsic
def _add(typing_context, total, address, weight):
    """`total` and the 16 bytes at `address`, each times the int32 at the address `weight`.

    LLVM is told that it is below 2^15: then there are instructions that multiply and add at once.
    """

    def generate(context, builder, signature, arguments):
        total, address, weight = arguments
        pointer = builder.inttoptr(address, ir.VectorType(ir.IntType(8), LANES).as_pointer())
        pixels = builder.zext(builder.load(pointer, align=1), total.type)
        word = ir.IntType(32)
        number = builder.load(builder.inttoptr(weight, word.as_pointer()), align=4)
        bounds = [ir.Constant(word, bound) for bound in (0, LARGEST)]
        number.set_metadata("range", builder.module.add_metadata(bounds))
        return builder.add(total, builder.mul(pixels, _splat(builder, number)))

    return sums(sums, types.int64, types.int64), generate


def _as_bytes(builder, total, digits):
    total = builder.ashr(total, _splat(builder, digits))
    total = builder.select(builder.icmp_signed(">", total, _number(0)), total, _number(0))
    total = builder.select(builder.icmp_signed("<", total, _number(255)), total, _number(255))
    return builder.trunc(total, ir.VectorType(ir.IntType(8), LANES))


@intrinsic
def _put(typing_context, total, digits, address):
    """Write the sums, less `digits` binary digits and clipped, to 16 bytes."""

    def generate(context, builder, signature, arguments):
        pixels = _as_bytes(builder, *arguments[:2])
        builder.store(pixels, builder.inttoptr(arguments[2], pixels.type.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(sums, types.int32, types.int64), generate


@intrinsic
def _put_pixels(typing_context, total, digits, address, pitch):
    """As `_put`, but four bytes to each of four rows, `pitch` bytes apart."""

    def generate(context, builder, signature, arguments):
        total, digits, address, pitch = arguments
        word = ir.IntType(32)
        pixels = builder.bitcast(_as_bytes(builder, total, digits), ir.VectorType(word, ROWS))
        for row in range(ROWS):
            pixel = builder.extract_element(pixels, ir.Constant(word, row))
            builder.store(pixel, builder.inttoptr(address, word.as_pointer()), align=1)
            address = builder.add(address, pitch)
        return context.get_dummy_value()

    return types.void(sums, types.int32, types.int64, types.int64), generate


@intrinsic
def _copy(typing_context, target, source):
    """Copy four bytes."""

    def generate(context, builder, signature, arguments):
        target, source = (builder.inttoptr(each, ir.IntType(32).as_pointer()) for each in arguments)
        builder.store(builder.load(source, align=1), target, align=1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def _weave_pixels(typing_context, target, source, pitch):
    """Four pixels of each of four rows, `pitch` bytes apart: to a pixel belong its four bytes of all rows."""

    def generate(context, builder, signature, arguments):
        target, address, pitch = arguments
        rows = []
        for _ in range(ROWS):
            pointer = builder.inttoptr(address, ir.VectorType(ir.IntType(8), LANES).as_pointer())
            rows.append(builder.load(pointer, align=1))
            address = builder.add(address, pitch)
        halves = [_joined(builder, *rows[:2], range(2 * LANES)), _joined(builder, *rows[2:], range(2 * LANES))]
        order = [LANES * row + 3 * pixel + byte for pixel in range(4) for row in range(ROWS) for byte in range(4)]
        pixels = _joined(builder, *halves, order)
        builder.store(pixels, builder.inttoptr(target, pixels.type.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


def _joined(builder, first, second, order):
    return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(ir.IntType(32), len(order)), list(order)))


@part
def _weigh(length, size, exact, begins, counts, weights, taps):
    """For each of `size` outputs, where its inputs begin, their count and weights; the digits of the weights."""
    scale = length / size
    support = max(scale, 1.0)
    largest = 0.0
    for i in range(size):
        center = scale * (i + 0.5)
        begin = max(np.int64(center - support + 0.5), 0)
        count = min(max(min(np.int64(center + support + 0.5), length) - begin, 0), taps)
        total = 0.0
        for k in range(count):
            weight = max(1.0 - abs((k + begin - center + 0.5) * (1.0 / support)), 0.0)
            exact[i * taps + k] = weight
            total += weight
        for k in range(count):
            exact[i * taps + k] = exact[i * taps + k] / total
            largest = max(largest, exact[i * taps + k])
        begins[i], counts[i] = begin, count
    digits = 0
    while digits < MOST_DIGITS and np.int64(0.5 + largest * (1 << (digits + 1))) < LARGEST:
        digits += 1
    for i in range(size):
        for k in range(counts[i]):
            whole(weights)[i * taps + k] = np.int32(0.5 + exact[i * taps + k] * (1 << digits))
    return np.int32(digits)


@part
def _weave(source, pitch, row, last, width, woven):
    """Rows `row` to `row` + 3, or the last one again, pixel by pixel at the address `woven`; the fourth byte is any."""
    four = 0  # pixels of which all four rows are there, and 16 bytes of each row
    if row + ROWS <= last + 1:
        while four + 6 <= width:
            _weave_pixels(woven + LANES * four, source + row * pitch + 3 * four, pitch)
            four += 4
    for lane in range(ROWS):
        start, place = source + min(row + lane, last) * pitch, woven + 4 * lane
        for x in range(four, width - 1):
            _copy(place + LANES * x, start + 3 * x)
        pixel, end = bytes_(place + LANES * (width - 1)), bytes_(start + 3 * (width - 1))
        for channel in range(3):  # of the last one in the image nothing follows
            pixel[channel] = end[channel]


@part
def _along_rows(woven, size, target, pitch, begins, counts, weights, taps, digits):
    half = np.int32(1 << (digits - 1))
    for x in range(size):
        total, place = _all(half), woven + LANES * begins[x]
        for k in range(counts[x]):
            total = _add(total, place + LANES * k, weights + 4 * (x * taps + k))
        _put_pixels(total, digits, target + 3 * x, pitch)


@part
def _along_columns(source, pitch, target, chunks, count, weights, digits):
    half = np.int32(1 << (digits - 1))
    for chunk in range(chunks):
        total = _all(half)
        for k in range(count):
            total = _add(total, source + k * pitch + LANES * chunk, weights + 4 * k)
        _put(total, digits, target + LANES * chunk)


@part
def _resize(a, box, source, source_pitch, crop, room):
    """One box of the image at `source` to the address `crop`; `room` has the addresses of a thread's memory."""
    size, pitch, height, width = a.size, 3 * a.size + LANES, box[2], box[3]
    taps = _taps(a.longest, size)
    woven, narrow, line = room[0], room[1], room[2]
    exact, begins, counts, weights = doubles(room[3]), longs(room[4]), longs(room[5]), room[6]
    source += box[0] * source_pitch + 3 * box[1]
    if width != size:
        digits = _weigh(width, size, exact, begins, counts, weights, taps)
        for row in range(0, height, ROWS):
            _weave(source, source_pitch, row, height - 1, width, woven)
            _along_rows(woven, size, narrow + row * pitch, pitch, begins, counts, weights, taps, digits)
        source, source_pitch = narrow, pitch
    if height == size:
        for y in range(size):
            _copy_row(crop + 3 * size * y, source + y * source_pitch, 3 * size)
        return
    if width == size:
        for y in range(height):
            _copy_row(narrow + y * pitch, source + y * source_pitch, 3 * size)
    digits = _weigh(height, size, exact, begins, counts, weights, taps)
    for y in range(size):
        rows, own = narrow + begins[y] * pitch, weights + 4 * y * taps
        _along_columns(rows, pitch, line, (3 * size + LANES - 1) // LANES, counts[y], own, digits)
        _copy_row(crop + 3 * size * y, line, 3 * size)


@part
def _copy_row(target, source, count):
    target, source = bytes_(target), bytes_(source)
    for i in range(count):
        target[i] = source[i]


@part
def _taps(longest, size):
    """The most inputs that one of `size` outputs is made of."""
    return 2 * np.int64(np.ceil(max(longest / size, 1.0))) + 1


@loop(RESIZE)
def _resize_all(words):
    a = numba.carray(words, 1)[0]
    size, pitch = a.size, 3 * a.size + LANES
    taps = _taps(a.longest, size)
    # Woven rows, the box with narrowed rows, one row of the crop; exact weights, begins, counts, weights.
    numbers = size * taps
    pixels = (LANES * a.longest, (a.longest + ROWS) * pitch, pitch)
    lengths = (*pixels, 8 * numbers, 8 * size, 8 * size, 4 * numbers)
    memory, room = np.empty(sum(lengths) // 8 + len(lengths), np.float64), np.empty(len(lengths), np.int64)
    room[0] = memory.ctypes.data
    for i in range(1, len(lengths)):
        room[i] = room[i - 1] + (lengths[i - 1] + 7) // 8 * 8
    piece = take(words)
    while piece < a.pieces:
        image, view = piece // a.views, piece % a.views  # an image's boxes in a row: it is in the cache then
        box = longs(a.boxes + 32 * (view * a.count + image))
        crop = a.crops + view * a.view_step + image * a.image_step
        _resize(a, box, longs(a.images)[image], longs(a.pitches)[image], crop, room)
        piece = take(words)
    memory[0] = 0  # a last use: numba frees an array after its last, and knows nothing of addresses


def resizing(images: Sequence[Tensor], boxes: np.ndarray, crops: Tensor) -> Callable[[], None]:
    """As `fastmoco.kernels.resize.resizing`, of valid arguments."""
    boxes = np.ascontiguousarray(boxes, np.int64)
    addresses = np.array([(image.data_ptr(), image.stride(0)) for image in images], np.int64).reshape(-1, 2).T.copy()
    work = _resize_all.shared(
        boxes.shape[0] * boxes.shape[1],
        crops=crops,
        boxes=boxes.ctypes.data,
        images=addresses[0].ctypes.data,
        pitches=addresses[1].ctypes.data,
        views=boxes.shape[0],
        count=boxes.shape[1],
        size=crops.shape[2],
        view_step=crops.stride(0),
        image_step=crops.stride(1),
        longest=int(boxes[..., 2:].max(initial=1)),
    )

    def alive(held: tuple = (images, boxes, addresses, crops)) -> None:
        work()

    return alive
