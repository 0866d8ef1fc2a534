"""Real photographs, as files of the kinds that real folders hold."""

from __future__ import annotations

import io
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
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for number in range(8 * len(KINDS)):
        kind = list(KINDS)[number % len(KINDS)]
        top, left = generator.integers(0, 200), generator.integers(0, 300)
        height, width = generator.integers(40, 220), generator.integers(40, 320)
        cut = photos[number % 2][top : top + height, left : left + width]
        (folder / f"{number:03d} {kind}.img").write_bytes(encode(kind, cut))
    return folder


@pytest.fixture(scope="session")
def photo_manifest(photo_folder: Path) -> Manifest:
    """Manifest of `photo_folder`."""
    return scan(photo_folder, cache=False)
