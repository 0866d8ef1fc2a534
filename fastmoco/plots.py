"""Figures in one style: line charts as PNG files beside a run, or as SVG inside a page.

matplotlib is imported only when something is drawn, and without pyplot: no display, no global state.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fastmoco import atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, GREY, GRID, SPINE = "#2f6db5", "#dd8452", "#3a8a5f", "#8a8f98", "#e8eaee", "#c4c8cf"
# A page sets these, and sets them anew where the reader wants a dark one.
VARIABLES = {BLUE: "--a", ORANGE: "--b", GREEN: "--c", GREY: "--soft", GRID: "--line", SPINE: "--line"}
DASHED = (0, (4, 3))
POINTS = 400  # a chart has no more pixels than that
FEW = 20  # points that are marked one by one


class Series(NamedTuple):
    """A line of a chart: `y` over `x`; values that are not finite are left out."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    colour: str = BLUE


class Level(NamedTuple):
    """A dashed horizontal line and what it says."""

    y: float
    text: str


def figure(width: float, height: float, dpi: int = 130) -> Figure:
    """An empty figure of `width` x `height` inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=dpi, layout="constrained")


def line_chart(
    axes: Axes,
    title: str,
    series: Sequence[Series],
    *,
    level: Level | None = None,
    high: float | None = None,
    end: float = 0,
    unit: str = "step",
) -> None:
    """Draw `series` from 0 to `high`, or as far as they and `level` go, and up to `end` of the horizontal axis."""
    axes.set_title(title, loc="left", fontsize=10)
    lines = [one for one in map(thin, series) if len(one.x)]
    for one in lines:
        marker = "o" if len(one.x) <= FEW else ""
        axes.plot(
            list(one.x),
            [value or 0.0 for value in one.y],
            color=one.colour,
            linewidth=1.6,
            label=one.name,
            marker=marker,
            markersize=3.5,
        )
    if level is not None:
        axes.axhline(level.y, color=GREY, linewidth=1, linestyle=DASHED)
        note(axes, level.text, (0.99, level.y), ("axes fraction", "data"), ha="right", va="bottom", xytext=(0, 2))
    tops = [value for one in lines for value in one.y if value is not None] + ([level.y] if level else [])
    top = 1.12 * max(tops, default=1.0) if high is None else 1.02 * high
    axes.set_ylim(0, top if top > 0 else 1)
    if end:
        axes.set_xlim(right=max(end, *(max(one.x) for one in lines)) if lines else end)
    if len(lines) > 1:
        axes.legend(frameon=False, fontsize=8, loc="best", labelcolor=GREY)
    dress(axes, unit)


def note(
    axes: Axes, text: str, at: tuple, coordinates: tuple[str, str] | str, colour: str = GREY, **place: Any
) -> None:
    """Small text beside a point."""
    axes.annotate(text, at, xycoords=coordinates, textcoords="offset points", color=colour, fontsize=8, **place)


def dress(axes: Axes, unit: str) -> None:
    """The look that all charts share: no frame, thin grid, small grey figures."""
    axes.set_xlabel(unit, fontsize=9, color=GREY)
    axes.tick_params(labelsize=8, color=GREY, labelcolor=GREY)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(SPINE)


def thin(series: Series) -> Series:
    """At most POINTS points, each the mean of as many neighbours."""
    rows = [(float(x), y) for x, y in zip(series.x, series.y, strict=True) if y is not None and math.isfinite(y)]
    size = -(-len(rows) // POINTS) or 1
    chunks = [rows[at : at + size] for at in range(0, len(rows), size)]
    x, y = ([sum(row[side] for row in chunk) / len(chunk) for chunk in chunks] for side in (0, 1))
    return series._replace(x=x, y=y)


def save(drawing: Figure, path: Path) -> None:
    """Write a figure, in the format that `path` ends in; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic.replacing(path) as draft, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # of a script that no font here has
        drawing.savefig(draft)


def svg(drawing: Figure, label: str) -> str:
    """The figure as an <svg> element in the page's colours; a screen reader says `label`."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        drawing.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()[buffer.getvalue().index("<svg") :]
    text = re.sub(r"<(metadata|style)\b.*?</\1>", "", text, flags=re.S)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    return re.sub(r'^<svg [^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg \1 role="img" aria-label="{label}">', text, count=1)
