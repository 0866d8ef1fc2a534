"""Parts of the page: escaped, and complete without numbers."""

import math

import pytest

from fastmoco.page import chart, page, picture, table, tiles
from fastmoco.plots import Series


@pytest.mark.parametrize("values", [[], [math.nan, math.nan]])
def test_a_chart_of_nothing_says_so(values):
    assert "nothing was logged" in chart("loss", [Series("a", range(len(values)), values)])


def test_text_is_escaped():
    evil = "<script>alert(1)</script>"
    text = page(
        evil,
        [
            tiles([(evil, evil, evil)]),
            table([(evil, evil)], (evil,)),
            chart(evil, []),
            chart(evil, [Series(evil, [0, 1], [0, 1]), Series(evil, [0, 1], [1, 0])]),
            picture(b"x", "png", f'"{evil}', evil),
        ],
    )
    assert "<script" not in text and text.count("&lt;script&gt;") >= 8


def test_what_changed_stands_out():
    text = table([("a", 1), ("b", 2)], highlights=["b"])
    assert text.count("changed") == 1 and 'class="changed">2' in text
