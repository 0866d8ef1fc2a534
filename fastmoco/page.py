"""Parts of a self-contained HTML page: style, tables, tiles, pictures and line charts as SVG. No script, no request."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 420, 230
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 12, 30
POINTS = 400  # a chart has no more pixels than that

STYLE = """
:root { --ink: #1d2430; --soft: #616b7a; --line: #e3e7ed; --card: #fff; --back: #f5f6f8;
  --a: #2f6db5; --b: #d9763f; --c: #2f8a5b; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --soft: #98a2b1; --line: #303743; --card: #1b2028;
  --back: #12161c; --a: #74a9e8; --b: #eb9a68; --c: #67bd90; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); line-height: 1.5;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 24px 16px 48px; }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 36px 0 12px; }
h3 { font-size: 14px; font-weight: 600; margin: 0 0 6px; }
p { margin: 0 0 10px; } .soft { color: var(--soft); } small, .small { font-size: 13px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; min-width: 0; }
.tiles { display: grid; gap: 10px; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); margin-top: 18px; }
.tiles b { display: block; white-space: nowrap; font-size: 24px; line-height: 1.2; font-variant-numeric: tabular-nums;
  font-weight: 650; }
.grid { display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 330px), 1fr)); }
.wide { display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); }
.views { display: grid; gap: 10px; grid-template-columns: repeat(2, 1fr); }
@media (min-width: 700px) { .views { grid-template-columns: repeat(4, 1fr); } }
figure { margin: 0; } figcaption { color: var(--soft); font-size: 13px; margin-top: 4px; overflow-wrap: anywhere; }
img { max-width: 100%; height: auto; display: block; border-radius: 6px; } .views img { width: 100%; }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--soft); font-size: 12px; }
svg .grid-line { stroke: var(--line); } svg .level { stroke: var(--soft); stroke-dasharray: 4 3; }
svg polyline { fill: none; stroke-width: 2; stroke-linejoin: round; }
.a { stroke: var(--a); } .b { stroke: var(--b); } .c { stroke: var(--c); }
.key { font-size: 13px; color: var(--soft); margin-right: 12px; white-space: nowrap; }
.key i { display: inline-block; width: 14px; border-top: 3px solid; margin-right: 5px; vertical-align: middle; }
.key .a { border-color: var(--a); } .key .b { border-color: var(--b); } .key .c { border-color: var(--c); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
td, th { text-align: left; padding: 5px 12px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 500; } tr:last-child td { border-bottom: 0; }
td { overflow-wrap: anywhere; } td:first-child, .figures td { white-space: nowrap; } td.changed { font-weight: 650; }
code { font: 13px ui-monospace, "Liberation Mono", Menlo, monospace; overflow-wrap: anywhere; }
"""


class Series(NamedTuple):
    """A line of a chart; `colour` is a, b or c of the page's style."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str = "a"


class Level(NamedTuple):
    """A dashed horizontal line and what it says."""

    y: float
    text: str


def page(title: str, sections: Iterable[str]) -> str:
    """The whole document."""
    body = "\n".join(sections)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style></head>\n<body><main>\n{body}\n</main></body></html>\n"
    )


def section(title: str, *parts: str) -> str:
    """A heading and what stands under it."""
    return f"<section><h2>{escape(title)}</h2>\n{''.join(parts)}</section>"


def tiles(facts: Iterable[tuple[str, str, str]]) -> str:
    """A row of large figures: name, value and a remark on it."""
    cards = (
        f'<div class="card"><span class="small soft">{escape(name)}</span><b>{escape(value)}</b>'
        f'<span class="small soft">{escape(remark)}</span></div>'
        for name, value, remark in facts
    )
    return f'<div class="tiles">{"".join(cards)}</div>'


def table(rows: Iterable[Sequence[object]], head: Sequence[str] = (), changed: Iterable[object] = ()) -> str:
    """A table; rows whose first cell is in `changed` stand out."""
    strong = set(changed)
    top = f"<tr>{''.join(f'<th>{escape(name)}</th>' for name in head)}</tr>" if head else ""
    lines = []
    for first, *rest in rows:
        mark = ' class="changed"' if first in strong else ""
        cells = "".join(f"<td{mark}>{escape(str(cell))}</td>" for cell in rest)
        lines.append(f'<tr><td class="soft">{escape(str(first))}</td>{cells}</tr>')
    figures = ' class="figures"' if head else ""
    return f'<div class="card scroll"><table{figures}>{top}{"".join(lines)}</table></div>'


def picture(data: bytes, kind: str, alt: str, caption: str = "") -> str:
    """A picture whose bytes stand in the page; `kind` is png or jpeg."""
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return f'<figure><img src="{source}" alt="{escape(alt)}">{below}</figure>'


def chart(
    title: str,
    series: Sequence[Series],
    *,
    level: Level | None = None,
    low: float | None = 0.0,
    high: float | None = None,
    end: float = 0,
    percent: bool = False,
) -> str:
    """Line chart over steps in a card of its own: up to `high` and `end`, or as far as the values go."""
    lines = [one for one in (_thin(one) for one in series) if len(one.x)]
    if not lines:
        return f'<div class="card"><h3>{escape(title)}</h3><p class="soft small">nothing was logged</p></div>'
    values = [value for line in lines for value in line.y] + ([level.y] if level else [])
    ticks = _ticks(min(values) if low is None else low, max(values) * 1.05 if high is None else high)
    end = max(end, *(max(line.x) for line in lines))
    across = _ticks(0, end, inside=True)
    end = max(end, across[-1])

    def at(x: float, y: float) -> tuple[float, float]:
        span = (ticks[-1] - ticks[0]) or 1
        return (
            LEFT + (WIDTH - LEFT - RIGHT) * x / (end or 1),
            HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (y - ticks[0]) / span,
        )

    parts = [_grid_line(at(0, tick)[1], _number(tick, percent)) for tick in ticks]
    parts += [_mark(at(tick, ticks[0])[0], _number(tick)) for tick in across]
    if level is not None:
        y = at(0, level.y)[1]
        parts.append(f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{WIDTH - RIGHT}" y="{y - 4:.1f}" text-anchor="end">{escape(level.text)}</text>')
    for line in lines:
        points = [at(x, y) for x, y in zip(line.x, line.y, strict=True)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline class="{line.colour}" points="{path}"/>')
        parts += [
            f'<circle class="{line.colour}" cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="var(--{line.colour})"/>'
            for x, y in (points if len(points) <= 20 else [])
        ]
    keys = "".join(f'<span class="key"><i class="{one.colour}"></i>{escape(one.name)}</span>' for one in lines)
    keys = f"<div>{keys}</div>" if len(lines) > 1 else ""
    return (
        f'<div class="card"><h3>{escape(title)}</h3>{keys}<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg></div>'
    )


def _grid_line(y: float, text: str) -> str:
    line = f'<line class="grid-line" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return f'{line}<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'


def _mark(x: float, text: str) -> str:
    return f'<text x="{x:.1f}" y="{HEIGHT - 10}" text-anchor="middle">{text}</text>'


def _thin(series: Series) -> Series:
    rows = [(x, y) for x, y in zip(series.x, series.y, strict=True) if y is not None and math.isfinite(y)]
    size = -(-len(rows) // POINTS) or 1
    chunks = [rows[at : at + size] for at in range(0, len(rows), size)]
    x, y = ([sum(row[side] for row in chunk) / len(chunk) for chunk in chunks] for side in (0, 1))
    return series._replace(x=x, y=y)


def _ticks(low: float, high: float, inside: bool = False) -> list[float]:
    span = high - low
    if span <= 0:
        return [low, low + 1]
    rough = span / 4
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough)
    first = math.floor(low / step)
    last = math.floor(high / step + 1e-9) if inside else math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def _number(value: float, percent: bool = False) -> str:
    if percent:
        return f"{value:g}%"
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    if abs(value) >= 1e4:
        return f"{value / 1e3:g}k"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:g}"
