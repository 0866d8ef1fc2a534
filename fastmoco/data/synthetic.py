"""The embedded image set: ten families of procedural textures as labelled JPEG files, made on first use.

It is made so that only learning helps. Every image draws its own scale, orientation, phase, line weight, sharpness,
contrast, light and noise, so neighbours in pixel space are of any family; and all families share one muted palette
and one range of scales, so neither colour nor roughness gives the family (or the single image) away. What a family's
images have in common is their structure: how edges bend, cross and repeat.

Drawn from `numpy.random.RandomState`, whose stream NumPy keeps for ever, and computed in float64, so that the pixels
are the same on every machine; the files are as equal as the JPEG library makes them.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.random import RandomState
from numpy.typing import NDArray
from PIL import Image

from fastmoco import atomic

VERSION = 2
"""Goes up whenever the pixels change; an older set is made again."""
SEED = 20200309
IMAGES = {"train": 320, "val": 60}
"""Images of each class in each split."""
SIDES = (48, 160)
"""Range of height and width, in pixels."""
QUALITIES = (60, 95)
"""Range of JPEG qualities."""
PERIODS = (0.2, 0.34)
"""Range of the length after which a texture repeats, as a share of the image's shorter side."""
STAMP = "synthetic.json"

Array = NDArray[np.float64]


def make(folder: str | os.PathLike[str]) -> Path:
    """Folder holding train/CLASS/*.jpg and val/CLASS/*.jpg, made if it is absent, incomplete or of an older generator.

    The set appears in one rename, so whoever sees it sees all of it, and several processes may call this at once.
    Raises ValueError if `folder` holds anything else, which is left as it is.
    """
    folder = Path(folder).absolute()
    if _is_current(folder):
        return folder
    if folder.exists() and not _is_ours(folder):
        raise ValueError(f"{folder} exists and is not an image set made by fastmoco: name a new or an empty folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        _write(aside / "new")
        _install(aside / "new", folder, aside / "old")
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def render(family: str, rng: RandomState) -> NDArray[np.uint8]:
    """One image of `family`, uint8 [height, width, 3], with every property drawn from `rng`."""
    size = _draw_size(rng)
    x, y = _plane(rng, size)
    ink = FAMILIES[family](x, y, rng)
    return _develop(ink if rng.rand() < 0.5 else 1 - ink, rng)


def _draw_size(rng: RandomState) -> tuple[int, int]:
    # Log-uniform as real folders are skewed; sides within 4:3 of each other, as photographs mostly are.
    side = np.exp(rng.uniform(np.log(SIDES[0]), np.log(SIDES[1])))
    ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)) / 2)
    height, width = np.clip(np.rint([side * ratio, side / ratio]), *SIDES).astype(int)
    return int(height), int(width)


def _plane(rng: RandomState, size: tuple[int, int]) -> tuple[Array, Array]:
    height, width = size
    period = min(size) * np.exp(rng.uniform(*np.log(PERIODS)))
    angle = rng.uniform(-np.pi / 3, np.pi / 3)
    y, x = np.mgrid[:height, :width] / period
    u = np.cos(angle) * x + np.sin(angle) * y + rng.uniform(0, 8)
    v = np.cos(angle) * y - np.sin(angle) * x + rng.uniform(0, 8)
    # A slow bend, so that no two images are the same lattice.
    bend, pace = rng.uniform(0, 0.25), rng.uniform(0.05, 0.12)
    phase = rng.uniform(0, 2 * np.pi, 2)
    return (
        u + bend * np.sin(2 * np.pi * pace * v + phase[0]),
        v + bend * np.sin(2 * np.pi * pace * u + phase[1]),
    )


def _develop(ink: Array, rng: RandomState) -> NDArray[np.uint8]:
    height, width = ink.shape
    contrast, level = rng.uniform(0.35, 0.6), rng.uniform(0.4, 0.6)
    slope = rng.uniform(-0.05, 0.05, 2)
    light = slope[0] * np.linspace(-1, 1, height)[:, None] + slope[1] * np.linspace(-1, 1, width)
    grain = 0.04 * (rng.rand(height, width) - 0.5)
    tone = level + contrast * (ink - 0.5) + light + grain
    pixels = tone[..., None] + (rng.rand(3) - 0.5) * 0.02 + (0.03, 0.0, -0.04)
    return np.rint(np.clip(pixels, 0, 1) * 255).astype(np.uint8)


def _fold(x: Array) -> Array:
    # Distance to the nearest whole number: 0 on the lines, 0.5 between them.
    return np.abs(x - np.rint(x))


def _edge(distance: Array, rng: RandomState) -> Array:
    # Ink 0 inside, 1 outside, and a soft step over the outline where the distance is 0.
    return np.clip(0.5 + distance / rng.uniform(0.12, 0.24), 0, 1)


def _bricks(x: Array, y: Array, rng: RandomState) -> Array:
    # Courses of bricks of a drawn tone each, shifted by half a brick from one course to the next.
    row = np.floor(y)
    along = x / 2 + row / 2
    tone = rng.rand(64, 64)[row.astype(int) % 64, np.floor(along).astype(int) % 64]
    mortar = _edge(rng.uniform(0.09, 0.13) - np.minimum(_fold(y), 2 * _fold(along)), rng)
    return np.maximum(mortar, 0.65 * tone)


def _checks(x: Array, y: Array, rng: RandomState) -> Array:
    return _edge(8 * (_fold(x * 0.7) - 0.25) * (_fold(y * 0.7) - 0.25), rng)


def _clouds(x: Array, y: Array, rng: RandomState) -> Array:
    # A sum of waves in all directions whose lengths lie near one period: a random field with one scale.
    angles, phases = rng.uniform(0, 2 * np.pi, (2, 16))
    paces = 2 * np.pi * rng.uniform(0.35, 0.9, 16)
    field = np.zeros(x.shape)
    for angle, phase, pace in zip(angles, phases, paces, strict=True):
        field += np.cos(pace * np.cos(angle) * x + pace * np.sin(angle) * y + phase)
    return _edge(field / 10 - rng.uniform(-0.1, 0.1), rng)


def _dots(x: Array, y: Array, rng: RandomState) -> Array:
    return _edge(np.hypot(_fold(x), _fold(y)) - rng.uniform(0.26, 0.34), rng)


def _mosaic(x: Array, y: Array, rng: RandomState) -> Array:
    # Tiles of a drawn tone each: whichever point is nearest decides, so the edges are straight and meet by threes.
    nearest, ink = np.full(x.shape, np.inf), np.zeros(x.shape)
    for u, v, draw in _neighbours(x * 0.8, y * 0.8, rng):
        distance = np.hypot(u, v)
        ink = np.where(distance < nearest, draw, ink)
        nearest = np.minimum(nearest, distance)
    return ink


def _pebbles(x: Array, y: Array, rng: RandomState) -> Array:
    outlines = [np.hypot(u, v) - 0.5 * draw for u, v, draw in _neighbours(x * 0.9, y * 0.9, rng)]
    return _edge(np.min(outlines, axis=0), rng)


def _plaid(x: Array, y: Array, rng: RandomState) -> Array:
    # Three tones: where no band runs, where one runs, where two cross.
    half = rng.uniform(0.2, 0.3)
    return (_edge(_fold(x * 0.8) - half, rng) + _edge(_fold(y * 0.8) - half, rng)) / 2


def _rings(x: Array, y: Array, rng: RandomState) -> Array:
    radius = np.hypot(_fold(x * 0.8), _fold(y * 0.8))
    return _edge(np.abs(radius - rng.uniform(0.26, 0.34)) - rng.uniform(0.07, 0.11), rng)


def _scales(x: Array, y: Array, rng: RandomState) -> Array:
    # Rows of shaded arcs, each row over the one before and shifted by half a scale.
    front = y - rng.uniform(1.6, 2.4) * _fold(x * 0.7 + np.floor(y) / 2) ** 2
    return front - np.floor(front)


def _stripes(x: Array, y: Array, rng: RandomState) -> Array:
    return _edge(_fold(x) - rng.uniform(0.2, 0.3), rng)


def _neighbours(x: Array, y: Array, rng: RandomState) -> Iterator[tuple[Array, Array, Array]]:
    # One point at a drawn place in every unit square, with a drawn value: the offset of every pixel from the points in
    # the 3 x 3 squares around it, which hold the nearest one.
    column, row = np.floor(x).astype(int), np.floor(y).astype(int)
    table = rng.uniform(0.1, 0.9, (3, 32, 32))
    for i in (-1, 0, 1):
        for j in (-1, 0, 1):
            u, v, draw = table[:, (row + j) % 32, (column + i) % 32]
            yield x - (column + i + u), y - (row + j + v), draw


FAMILIES: dict[str, Callable[[Array, Array, RandomState], Array]] = {
    "bricks": _bricks,
    "checks": _checks,
    "clouds": _clouds,
    "dots": _dots,
    "mosaic": _mosaic,
    "pebbles": _pebbles,
    "plaid": _plaid,
    "rings": _rings,
    "scales": _scales,
    "stripes": _stripes,
}


def _write(folder: Path) -> None:
    for path, rng, family in _files(folder):
        path.parent.mkdir(parents=True, exist_ok=True)
        _save(Image.fromarray(render(family, rng)), path, rng)
    atomic.write_json(folder / STAMP, _stamp())


def _save(image: Image.Image, path: Path, rng: RandomState) -> None:
    if rng.rand() < 0.1:
        image = image.convert("L")
    quality = int(rng.randint(QUALITIES[0], QUALITIES[1] + 1))
    image.save(path, quality=quality, progressive=bool(rng.rand() < 0.15), subsampling=int(rng.choice([0, 2])))


def _files(folder: Path) -> Iterator[tuple[Path, RandomState, str]]:
    for s, (split, images) in enumerate(IMAGES.items()):
        for f, family in enumerate(FAMILIES):
            for i in range(images):
                yield folder / split / family / f"{family}_{i:04d}.jpg", RandomState([SEED, s, f, i]), family


def _stamp() -> dict[str, object]:
    return {"made_by": "fastmoco", "version": VERSION, "images": IMAGES, "classes": list(FAMILIES)}


def _is_ours(folder: Path) -> bool:
    return folder.is_dir() and ((folder / STAMP).is_file() or not any(folder.iterdir()))


def _is_current(folder: Path) -> bool:
    try:
        stamp = json.loads((folder / STAMP).read_text())
    except (OSError, ValueError):
        return False
    return stamp == _stamp() and all(
        sum(1 for _ in (folder / split / family).glob("*.jpg")) == images
        for split, images in IMAGES.items()
        for family in FAMILIES
    )


def _install(new: Path, folder: Path, old: Path) -> None:
    try:
        if folder.exists() and not _is_current(folder):
            os.rename(folder, old)
        os.rename(new, folder)
    except OSError:
        if not _is_current(folder):  # another process was faster, which is as good
            raise
