"""The rows of the README's first table: the newest record of each, beside what others reach in the same run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from fastmoco.bench.record_files import Record, Row, quantity

GPU_CHECK = "| | `python -m fastmoco.bench gpu-check` |"


class Headline(NamedTuple):
    """One row: which measurement, of whom, beside whom."""

    what: str
    name: str
    config: Mapping[str, object]
    ours: str
    others: Sequence[str]
    """Providers of the same record; the first is the one to compare with."""


PUBLISHED = {"cpu": "published bf16 autocast", "cuda": "published fp16 autocast"}
PLAIN = {"cpu": "channels-last bf16 autocast", "cuda": "channels-last fp16 autocast"}


def headlines(kind: str) -> tuple[Headline, ...]:
    """The rows for a kind of device, "cpu" or "cuda"."""
    resnet50 = {"arch": "resnet50", "px": 224}
    step = Headline(
        "training step, ResNet-50, 224 px, bf16",
        "step",
        resnet50,
        "fastmoco bf16",
        (PUBLISHED[kind], "published fp32", PLAIN[kind]),
    )
    loader = Headline("loader, two 224 px crops", "loader", {"px": 224}, "fastmoco", ("Pillow, NumPy",))
    return (step, loader) if kind == "cpu" else (step,)


def table(records: Mapping[Path, Sequence[Record]], root: Path) -> str:
    """The rows as Markdown; links to records are relative to `root`. What no record shows is "not measured yet"."""
    lines = ["| | hardware | fastmoco | others, same run | record |", "|---|---|---:|---|---|"]
    for kind in ("cpu", "cuda"):
        for headline in headlines(kind):
            lines.append(_line(headline, kind, records, root))
    return "\n".join(lines)


def _line(headline: Headline, kind: str, records: Mapping[Path, Sequence[Record]], root: Path) -> str:
    newest = _newest(headline, kind, records)
    if newest is None:
        where = "one GPU" if kind == "cuda" else "CPU"
        return f"| {headline.what} | {where} | **not measured yet** {GPU_CHECK}"
    path, record, rows = newest
    others = "; ".join(f"{name}: {quantity(rows[name])}" for name in headline.others if name in rows)
    env = record.environment
    where = env["device"] if kind == "cuda" else f"{env['device']}, {env['cores']} cores"
    link = f"[{record.date}]({path.relative_to(root).as_posix()})"
    return f"| {headline.what} | {where} | **{quantity(rows[headline.ours])}** | {others} | {link} |"


def _newest(
    headline: Headline, kind: str, records: Mapping[Path, Sequence[Record]]
) -> tuple[Path, Record, dict[str, Row]] | None:
    matches = []
    for path, items in records.items():
        for record in items:
            if record.environment.get("device_type", "cpu") != kind or record.environment.get("unfinished"):
                continue
            rows = {row.provider: row for row in record.rows if _fits(row, headline)}
            if headline.ours in rows:
                matches.append((record.date, path.name, path, record, rows))
    return max(matches, key=lambda match: match[:2])[2:] if matches else None


def _fits(row: Row, headline: Headline) -> bool:
    return row.name == headline.name and row.unit == "pairs/s" and headline.config.items() <= row.config.items()
