"""The picture shows what the table says."""

import pytest
from matplotlib.figure import Figure

from fastmoco.bench import chart, record_files
from fastmoco.bench.record_files import Record, Row


def test_whiskers_end_where_the_table_says_the_spread_does():
    row = Row("step", "fastmoco", "ms", (1.0, 2.0, 4.0, 8.0), bound=0.5)
    axis = Figure().subplots()
    chart._panel(axis, [row])
    (whisker,) = axis.collections[0].get_segments()
    low, high = whisker[:, 0]
    assert (low, high) == pytest.approx(row.spread) and row.spread == pytest.approx((1.6, 5.6))
    item = Record("step", (row,), record_files.environment(), "fastmoco bench step", "2026-01-01")
    assert f"{low:.3g} to {high:.3g}" in record_files.table([item])


def test_nothing_to_draw_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no rows"):
        chart.draw(tmp_path / "a.svg", [])
