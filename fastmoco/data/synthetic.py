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

VERSION = 1
"""Goes up whenever the pixels change; an older set is made again."""
SEED = 20200309
IMAGES = {"train": 250, "val": 60}
"""Images of each class in each split."""
SIDES = (48, 160)
"""Range of height and width, in pixels."""
QUALITIES = (60, 95)
"""Range of JPEG qualities."""
PERIODS = (0.16, 0.32)
"""Range of the length after which a texture repeats, as a share of the image's shorter side."""
STAMP = "synthetic.json"

Array = NDArray[np.float64]


def make(folder: str | os.PathLike[str]) -> Path:
    """Folder holding train/CLASS/*.jpg and val/CLASS/*.jpg, made if it is not there, unfinished or outdated.

    The set appears in one rename, so whoever sees it sees all of it, and several processes may call this at once.
    ValueError where `folder` holds anything else: nothing of the user's is ever removed.
    """
    folder = Path(folder).absolute()
    if _is_current(folder):
        return folder
    if folder.exists() and not _is_ours(folder):
        raise ValueError(f"{folder} exists and is not an image set made by fastmoco: name a new or an empty folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        _write(made / "new")
        _install(made / "new", folder, made / "old")
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return folder


def render(family: str, rng: RandomState) -> NDArray[np.uint8]:
    """One image of `family`, uint8 [height, width, 3], with every property drawn from `rng`."""
    size = _draw_size(rng)
    x, y = _plane(rng, size)
    ink = FAMILIES[family](x, y, rng)
    softness = rng.uniform(0.06, 0.12)
    ink = np.clip(0.5 + ink / (2 * softness), 0, 1)
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
    angle = rng.uniform(0, 2 * np.pi)
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
    contrast, level = rng.uniform(0.35, 0.6), rng.uniform(0.45, 0.55)
    slope = rng.uniform(-0.06, 0.06, 2)
    light = slope[0] * np.linspace(-1, 1, height)[:, None] + slope[1] * np.linspace(-1, 1, width)
    grain = 0.04 * (rng.rand(height, width) - 0.5)
    tone = level + contrast * (ink - 0.5) + light + grain
    pixels = tone[..., None] + (rng.rand(3) - 0.5) * 0.02 + (0.03, 0.0, -0.04)
    return np.rint(np.clip(pixels, 0, 1) * 255).astype(np.uint8)


def _fold(x: Array) -> Array:
    # Distance to the nearest whole number: 0 on the lines, 0.5 between them.
    return np.abs(x - np.rint(x))


def _stripes(x: Array, y: Array, rng: RandomState) -> Array:
    return _fold(x) - rng.uniform(0.17, 0.33)


def _checks(x: Array, y: Array, rng: RandomState) -> Array:
    return 4 * (_fold(x * 0.7) - 0.25) * (_fold(y * 0.7) - 0.25) * 2


def _dots(x: Array, y: Array, rng: RandomState) -> Array:
    return np.hypot(_fold(x), _fold(y)) - rng.uniform(0.22, 0.36)


def _rings(x: Array, y: Array, rng: RandomState) -> Array:
    return np.abs(np.hypot(_fold(x * 0.8), _fold(y * 0.8)) - rng.uniform(0.26, 0.34)) - rng.uniform(0.07, 0.11)


def _crosses(x: Array, y: Array, rng: RandomState) -> Array:
    u, v = _fold(x * 0.8), _fold(y * 0.8)
    arm, half = rng.uniform(0.34, 0.42), rng.uniform(0.08, 0.13)
    return np.minimum(np.maximum(u - arm, v - half), np.maximum(v - arm, u - half))


def _bricks(x: Array, y: Array, rng: RandomState) -> Array:
    row = np.floor(y)
    joint = np.minimum(_fold(y), 2 * _fold(x / 2 + row / 2))
    return joint - rng.uniform(0.07, 0.14)


def _mosaic(x: Array, y: Array, rng: RandomState) -> Array:
    # Tiles of a drawn tone each: what is nearest decides, so the edges are straight and meet by threes.
    _, tone = _nearest(x * 0.8, y * 0.8, rng)
    return 0.16 * (tone - 0.5)


def _pebbles(x: Array, y: Array, rng: RandomState) -> Array:
    distance, _ = _nearest(x * 0.8, y * 0.8, rng)
    return distance - rng.uniform(0.25, 0.32)


def _straw(x: Array, y: Array, rng: RandomState) -> Array:
    # One stalk in every unit square, turned any way.
    best = np.full(x.shape, np.inf)
    for u, v, drawn in _neighbours(x, y, rng):
        angle = np.pi * drawn
        along, across = np.cos(angle) * u + np.sin(angle) * v, np.cos(angle) * v - np.sin(angle) * u
        best = np.minimum(best, np.hypot(np.maximum(np.abs(along) - 0.6, 0), across))
    return best - rng.uniform(0.09, 0.14)


def _nearest(x: Array, y: Array, rng: RandomState) -> tuple[Array, Array]:
    nearest, tone = np.full(x.shape, np.inf), np.zeros(x.shape)
    for u, v, drawn in _neighbours(x, y, rng):
        distance = np.hypot(u, v)
        tone = np.where(distance < nearest, drawn, tone)
        nearest = np.minimum(nearest, distance)
    return nearest, tone


def _neighbours(x: Array, y: Array, rng: RandomState) -> Iterator[tuple[Array, Array, Array]]:
    # One point at a drawn place in every unit square, with a drawn value; the offset of a pixel from the points in
    # the 3 x 3 squares around it, which hold the nearest one.
    column, row = np.floor(x).astype(int), np.floor(y).astype(int)
    table = rng.uniform(0.1, 0.9, (32, 32, 3))
    for i in (-1, 0, 1):
        for j in (-1, 0, 1):
            u, v, drawn = np.moveaxis(table[(row + j) % 32, (column + i) % 32], -1, 0)
            yield x - (column + i + u), y - (row + j + v), drawn


def _clouds(x: Array, y: Array, rng: RandomState) -> Array:
    # A sum of waves in all directions whose lengths lie near one period: a random field with one scale.
    angles, phases = rng.uniform(0, 2 * np.pi, (2, 24))
    paces = rng.uniform(0.35, 0.9, 24)
    field = sum(
        np.cos(2 * np.pi * pace * (np.cos(angle) * x + np.sin(angle) * y) + phase)
        for angle, phase, pace in zip(angles, phases, paces, strict=True)
    )
    return np.asarray(field) / 12 - rng.uniform(-0.1, 0.1)


FAMILIES: dict[str, Callable[[Array, Array, RandomState], Array]] = {
    "bricks": _bricks,
    "checks": _checks,
    "clouds": _clouds,
    "crosses": _crosses,
    "dots": _dots,
    "mosaic": _mosaic,
    "pebbles": _pebbles,
    "rings": _rings,
    "straw": _straw,
    "stripes": _stripes,
}


def _write(folder: Path) -> None:
    for path, rng, family in _files(folder):
        path.parent.mkdir(parents=True, exist_ok=True)
        _save(Image.fromarray(render(family, rng)), path, rng)
    (folder / STAMP).write_text(json.dumps(_stamp(), indent=1) + "\n")


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
    return not any(folder.iterdir()) or (folder / STAMP).is_file()


def _is_current(folder: Path) -> bool:
    try:
        return json.loads((folder / STAMP).read_text()) == _stamp()
    except (OSError, ValueError):
        return False


def _install(new: Path, folder: Path, old: Path) -> None:
    if folder.exists():
        os.rename(folder, old)
    os.rename(new, folder)
