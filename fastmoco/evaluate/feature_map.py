"""A map of features: images placed in the plane so that neighbours stay near, by UMAP where it is installed, else PCA.

Left dots, by class where there are classes; right the images themselves, one for each place that is taken.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastmoco import plots
from fastmoco.data.cache import printable
from fastmoco.data.manifest import Manifest
from fastmoco.data.rewrite import Reading
from fastmoco.evaluate.pictures import thumbnail

CELLS, SIDE = 20, 40  # the picture of images: so many places a side, of so many pixels
NAMED_CLASSES = 10  # as many as there are colours that can be told apart
LEAST_FOR_UMAP = 16  # images; of fewer it has no neighbourhoods


class Placed(NamedTuple):
    """Images in the plane."""

    places: np.ndarray
    """float64 [n, 2], each axis from 0 to 1."""
    method: str
    """UMAP or PCA, and of PCA the share of the variance that the two axes show."""


def place(features: Tensor) -> Placed:
    """Places for `features` [n, F]; the same ones for the same features."""
    umap = _umap() if len(features) >= LEAST_FOR_UMAP else None
    if umap is None:
        places, share = principal_axes(features)
        return Placed(_to_unit_square(places), f"PCA, {share:.0%} of the variance")
    # One seed and one thread, or the map would be another one each time.
    points = umap.UMAP(random_state=0, n_jobs=1, metric="cosine").fit_transform(features.cpu().numpy())
    return Placed(_to_unit_square(np.asarray(points, np.float64)), "UMAP")


def principal_axes(features: Tensor) -> tuple[np.ndarray, float]:
    """Coordinates float64 [n, 2] of `features` along the two axes of largest variance, and their share of it.

    An axis points to where its largest weight is positive.
    """
    rows = features.double() - features.double().mean(0)
    values, axes = torch.linalg.eigh(rows.T @ rows)
    axes, values = axes[:, -2:].flip(1), values.flip(0).clamp(min=0)
    signs = axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    share = values[:2].sum() / values.sum().clamp(min=torch.finfo(torch.float64).tiny)
    return (rows @ (axes * signs)).cpu().numpy(), share.item()


def draw_map(path: Path, images: Manifest, features: Tensor, reading: Reading = Reading()) -> str:
    """Write the map of `images` and their `features` [n, F] as a PNG file; returns the method's name."""
    placed = place(features)
    figure = plots.figure(12, 6, dpi=120)
    left, right = figure.subplots(1, 2)
    x, y = placed.places.T
    if images.labels is not None and len(images.classes) <= NAMED_CLASSES:
        for number, name in enumerate(images.classes):
            mine = images.labels == number
            left.scatter(x[mine], y[mine], s=9, label=printable(name), linewidths=0)
        left.legend(frameon=False, fontsize=8, markerscale=2, loc="best")
    else:
        left.scatter(x, y, s=9, color=plots.BLUE, linewidths=0, alpha=0.6)
    left.set_title(f"Features in the plane ({placed.method})", loc="left", fontsize=10)
    right.imshow(_mosaic(images, placed.places, reading), extent=(0, 1, 0, 1), interpolation="antialiased")
    right.set_title("The images there", loc="left", fontsize=10)
    for axes in (left, right):
        axes.set(xticks=[], yticks=[], aspect="equal")
        axes.spines[:].set_color(plots.GRID)
    plots.save(figure, path)
    return placed.method


def representatives(places: np.ndarray) -> dict[tuple[int, int], int]:
    """For each cell of the plane that holds images, by column and row from below, the image nearest to its middle."""
    cells = np.minimum((places * CELLS).astype(np.int64), CELLS - 1)
    distance = ((places - (cells + 0.5) / CELLS) ** 2).sum(1)
    nearest: dict[tuple[int, int], int] = {}
    for index in np.argsort(distance, kind="stable").tolist():
        column, row = cells[index].tolist()
        nearest.setdefault((column, row), index)
    return nearest


def _mosaic(images: Manifest, places: np.ndarray, reading: Reading) -> Image.Image:
    canvas = Image.new("RGB", (CELLS * SIDE, CELLS * SIDE), "white")
    for (column, row), index in representatives(places).items():
        canvas.paste(thumbnail(images, index, SIDE, reading), (column * SIDE, (CELLS - 1 - row) * SIDE))
    return canvas


def _to_unit_square(places: np.ndarray) -> np.ndarray:
    low, high = places.min(0), places.max(0)
    return (places - low) / np.where(high > low, high - low, 1)


def _umap():
    try:
        import umap
    except ImportError:
        return None
    return umap
