"""Words and tables for a terminal: counts in the singular or the plural, Markdown tables fit to its width."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Sequence
from itertools import groupby
from typing import TextIO

GAP = "  "
LEAST = 6  # columns that a cell keeps


def counted(count: int, one: str, many: str = "") -> str:
    """The number with its noun: "1 file", "0 files"; `many` is the plural where that is not `one` with an s."""
    return f"{count} {one if count == 1 else many or one + 's'}"


def lay_out(markdown: str, stream: TextIO | None = None) -> str:
    """The text for `stream` (stdout): as it is for a file or a pipe, fit to a terminal's width for people."""
    stream = stream or sys.stdout
    return fit(markdown, shutil.get_terminal_size().columns) if stream.isatty() else markdown


def fit(markdown: str, width: int) -> str:
    """The text in lines of at most `width` characters, as far as there is room for LEAST characters a cell."""
    lines: list[str] = []
    for is_table, group in groupby(markdown.splitlines(), lambda line: line.startswith("|")):
        if is_table:
            lines += _table([[cell.strip() for cell in line.strip("|").split("|")] for line in group], width)
        else:
            lines += [part for line in group for part in textwrap.wrap(line, width) or [""]]
    return "\n".join(lines)


def _table(rows: Sequence[Sequence[str]], width: int) -> list[str]:
    head, rule, *body = rows
    to_the_right = [cell.endswith(":") for cell in rule]
    cells = [list(row) + [""] * (len(head) - len(row)) for row in (head, *body)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    while sum(widths) + len(GAP) * (len(widths) - 1) > width and max(widths) > LEAST:
        widths[widths.index(max(widths))] -= 1
    lines = [line for row in cells for line in _row(row, widths, to_the_right)]
    under = len(_row(head, widths, to_the_right))
    return [*lines[:under], GAP.join("-" * each for each in widths), *lines[under:]]


def _row(row: Sequence[str], widths: Sequence[int], to_the_right: Sequence[bool]) -> list[str]:
    parts = [textwrap.wrap(cell, room) or [""] for cell, room in zip(row, widths, strict=True)]
    lines = []
    for number in range(max(map(len, parts))):
        texts = [part[number] if number < len(part) else "" for part in parts]
        placed = (
            text.rjust(room) if right else text.ljust(room)
            for text, room, right in zip(texts, widths, to_the_right, strict=True)
        )
        lines.append(GAP.join(placed).rstrip())
    return lines
