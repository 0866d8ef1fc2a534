"""Real photographs, as files of the kinds that real folders hold."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from fastmoco.data.manifest import Manifest, scan

ROTATED = Image.Exif()
ROTATED[0x0112] = 6

# Ending, mode and options of each kind of file.
KINDS: dict[str, tuple[str, str, dict]] = {
    "jpeg": ("JPEG", "RGB", {"quality": 90}),
    "jpeg444": ("JPEG", "RGB", {"quality": 75, "subsampling": 0}),
    "progressive": ("JPEG", "RGB", {"progressive": True}),
    "grey": ("JPEG", "L", {}),
    "cmyk": ("JPEG", "CMYK", {}),
    "rotated": ("JPEG", "RGB", {"exif": ROTATED}),
    "png": ("PNG", "RGB", {}),
    "palette": ("PNG", "P", {}),
    "greypng": ("PNG", "L", {}),
    "rgba": ("PNG", "RGBA", {}),
    "webp": ("WEBP", "RGB", {"quality": 80}),
    "bmp": ("BMP", "RGB", {}),
    "tiff": ("TIFF", "RGB", {}),
}


def encode(kind: str, pixels: np.ndarray) -> bytes:
    """A file of one of KINDS."""
    format, mode, options = KINDS[kind]
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, format, **options)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def photos() -> list[np.ndarray]:
    """Two photographs, uint8 [427, 640, 3]."""
    return list(load_sample_images().images)


@pytest.fixture(scope="session")
def photo_folder(photos: list[np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """104 cuts of many sizes and of every kind, eight of each, with `.img` for an ending."""
    return _write_cuts(tmp_path_factory.mktemp("photos"), photos, 8)


@pytest.fixture(scope="session")
def many_photos(photos: list[np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """312 of them."""
    return _write_cuts(tmp_path_factory.mktemp("many"), photos, 24)


def _write_cuts(folder: Path, photos: list[np.ndarray], each: int) -> Path:
    generator = np.random.default_rng(0)
    for number in range(each * len(KINDS)):
        kind = list(KINDS)[number % len(KINDS)]
        top, left = generator.integers(0, 200), generator.integers(0, 300)
        height, width = generator.integers(40, 220), generator.integers(40, 320)
        crop = photos[number % 2][top : top + height, left : left + width]
        (folder / f"{number:03d} {kind}.img").write_bytes(encode(kind, crop))
    return folder


@pytest.fixture(scope="session")
def photo_manifest(photo_folder: Path) -> Manifest:
    """Manifest of `photo_folder`."""
    return scan(photo_folder, cache=False)


def _bytes(pixels: np.ndarray, format: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format, **options)
    return buffer.getvalue()


def _huge(jpeg: bytes) -> bytes:
    start = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:start] + b"\xea\x60\xea\x60" + jpeg[start + 4 :]  # 60000 x 60000


def _without_segment(jpeg: bytes, marker: bytes) -> bytes:
    while marker in jpeg:
        at = jpeg.index(marker)
        jpeg = jpeg[:at] + jpeg[at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big") :]
    return jpeg


def _zeroed(data: bytes, start: int, stop: int) -> bytes:
    return data[:start] + bytes(stop - start) + data[stop:]


# How each kind of broken file is made from the pixels of a good one. The last four pass the scan of headers.
BROKEN: dict[str, Callable[[np.ndarray], bytes]] = {
    "empty": lambda _: b"",
    "page": lambda _: b"<html><body>404 not found</body></html>",
    "gif": lambda pixels: _bytes(pixels, "GIF"),
    "huge": lambda pixels: _huge(_bytes(pixels)),
    "cut jpeg": lambda pixels: _bytes(pixels)[:-60],
    "cut bmp": lambda pixels: _bytes(pixels, "BMP")[:-900],
    "no tables": lambda pixels: _without_segment(_bytes(pixels), b"\xff\xdb"),
    "harmed webp": lambda pixels: _zeroed(_bytes(pixels, "WEBP", lossless=True), 40, 300),
    "harmed png": lambda pixels: _zeroed(_bytes(pixels, "PNG"), 90, 130),
    "cut tiff": lambda pixels: _bytes(pixels, "TIFF")[:-900],
}
ODD = ("grey", "cmyk", "progressive", "sixteen", "palette", "rgba", "webp", "rotated")


@pytest.fixture(scope="session")
def write_set(photos: list[np.ndarray]) -> Callable[[Path, int], dict[str, str]]:
    """write_set(folder, n): n small images, JPEG but for eight odd ones and ten broken ones; file by kind of those."""

    def write(folder: Path, count: int) -> dict[str, str]:
        folder.mkdir(parents=True)
        generator = np.random.default_rng(0)
        # Neighbours too, so that a substitute may be bad itself.
        places = [1, 2, 3, 40, 60, 61, 90, 91, 150, count - 1]
        special = dict(zip(places, BROKEN, strict=True)) | {20 + 9 * i: kind for i, kind in enumerate(ODD)}
        names = {}
        for number in range(count):
            top, left = generator.integers(0, 300), generator.integers(0, 500)
            pixels = photos[number % 2][top : top + 48 + number % 7, left : left + 64 + number % 11]
            kind = special.get(number, "")
            name = f"{number:05d} {kind or 'plain'}.jpg"
            (folder / name).write_bytes(_content(kind, pixels))
            names |= {kind: name} if kind else {}
        return names

    return write


def _content(kind: str, pixels: np.ndarray) -> bytes:
    if kind in BROKEN:
        return BROKEN[kind](pixels)
    if kind == "sixteen":
        return _bytes(pixels[..., 0].astype(np.uint16) * 257, "PNG")
    return encode(kind, pixels) if kind else _bytes(pixels)


@contextmanager
def _growth() -> Iterator[Callable[[], int]]:
    def highest() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024

    Path("/proc/self/clear_refs").write_text("5")  # the mark starts anew at what is resident now
    before = highest()
    yield lambda: highest() - before


@pytest.fixture
def growth() -> Callable[[], AbstractContextManager[Callable[[], int]]]:
    """with growth() as grown: grown() is how far resident memory has risen, at its highest, since then, in bytes."""
    return _growth
