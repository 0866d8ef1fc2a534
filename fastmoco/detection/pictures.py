"""Pictures of detections: what a detector found, beside what was to be found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from fastmoco import atomic
from fastmoco.detection.average_precision import Detections
from fastmoco.detection.voc import Picture

SHOWN, COLUMNS, SIDE, GAP = 12, 4, 320, 8
SURE = 0.5  # score from which a detection is drawn
TRUE_COLOUR = (250, 250, 250)
COLOURS = ((47, 109, 181), (221, 132, 82), (58, 138, 95), (170, 80, 160), (200, 60, 60), (120, 110, 40))


def draw_detections(
    path: Path, pictures: Sequence[Picture], detections: Sequence[Detections], classes: list[str]
) -> None:
    """Write images from all over the set, objects in white and sure detections in colours with class and score."""
    indices = np.unique(np.linspace(0, len(pictures) - 1, min(SHOWN, len(pictures))).astype(int)).tolist()
    tiles = [_draw(pictures[index], detections[index], classes) for index in indices]
    rows = -(-len(tiles) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (SIDE + GAP) + GAP, rows * (SIDE + GAP) + GAP), "white")
    for number, tile in enumerate(tiles):
        row, column = divmod(number, COLUMNS)
        sheet.paste(tile, (column * (SIDE + GAP) + GAP, row * (SIDE + GAP) + GAP))
    with atomic.replacing(path) as draft:
        sheet.save(draft, "PNG")


def _draw(picture: Picture, detections: Detections, classes: list[str]) -> Image.Image:
    with Image.open(picture.path) as file:
        image = file.convert("RGB")
    scale = SIDE / max(image.size)
    image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    draw = ImageDraw.Draw(image)
    for box in picture.objects.boxes:
        draw.rectangle(_corners(box, scale), outline=TRUE_COLOUR, width=1)
    for box, label, score in zip(detections.boxes, detections.labels.tolist(), detections.scores.tolist(), strict=True):
        if score >= SURE:
            corners = _corners(box, scale)
            colour = COLOURS[label % len(COLOURS)]
            draw.rectangle(corners, outline=colour, width=2)
            text = f"{classes[label]} {score:.2f}"
            draw.rectangle(draw.textbbox(corners[:2], text), fill=colour)
            draw.text(corners[:2], text, fill="white")
    return image


def _corners(box: np.ndarray, scale: float) -> tuple[float, float, float, float]:
    left, top, right, bottom = ((box - np.array([1, 1, 0, 0])) * scale).tolist()
    return left, top, max(left, right), max(top, bottom)
