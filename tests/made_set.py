"""A made set in VOC's folders: shapes of three kinds, under names of VOC's, on noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SHAPES = {"car": (205, 60, 50), "dog": (60, 160, 80), "person": (60, 90, 200)}


def make(root: Path, trainval: int = 30, test: int = 15, seed: int = 0) -> Path:
    """Write VOCdevkit/VOC2007 below `root`; returns VOCdevkit."""
    random = np.random.RandomState(seed)
    folder = root / "VOCdevkit/VOC2007"
    for name in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (folder / name).mkdir(parents=True)
    for part, count in (("trainval", trainval), ("test", test)):
        names = [f"{part}{number:03d}" for number in range(count)]
        (folder / f"ImageSets/Main/{part}.txt").write_text("\n".join(names) + "\n")
        for name in names:
            _picture(folder, name, random)
    return folder.parent


def _picture(folder: Path, name: str, random: np.random.RandomState) -> None:
    width, height = random.randint(190, 240), random.randint(170, 210)
    pixels = random.randint(90, 160, (height, width, 1)) + random.randint(-12, 12, (height, width, 3))
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    objects = []
    for cell in random.permutation(4)[: random.randint(1, 4)].tolist():
        kind = sorted(SHAPES)[random.randint(3)]
        w, h = random.randint(40, 80, 2).tolist()
        left = (cell % 2) * width // 2 + random.randint(0, max(1, width // 2 - w))
        top = (cell // 2) * height // 2 + random.randint(0, max(1, height // 2 - h))
        right, bottom = min(left + w, width - 1), min(top + h, height - 1)
        _draw(draw, kind, (left, top, right, bottom))
        objects.append((kind, int(random.rand() < 0.1), left + 1, top + 1, right + 1, bottom + 1))
    image.save(folder / f"JPEGImages/{name}.jpg", quality=92)
    lines = [
        f"<object><name>{kind}</name><difficult>{difficult}</difficult><bndbox><xmin>{a}</xmin><ymin>{b}</ymin>"
        f"<xmax>{c}</xmax><ymax>{d}</ymax></bndbox></object>"
        for kind, difficult, a, b, c, d in objects
    ]
    (folder / f"Annotations/{name}.xml").write_text(f"<annotation>{''.join(lines)}</annotation>")


def _draw(draw: ImageDraw.ImageDraw, kind: str, box: tuple[int, int, int, int]) -> None:
    if kind == "car":
        draw.rectangle(box, fill=SHAPES[kind])
    elif kind == "dog":
        draw.ellipse(box, fill=SHAPES[kind])
    else:
        left, top, right, bottom = box
        draw.polygon([((left + right) // 2, top), (right, bottom), (left, bottom)], fill=SHAPES[kind])
