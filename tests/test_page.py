"""Parts of the page: escaped, well-formed, drawn where the numbers are."""

import math
import re
import xml.etree.ElementTree as xml

import pytest

from fastmoco.page import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Level, Series, chart, page, picture, table, tiles


def drawn(text: str) -> xml.Element:
    return xml.fromstring(re.search(r"<svg.*</svg>", text, re.S)[0])


def points(text: str) -> list[tuple[float, float]]:
    line = drawn(text).find("polyline").get("points")
    return [tuple(map(float, point.split(","))) for point in line.split()]


def test_points_stand_where_their_values_are():
    found = points(chart("loss", [Series("a", [0, 50, 100], [0, 5, 10])], high=10))
    centre = (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2
    assert found == [(LEFT, HEIGHT - BOTTOM), pytest.approx(centre, abs=0.1), (WIDTH - RIGHT, TOP)]


def test_long_series_are_thinned_to_their_means():
    found = points(chart("loss", [Series("a", range(12_000), [1.0, 3.0] * 6000)], high=4))
    assert len(found) == 400
    middle = (TOP + HEIGHT - BOTTOM) / 2
    assert all(abs(y - middle) < 0.1 for _, y in found)


@pytest.mark.parametrize(
    "values", [[], [math.nan, math.nan], [0.0], [5.0, 5.0], [1e-9, 2e-9], [1e9, 2e9], [math.inf, 1.0], [None, 2.0]]
)
def test_any_values_make_a_picture_inside_its_frame(values):
    text = chart("x", [Series("a", range(len(values)), values)], level=Level(1.0, "level"))
    if "<svg" not in text:
        assert "nothing was logged" in text
        return
    for x, y in points(text):
        assert LEFT <= x <= WIDTH and 0 <= y <= HEIGHT


def test_text_is_escaped():
    evil = "<script>alert(1)</script>"
    text = page(
        evil,
        [
            tiles([(evil, evil, evil)]),
            table([(evil, evil)], (evil,)),
            chart(evil, []),
            picture(b"x", "png", f'"{evil}', evil),
        ],
    )
    assert "<script" not in text and text.count("&lt;script&gt;") >= 8


def test_what_changed_stands_out():
    text = table([("a", 1), ("b", 2)], changed=["b"])
    assert text.count("changed") == 1 and 'class="changed">2' in text
