"""What an image file's header tells: its size, or why it cannot be used.

The header is read by nvImageCodec, which decodes the image later; the same function judges files at the scan and bytes
at run time. DALI 2.4 ends the process (SIGSEGV) on what its operator, not a decoder, gives up on: headers that do not
parse, sizes of 0 or less, pixel types that it has no name for. Such images must not reach it.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from typing import NamedTuple

# Its complaints about files would run over the progress bar; what is wrong with a file is said in our words.
os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")
os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")

import numpy as np

from fastmoco.recipe import Recipe

HEAD_BYTES = 16 * 1024  # one read that holds nearly every header
VERSION = 4  # raise it when `probe` changes its mind about any file: results that caches hold are then void
PIXEL_TYPES = ("uint8", "uint16", "float32")
"""Pixel types that DALI 2.4 decodes; of others its codecs refuse int8 and int16, and its operator has no name."""
# How files begin: those that are read, and other images by name.
READ = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"BM", b"II", b"MM", b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51", b"P")
FOREIGN = {
    b"GIF8": "GIF",
    b"\0\0\1\0": "ICO",
    b"icns": "ICNS",
    b"8BPS": "Photoshop's PSD",
    b"DDS ": "DDS",
    b"%PDF": "PDF",
    b"v/1\1": "OpenEXR",
    b"#?RADIANCE": "Radiance HDR",
    b"\xff\x0a": "JPEG XL",
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"<svg": "SVG",
}


class Header(NamedTuple):
    """What is known of an image before it is decoded; height and width are 0 where there is a reason against it."""

    height: int
    width: int
    reason: str = ""
    """Why the image cannot be used, or ""."""
    alpha: bool = False
    """Whether it has transparency."""
    codec: str = ""
    """nvImageCodec's name of the format."""
    pixel_type: str = "uint8"
    """One of PIXEL_TYPES."""


class Bytes(NamedTuple):
    """An encoded image of `size` bytes, read as far as needed."""

    head: bytes
    size: int
    tail: bytes
    """The last twelve bytes."""
    whole: Callable[[], bytes]

    @classmethod
    def of(cls, data: np.ndarray) -> Bytes:
        """Those of an image that has been read, uint8 [size]."""
        return cls(data[:HEAD_BYTES].tobytes(), len(data), data[-12:].tobytes(), data.tobytes)


def probe(path: str, start: int = 0, size: int | None = None, max_pixels: int = Recipe.max_pixels) -> Header:
    """The header of an image file, or of the `size` bytes in it from `start` on; its reason says what is wrong."""
    try:
        with open(path, "rb", buffering=0) as stream:
            file = stream.fileno()
            size = os.fstat(file).st_size - start if size is None else size
            head = os.pread(file, min(HEAD_BYTES, size), start)
            tail = head[-12:] if size <= len(head) else os.pread(file, 12, start + size - 12)
            return examine(Bytes(head, size, tail, lambda: _all(file, start, size)), max_pixels)
    except OSError as error:
        return Header(0, 0, f"unreadable: {error.strerror}")


def _all(file: int, start: int, size: int) -> bytes:
    parts = []
    while size > 0 and (part := os.pread(file, size, start)):  # Linux reads at most 2 GiB at once
        parts.append(part)
        start, size = start + len(part), size - len(part)
    return b"".join(parts)


def examine(data: Bytes, max_pixels: int = Recipe.max_pixels) -> Header:
    """The header of an encoded image; its reason says what is wrong with it, as far as that can be told undecoded."""
    reason = _foreign(data)
    if reason:
        return Header(0, 0, reason)
    try:
        header = _parse(data)
    except RuntimeError:
        return Header(0, 0, "broken header" if data.head.startswith(READ) else "not an image")
    height, width, reason = header[:3]
    if not reason and min(height, width) < 1:  # a size beyond 2^31
        reason = "broken header"
    elif not reason and height * width > max_pixels:
        reason = f"{width} x {height} pixels, over the limit of {max_pixels}"
    return header._replace(height=0, width=0, reason=reason) if reason else header


def _foreign(data: Bytes) -> str:
    head = data.head
    if not data.size:
        return "empty file"
    if not head:
        return "cut short while it was read"
    if head[:3] != b"\xff\xd8\xff" and (name := _foreign_name(head)):
        return f"{name}, which DALI cannot decode"
    if head[:2] == b"BM" and _has_odd_masks(head):
        return "BMP of colour masks that DALI misreads"
    return "" if _is_complete(data) else "truncated"


def _foreign_name(head: bytes) -> str:
    if head[4:8] == b"ftyp":
        return "AVIF" if head[8:11] == b"avi" else "HEIC" if head[8:11] in (b"hei", b"mif", b"msf") else ""
    if head[:5] == b"<?xml" and b"<svg" in head:
        return "SVG"
    return next((name for magic, name in FOREIGN.items() if head.startswith(magic)), "")


def _parse(data: Bytes) -> Header:
    # Here, so that what reads no images needs no DALI. By its full name: CUDA's wheels have a package `nvidia` too.
    import nvidia.nvimgcodec as nvimgcodec

    try:
        stream = nvimgcodec.CodeStream(data.head)
        height, width, codec = stream.height, stream.width, stream.codec_name  # the first one parses
    except RuntimeError:
        stream = nvimgcodec.CodeStream(data.whole())  # a long header
        height, width, codec = stream.height, stream.width, stream.codec_name
    if codec == "jpeg":  # nearly all images: microseconds count
        reason = "" if stream.precision == 8 else f"JPEG of {stream.precision} bits, which DALI cannot decode"
        return Header(height, width, reason, False, codec)
    try:
        pixel_type = str(stream.dtype)
    except TypeError:
        pixel_type = "unknown"
    reason = "" if pixel_type in PIXEL_TYPES else f"pixels of type {pixel_type}, which DALI cannot decode"
    return Header(height, width, reason, _has_alpha(data, codec, stream.num_channels), codec, pixel_type)


def _has_alpha(data: Bytes, codec: str, channels: int) -> bool:
    head = data.head
    if codec == "png":
        return head[25] in (4, 6) or b"tRNS" in _chunks(data)
    if codec == "webp":
        return bool(head[20] & 16) if head[12:16] == b"VP8X" else head[12:16] == b"VP8L" and bool(head[24] & 16)
    # Of TIFF, BMP and JPEG 2000; whether the channel is transparency, who decodes it finds.
    return codec in ("tiff", "bmp", "jpeg2k") and channels in (2, 4)


def _chunks(data: Bytes) -> list[bytes]:
    kinds, at, png = [], 8, data.head
    while at + 8 <= data.size:
        if at + 8 > len(png):
            png = data.whole()
        length, kind = struct.unpack_from(">I4s", png, at)
        if kind in (b"IDAT", b"IEND"):
            break
        kinds.append(kind)
        at += 12 + length
    return kinds


def _is_complete(data: Bytes) -> bool:
    head, tail = data.head, data.tail
    if head[:2] == b"\xff\xd8":
        return tail[-2:] == b"\xff\xd9" or _ends_before_garbage(data.whole())
    if head[:4] == b"\x89PNG":
        return tail[4:8] == b"IEND" or b"IEND\xae\x42\x60\x82" in data.whole()
    if head[:4] == b"RIFF":
        return int.from_bytes(head[4:8], "little") + 8 <= data.size
    return not _is_cut_bmp(head, data.size)


def _is_cut_bmp(head: bytes, size: int) -> bool:
    # A BMP without all its rows decodes to garbage without an error. Compressed ones, which nobody writes, pass.
    if head[:2] != b"BM" or len(head) < 34:
        return False
    start, header_size, width, height, _, bits, compression = struct.unpack_from("<IIiiHHI", head, 10)
    if header_size < 40 or compression not in (0, 3):
        return False
    return start + (abs(width) * bits + 31) // 32 * 4 * abs(height) > size


def _has_odd_masks(head: bytes) -> bool:
    # Of 32 bits DALI's decoder reads the masks of newer headers, by whole bytes; in old ones it passes over them.
    if len(head) < 66:
        return False
    header_size, bits, compression = struct.unpack_from("<I10xHI", head, 14)
    if bits != 32 or compression not in (3, 6):
        return False
    masks = struct.unpack_from("<III", head, 54)
    bytewise = all(mask in (0xFF, 0xFF00, 0xFF0000, 0xFF000000) for mask in masks)
    return masks != (0xFF0000, 0xFF00, 0xFF) and not (bytewise and header_size > 52)


def _ends_before_garbage(data: bytes) -> bool:
    at = 2
    # Skip the segments before the first scan: a thumbnail in one of them has an end of its own.
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        at += 1 if marker == 0xFF else 2 + length
        if marker == 0xDA:
            return data.find(b"\xff\xd9", at) >= 0
    return False
