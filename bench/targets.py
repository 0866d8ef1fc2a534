"""What the project set out to reach on one GPU, beside what the records at hand show: met, missed or not measured.

Nothing is guessed: what stands in no record, or was measured at another size or on another GPU, was not measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from fastmoco.bench.proof import EAGER, EQUAL, GRAPH, OTHER, READ, READS, REPLAYED, WAITS
from fastmoco.bench.report import Record, Row
from fastmoco.bench.roofline import BY_FUSION

OURS, OURS_KEY = "fastmoco bf16", "fastmoco bf16, fused key encoder"
PUBLISHED, CHANNELS_LAST = "published fp16 autocast", "channels-last fp16 autocast"
ARCH, PIXELS, LARGE, SMALL = "resnet50", 224, 256, 32
RATES = {"floor": 3600, "good": 4400, "aim": 5400}  # pairs/s
RATES_OF = "H100"
STEPS, WATCHED = 20, 100

ABSENT = "not measured"


class Target(NamedTuple):
    """One line: what is asked for, how much of it, what was measured, and the verdict."""

    what: str
    wanted: str
    measured: str = "-"
    verdict: str = ABSENT


def table(records: Sequence[Record]) -> str:
    """The targets as a Markdown table, and what is known of the levels of fusion."""
    lines = ["| target | wanted | measured | verdict |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(target)} |" for target in targets(records)]
    return "\n".join([*lines, "", *levels(records)])


def targets(records: Sequence[Record]) -> list[Target]:
    """Every target, in the order in which the project states them."""
    large, small = (_rows(records, "step", OURS, batch) for batch in (LARGE, SMALL))
    return [
        _ratio(large, PUBLISHED, 2.2, LARGE),
        _ratio(large, CHANNELS_LAST, 1.45, LARGE),
        _ratio(small, PUBLISHED, 3.0, SMALL),
        _share(large),
        *_rates(records),
        _equal(_rows(records, EQUAL, GRAPH)),
        _waits(_rows(records, WAITS, REPLAYED)),
    ]


def levels(records: Sequence[Record]) -> list[str]:
    """Lines on the fusion that was reached and on the bounds of the next levels, or on that none was timed."""
    rows = _rows(records, "step", OURS)
    reached = [rows[name] for name in (OURS, OURS_KEY) if name in rows]
    if not reached:
        return ["Level of fusion: not measured."]
    lines = [
        f"Level of fusion {row.extra['level']} ({row.provider}): {row.median:,.0f} of at most {row.bound:,.0f} pairs/s "
        f"({row.share:.0%})."
        for row in reached
    ]
    last = reached[-1]
    after = BY_FUSION[BY_FUSION.index(last.extra["level"]) + 1 :]
    bounds = last.extra["bounds"]
    following = ", ".join(f"{name} at most {bounds[name]:,.0f} pairs/s" for name in after if name in bounds)
    return [*lines, f"What more fusion could bring, by roofline.py on this machine: {following}."]


def _ratio(rows: dict[str, Row], baseline: str, wanted: float, batch: int) -> Target:
    what, asked = f"{OURS} against {baseline}, {batch} pairs", f"{wanted:g} x"
    if not {OURS, baseline} <= rows.keys():
        return Target(what, asked)
    ratio = rows[OURS].median / rows[baseline].median
    return Target(what, asked, f"{ratio:.2f} x", _verdict(ratio >= wanted))


def _share(rows: dict[str, Row]) -> Target:
    what, asked = f"{OURS}, share of the bound of its fusion, {LARGE} pairs", "65 %"
    if OURS not in rows:
        return Target(what, asked)
    row = rows[OURS]
    return Target(what, asked, f"{row.share:.1%} of {row.bound:,.0f} pairs/s", _verdict(row.share >= 0.65))


def _rates(records: Sequence[Record]) -> Iterator[Target]:
    rows = _rows([item for item in records if RATES_OF in item.environment["device"]], "step", OURS)
    for name, wanted in RATES.items():
        target = Target(f"{OURS} on one {RATES_OF}, {LARGE} pairs: {name}", f"{wanted:,} pairs/s")
        if OURS in rows:
            rate = rows[OURS].median
            target = target._replace(measured=f"{rate:,.0f} pairs/s", verdict=_verdict(rate >= wanted))
        yield target


def _equal(rows: dict[str, Row]) -> Target:
    target = Target("replayed steps equal eager ones bit for bit", f"0 tensors differ after {STEPS} steps")
    if not {EAGER, GRAPH, OTHER} <= rows.keys():
        return target
    again, graph, other = (rows[name].median for name in (EAGER, GRAPH, OTHER))
    steps = rows[GRAPH].config["steps"]
    measured = f"{graph:.0f} differ after {steps}"
    if again:
        measured += f"; so do {again:.0f} between two eager runs, by {rows[EAGER].extra['largest']:.3g} at most"
    # Without its control or over fewer steps equality shows nothing; a difference does, unless eager runs differ too.
    shown = (graph or steps >= STEPS) and other and not again
    return target._replace(measured=measured, verdict=_verdict(not graph) if shown else ABSENT)


def _waits(rows: dict[str, Row]) -> Target:
    target = Target("waits of the host in a profile", f"0 in {WATCHED} steps")
    if not {REPLAYED, READ} <= rows.keys():
        return target
    found, steps = rows[REPLAYED].median, rows[REPLAYED].config["steps"]
    shown = (found or steps >= WATCHED) and rows[READ].median >= READS
    return target._replace(measured=f"{found:.0f} in {steps}", verdict=_verdict(not found) if shown else ABSENT)


def _rows(records: Sequence[Record], name: str, provider: str, batch: int = LARGE) -> dict[str, Row]:
    # By provider, of one record, the first with `provider`: only what was timed in turn may be compared.
    size = (ARCH, PIXELS, batch)
    for item in records:
        rows = [row for row in item.rows if row.name == name and row.unit != "MB"]
        found = {row.provider: row for row in rows if tuple(row.config[key] for key in ("arch", "px", "batch")) == size}
        if provider in found:
            return found
    return {}


def _verdict(met: bool) -> str:
    return "met" if met else "missed"
