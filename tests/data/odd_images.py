"""Image files that are odd but legal, written byte by byte."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 48, 64
RAMP = np.linspace(0, 1, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH)
COLOURS = (np.stack([RAMP, RAMP.T.reshape(HEIGHT, WIDTH), 1 - RAMP], 2) * 255).round().astype(np.uint8)


def tiff(pixels: np.ndarray, bits: int | None = None) -> bytes:
    """An uncompressed little-endian TIFF of one strip, of any pixel type; `bits` 0 leaves BitsPerSample out."""
    height, width = pixels.shape[:2]
    samples = 1 if pixels.ndim == 2 else pixels.shape[2]
    depth = pixels.dtype.itemsize * 8 if bits is None else bits
    form = {"u": 1, "i": 2, "f": 3}[pixels.dtype.kind]
    entries = [(256, 4, [width]), (257, 4, [height]), (258, 3, [depth] * samples), (259, 3, [1])]
    entries += [(262, 3, [1 if samples < 3 else 2]), (273, 4, [0]), (277, 3, [samples]), (278, 4, [height])]
    entries += [(279, 4, [pixels.nbytes]), (339, 3, [form] * samples)]
    if samples not in (1, 3):
        entries.insert(9, (338, 3, [0] * (samples - (3 if samples > 3 else 1))))  # extra samples of no stated meaning
    entries = [entry for entry in entries if depth or entry[0] != 258]
    at = 8 + 2 + 12 * len(entries) + 4
    sizes = {3: (2, "H"), 4: (4, "I")}
    extra, table = b"", b""
    data_at = at + sum(sizes[kind][0] * len(v) for _, kind, v in entries if sizes[kind][0] * len(v) > 4)
    for tag, kind, values in entries:
        values = [data_at] if tag == 273 else values
        data = struct.pack(f"<{len(values)}{sizes[kind][1]}", *values)
        if len(data) > 4:
            data, extra = struct.pack("<I", at + len(extra)), extra + data
        table += struct.pack("<HHI", tag, kind, len(values)) + data.ljust(4, b"\0")
    body = np.ascontiguousarray(pixels).astype(pixels.dtype.newbyteorder("<")).tobytes()
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + table + bytes(4) + extra + body


def png(pixels: np.ndarray, *extra: tuple[bytes, bytes], bad_crc: bool = False, **options: object) -> bytes:
    """A PNG with chunks (kind, content) after its header, the last one with a wrong CRC where asked."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", **options)
    data, result = buffer.getvalue(), b""
    for number, (kind, content) in enumerate(extra):
        crc = zlib.crc32(kind + content) ^ (bad_crc and number == len(extra) - 1)
        result += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)
    return data[:33] + result + data[33:]


def bmp_555() -> bytes:
    """A BMP of sixteen bits without masks: five for each colour."""
    five = COLOURS.astype(np.uint16) >> 3
    rows = (five[..., 0] << 10 | five[..., 1] << 5 | five[..., 2])[::-1].astype("<u2").tobytes()
    header = struct.pack("<IiiHHIIiiII", 40, WIDTH, HEIGHT, 1, 16, 0, len(rows), 2835, 2835, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + len(rows), 0, 0, 54) + header + rows


def bmp_of_masks(bits: int, masks: tuple[int, ...], header: int = 40) -> bytes:
    """A BMP that says by masks which bits are red, green, blue and, with a fourth one, alpha; a V4 header has 108."""
    number = {16: np.uint16, 32: np.uint32}[bits]
    values = np.dstack([COLOURS, (RAMP * 255).round().astype(np.uint8)]).astype(np.uint32)
    packed = np.zeros((HEIGHT, WIDTH), np.uint32)
    for channel, mask in enumerate(masks):
        low = (mask & -mask).bit_length() - 1
        packed |= (values[..., channel] * (mask >> low) // 255 << low).astype(np.uint32)
    rows = packed[::-1].astype(number).tobytes()
    fields = struct.pack("<IiiHHIIiiII", header, WIDTH, HEIGHT, 1, bits, 3, len(rows), 2835, 2835, 0, 0)
    fields += struct.pack(f"<{len(masks)}I", *masks)
    fields = fields.ljust(header, b"\0")
    return b"BM" + struct.pack("<IHHI", 14 + len(fields) + len(rows), 0, 0, 14 + len(fields)) + fields + rows


def pnm(kind: int, most: int) -> bytes:
    """A PGM or PPM whose largest number is `most`, with comments in its header."""
    numbers = (RAMP if kind in (2, 5) else COLOURS / 255) * most
    head = f"P{kind}\n# made here\n{WIDTH} {HEIGHT} # size\n{most}\n".encode()
    if kind in (2, 3):
        return head + " ".join(map(str, numbers.round().astype(int).ravel().tolist())).encode() + b"\n"
    return head + numbers.round().astype(">u2" if most > 255 else np.uint8).tobytes()


def encoded(pixels: np.ndarray, form: str, **options: object) -> bytes:
    """A file by Pillow."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form, **options)
    return buffer.getvalue()
