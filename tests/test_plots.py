"""Line charts: points stand where their values are, long series are thinned, a page gets its own colours."""

from __future__ import annotations

import math
import os
import re
import xml.etree.ElementTree as xml
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastmoco import plots
from fastmoco.plots import BLUE, POINTS, VARIABLES, Level, Series


def draw(series: list[Series], **options: object) -> plots.Figure:
    figure = plots.figure(5.8, 3.2)
    plots.line_chart(figure.subplots(), "loss", series, **options)
    return figure


def test_points_stand_where_their_values_are() -> None:
    figure = draw([Series("a", [0, 50, 100], [0, 5, 10])], high=10)
    (line,) = figure.axes[0].lines
    assert line.get_xydata().tolist() == [[0, 0], [50, 5], [100, 10]]
    assert figure.axes[0].get_ylim() == (0, pytest.approx(10.2))


def test_long_series_are_thinned_to_their_means() -> None:
    actual = plots.thin(Series("a", range(12_000), [1.0, 3.0] * 6000))
    assert len(actual.x) == POINTS and set(actual.y) == {2.0}


@pytest.mark.parametrize(
    "values", [[], [math.nan, math.nan], [0.0], [5.0, 5.0], [1e-9, 2e-9], [1e9, 2e9], [math.inf, 1.0], [None, 2.0]]
)
def test_any_values_make_a_picture(values: list, tmp_path: Path) -> None:
    figure = draw([Series("a", range(len(values)), values)], level=Level(1.0, "level"), end=10)
    plots.save(figure, tmp_path / "new" / "chart.png")
    assert np.asarray(Image.open(tmp_path / "new" / "chart.png").convert("L")).min() < 128
    assert os.listdir(tmp_path / "new") == ["chart.png"]


def test_an_svg_is_well_formed_and_takes_the_colours_of_the_page() -> None:
    text = plots.svg(draw([Series("a", [0, 1], [0, 1])], level=Level(0.5, "half")), "loss")
    xml.fromstring(text.replace("xlink:href", "href"))
    assert f"var({VARIABLES[BLUE]})" in text and not any(colour in text for colour in VARIABLES)
    assert ">loss<" in text and ">half<" in text, "words are words, not shapes"
    assert not re.search(r"<(script|style|metadata)|20\d\d-\d\d", text)


def test_the_same_chart_gives_the_same_svg() -> None:
    one, two = (plots.svg(draw([Series("a", [0, 1], [0, 1])]), "loss") for _ in range(2))
    assert one == two != plots.svg(draw([Series("a", [0, 1], [0, 2])]), "loss")
