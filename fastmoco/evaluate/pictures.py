"""Pictures of evaluations: accuracy over epochs, the confusion matrix, nearest neighbours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from fastmoco import atomic, plots
from fastmoco.data.cache import printable
from fastmoco.data.errors import DataError
from fastmoco.data.manifest import Manifest
from fastmoco.data.plan import centre_boxes
from fastmoco.data.rewrite import Reading
from fastmoco.data.transform import decoded
from fastmoco.plots import BLUE, ORANGE, Level, Series

RIGHT, WRONG, QUERY = (58, 138, 95), (196, 70, 60), (120, 126, 136)
NAMED_CLASSES = 30  # beyond, a name beside each row is unreadable
TILE, FRAME, GAP, TEXT = 96, 4, 6, 14


def draw_probe(path: Path, curve: Sequence[Mapping[str, float]], confusion: Tensor, classes: Sequence[str]) -> None:
    """Accuracy over epochs beside the confusion matrix, as a PNG file."""
    figure = plots.figure(12, 5, dpi=120)
    left, right = figure.subplots(1, 2, width_ratios=(1.1, 1))
    _draw_curve(left, curve, len(classes))
    _draw_confusion(figure, right, confusion, classes)
    plots.save(figure, path)


def draw_confusion(path: Path, confusion: Tensor, classes: Sequence[str]) -> None:
    """The confusion matrix as a PNG file."""
    figure = plots.figure(6.4, 5.4, dpi=120)
    _draw_confusion(figure, figure.subplots(), confusion, classes)
    plots.save(figure, path)


class Tile(NamedTuple):
    """One image of a contact sheet."""

    images: Manifest
    at: int
    text: str = ""
    """What stands below it."""
    frame: tuple[int, int, int] = QUERY


def draw_neighbours(
    path: Path, val: Manifest, bank: Manifest, queries: np.ndarray, nearest: np.ndarray, reading: Reading
) -> None:
    """Each query image (int64 [m]) with its neighbours (int64 [m, k]): a framed contact sheet, green of its class."""
    assert bank.labels is not None and val.labels is not None
    rows = []
    for query, row in zip(queries.tolist(), nearest.tolist(), strict=True):
        same = [bank.labels[index] == val.labels[query] for index in row]
        near = [Tile(bank, index, frame=RIGHT if right else WRONG) for index, right in zip(row, same, strict=True)]
        rows.append([Tile(val, query), *near])
    draw_sheet(path, rows, reading, gap=2 * GAP)


def draw_sheet(path: Path, rows: Sequence[Sequence[Tile]], reading: Reading, gap: int = GAP) -> None:
    """Rows of framed images, each row's first one apart by `gap` pixels; rows may be of different lengths."""
    text = TEXT if any(tile.text for row in rows for tile in row) else 0
    across, down = TILE + 2 * FRAME + GAP, TILE + 2 * FRAME + GAP + text
    size = max(map(len, rows)) * across + gap + GAP, len(rows) * down + GAP
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for row, tiles in enumerate(rows):
        for column, tile in enumerate(tiles):
            place = column * across + (gap if column else GAP), row * down + GAP
            sheet.paste(ImageOps.expand(thumbnail(tile.images, tile.at, TILE, reading), FRAME, tile.frame), place)
            if tile.text:
                draw.text((place[0] + FRAME, place[1] + TILE + 2 * FRAME), tile.text, fill=QUERY)
    with atomic.replacing(path) as draft:
        sheet.save(draft, "PNG")


def thumbnail(images: Manifest, index: int, side: int, reading: Reading) -> Image.Image:
    """The centre of an image that evaluation looks at, as `side` x `side` pixels; grey where it cannot be shown."""
    top, left, height, width = centre_boxes(images.sizes[index : index + 1], side)[0].tolist()
    try:
        pixels = Image.fromarray(decoded(images.read(index), reading))
    except (DataError, OSError):  # damaged, or of a kind that Pillow does not read
        return Image.new("RGB", (side, side), QUERY)
    return pixels.resize((side, side), box=(left, top, left + width, top + height), reducing_gap=2)


def _draw_curve(axes: Any, curve: Sequence[Mapping[str, float]], classes: int) -> None:
    epochs = [line["epoch"] for line in curve]
    series = [
        Series(label, epochs, [line[name] for line in curve], colour)
        for name, colour, label in (("top5", ORANGE, "top-5"), ("top1", BLUE, "top-1"))
    ]
    level = Level(100 / classes, "chance, top-1")
    plots.line_chart(axes, "Validation accuracy (%)", series, level=level, high=100, unit="epoch")


def _draw_confusion(figure: Any, axes: Any, confusion: Tensor, classes: Sequence[str]) -> None:
    shares = confusion.double() / confusion.sum(1, keepdim=True).clamp(min=1)
    picture = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    axes.set_title("Class (row) taken for (column)", loc="left", fontsize=10)
    if len(classes) <= NAMED_CLASSES:
        texts = map(printable, classes)
        names = [name if len(name) <= 14 else f"{name[:13]}…" for name in texts]
        axes.set_xticks(range(len(names)), names, rotation=60, ha="right", rotation_mode="anchor", fontsize=7)
        axes.set_yticks(range(len(names)), names, fontsize=7)
    bar = figure.colorbar(picture, ax=axes, fraction=0.046, pad=0.03)
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_visible(False)
