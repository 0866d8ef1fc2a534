"""Parts of a self-contained HTML page: style, tables, tiles, pictures and line charts. No script, no request."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from fastmoco import plots
from fastmoco.plots import Series

CHART = 5.8, 3.2  # inches: an SVG of 418 x 230 points

STYLE = """
:root { --ink: #1d2430; --soft: #616b7a; --line: #e3e7ed; --card: #fff; --back: #f5f6f8;
  --a: #2f6db5; --b: #dd8452; --c: #3a8a5f; color-scheme: light dark; }
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
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--ink); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
td, th { text-align: left; padding: 5px 12px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 500; } tr:last-child td { border-bottom: 0; }
td { overflow-wrap: anywhere; } td:first-child, .figures td { white-space: nowrap; } td.changed { font-weight: 650; }
@media (max-width: 600px) { .figures, .figures tbody, .figures tr, .figures td { display: block; }
  .figures tr { padding: 6px 0; border-bottom: 1px solid var(--line); } .figures tr:first-child { display: none; }
  .figures tr:last-child { border-bottom: 0; } .figures td { border: 0; padding: 2px 0; white-space: normal; }
  .figures td[data-of]::before { content: attr(data-of) ": "; color: var(--soft); } }
code { font: 13px ui-monospace, "Liberation Mono", Menlo, monospace; overflow-wrap: anywhere; }
"""


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


def table(rows: Iterable[Sequence[object]], head: Sequence[str] = (), highlights: Iterable[object] = ()) -> str:
    """A table; rows whose first cell is in `highlights` stand out. One with a `head` is a list on a narrow screen."""
    strong = set(highlights)
    top = f"<tr>{''.join(f'<th>{escape(name)}</th>' for name in head)}</tr>" if head else ""
    lines = []
    for first, *rest in rows:
        mark = ' class="changed"' if first in strong else ""
        names = head[1:] or [""] * len(rest)
        of = (f' data-of="{escape(name)}"' if name else "" for name in names)  # shown where columns find no room
        cells = "".join(f"<td{mark}{name}>{escape(str(cell))}</td>" for cell, name in zip(rest, of, strict=True))
        lines.append(f'<tr><td class="soft">{escape(str(first))}</td>{cells}</tr>')
    figures = ' class="figures"' if head else ""
    return f'<div class="card scroll"><table{figures}>{top}{"".join(lines)}</table></div>'


def picture(data: bytes, kind: str, alt: str, caption: str = "") -> str:
    """A picture whose bytes stand in the page; `kind` is png or jpeg."""
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return f'<figure><img src="{source}" alt="{escape(alt)}">{below}</figure>'


def chart(title: str, series: Sequence[Series], **options: Any) -> str:
    """Line chart over steps in a card of its own; `options` are those of `plots.line_chart`."""
    if not any(len(plots.thin(one).x) for one in series):
        return f'<div class="card"><h3>{escape(title)}</h3><p class="soft small">nothing was logged</p></div>'
    drawing = plots.figure(*CHART)
    plots.line_chart(drawing.subplots(), title, series, **options)
    return f'<div class="card">{plots.svg(drawing, escape(title))}</div>'
