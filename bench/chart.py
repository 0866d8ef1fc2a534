"""Records as a picture: one panel a comparison, a bar a provider, the spread as a whisker, the bound as a line."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from fastmoco import plots
from fastmoco.bench.record_files import Record, Row, label

OURS, OTHERS, BOUND = "#1f6f8b", "#b8c4cc", "#c0392b"
WIDTH, BAR, MARGIN = 8.0, 0.32, 1.3  # inches


def draw(path: str | Path, records: Sequence[Record]) -> None:
    """Write the bars of all `records` to `path`; the ending (.svg, .png, .pdf) decides the format."""
    panels = _panels(records)
    heights = [BAR * len(rows) + MARGIN for _, rows in panels]
    figure = plots.figure(WIDTH, sum(heights))
    axes = figure.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axis, (title, rows) in zip(axes, panels, strict=True):
        _panel(axis, rows)
        axis.set_title(title, fontsize=9, loc="left")
    plots.save(figure, Path(path))


def _panels(records: Sequence[Record]) -> list[tuple[str, list[Row]]]:
    panels = []
    for item in records:
        for title, rows in groupby(item.rows, label):
            panels.append((f"{title}\n{item.environment['device']}, {item.date}", list(rows)))
    if not panels:
        raise ValueError("there is nothing to draw: the records have no rows")
    return panels


def _panel(axis: Any, rows: list[Row]) -> None:
    places = np.arange(len(rows))[::-1]
    low, middle, high = np.array([(row.spread[0], row.median, row.spread[1]) for row in rows]).T
    colours = [OURS if row.provider.startswith("fastmoco") else OTHERS for row in rows]
    axis.barh(places, middle, color=colours, xerr=(middle - low, high - middle), ecolor="#444", height=0.7)
    for place, row, value in zip(places, rows, middle, strict=True):
        axis.annotate(f" {value:,.4g}", (value, place), va="bottom", fontsize=7)
        if row.bound is not None:
            axis.plot([row.bound] * 2, [place - 0.4, place + 0.4], color=BOUND, linewidth=1.5)
    axis.set_yticks(places, [row.provider for row in rows], fontsize=8)
    better = "more is better" if rows[0].higher_is_better else "less is better"
    bound = "; red: physical bound" if any(row.bound is not None for row in rows) else ""
    axis.set_xlabel(f"{rows[0].unit}, median and 20 % to 80 % ({better}; blue: fastmoco{bound})", fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
