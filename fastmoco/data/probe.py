"""What an image file's header tells: its size, or why it cannot be used."""

from __future__ import annotations

import io
import os
import struct

import numpy as np
from PIL import Image

from fastmoco.recipe import Recipe

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "JPEG2000", "PPM")  # Pillow's names of what DALI decodes
HEAD_BYTES = 16 * 1024  # one read that holds nearly every header
VERSION = 2  # raise it when `probe` changes its mind about any file: results that caches hold are then void


class Slice(io.RawIOBase):
    """`size` bytes of an open file from `start` on, as a file of their own; reading needs no seek in the other."""

    def __init__(self, file: io.FileIO, start: int, size: int) -> None:
        self.descriptor, self.start, self.size, self.position = file.fileno(), start, size, 0

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to `offset` and return the position."""
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size}[whence]
        self.position = max(origin + offset, 0)
        return self.position

    def readinto(self, buffer: memoryview) -> int:
        """Fill `buffer` as far as the slice goes, and return the number of bytes."""
        wanted = max(min(len(buffer), self.size - self.position), 0)
        data = os.pread(self.descriptor, wanted, self.start + self.position)
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


def probe(
    path: str, start: int = 0, size: int | None = None, max_pixels: int = Recipe.max_pixels
) -> tuple[int, int, str]:
    """Height, width and "" of an image file, from its header; or 0, 0 and the reason why it cannot be used.

    The image is the whole file, or its `size` bytes from `start` on.
    """
    try:
        with open(path, "rb", buffering=0) as whole:
            file = whole if size is None else Slice(whole, start, size)
            head = file.read(HEAD_BYTES)
            if not head:
                return 0, 0, "empty file"
            if head[:4] == b"GIF8":
                return 0, 0, "GIF, which DALI cannot decode"
            if not _is_complete(file, head):
                return 0, 0, "truncated"
            try:
                height, width = _header_size(head)
            except (OSError, SyntaxError, ValueError, struct.error):
                file.seek(0)
                height, width = _header_size(file)  # a long header: let Pillow read as far as it needs
            if height * width > max_pixels:
                return 0, 0, f"{width} x {height} pixels, over the limit of {max_pixels}"
            return height, width, ""
    except Image.DecompressionBombError:
        return 0, 0, f"over the limit of {max_pixels} pixels"
    except Image.UnidentifiedImageError:
        return 0, 0, "not an image"
    except OSError as error:
        return 0, 0, f"unreadable: {error.strerror}" if error.errno else "broken header"
    except (SyntaxError, ValueError, struct.error):  # what Pillow raises on damaged headers
        return 0, 0, "broken header"


def _header_size(head: bytes | io.RawIOBase) -> tuple[int, int]:
    with Image.open(io.BytesIO(head) if isinstance(head, bytes) else head, formats=FORMATS) as image:
        if image.format == "TIFF":  # Pillow swaps the sides of a TIFF that is to be shown rotated
            return image.tag_v2[257], image.tag_v2[256]
        return image.height, image.width


def _is_complete(file: io.RawIOBase, head: bytes) -> bool:
    end = file.seek(0, os.SEEK_END)
    file.seek(max(end - 12, 0))
    tail = file.read(12)
    if head[:2] == b"\xff\xd8":
        return tail[-2:] == b"\xff\xd9" or _ends_before_garbage(_whole(file))
    if head[:4] == b"\x89PNG":
        return tail[4:8] == b"IEND" or b"IEND\xae\x42\x60\x82" in _whole(file)
    if head[:4] == b"RIFF":
        return int.from_bytes(head[4:8], "little") + 8 <= end
    return not is_cut_bmp(head, end)


def is_cut_bmp(head: bytes, size: int) -> bool:
    """Whether a file of `size` bytes that starts with `head` is a BMP without all its rows.

    It decodes to garbage without an error. Compressed ones, which nobody writes, are not judged.
    """
    if head[:2] != b"BM" or len(head) < 34:
        return False
    start, header_size, width, height, _, bits, compression = struct.unpack_from("<IIiiHHI", head, 10)
    if header_size < 40 or compression not in (0, 3):
        return False
    return start + (abs(width) * bits + 31) // 32 * 4 * abs(height) > size


def is_cut_jpeg(data: np.ndarray) -> bool:
    """Whether `data`, uint8 [n], is a JPEG file without the marker that ends its scan. Microseconds, if it has one."""
    if data[:2].tobytes() != b"\xff\xd8" or data[-2:].tobytes() == b"\xff\xd9":
        return False
    return not _ends_before_garbage(data.tobytes())


def _ends_before_garbage(data: bytes) -> bool:
    at = 2
    # Skip the segments before the first scan: a thumbnail in one of them has an end of its own.
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        at += 1 if marker == 0xFF else 2 + length
        if marker == 0xDA:
            return data.find(b"\xff\xd9", at) >= 0
    return False


def _whole(file: io.RawIOBase) -> bytes:
    file.seek(0)
    return file.read()
