"""What the project set out to reach on one GPU, beside what the records at hand show: met, missed or not measured.

Nothing is guessed: what stands in no record of a GPU, or was measured at another size, on another GPU or too seldom,
was not measured; nor was a rate that is more than its bound allows, since one of the two is wrong. And where the step's
own tests fail, no measurement of it proves anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from fastmoco.bench.comparison import FEWEST
from fastmoco.bench.proof import EAGER, EQUAL, GRAPH, OTHER, READ, READS, REPLAYED, WAITS
from fastmoco.bench.record_files import Record, Row
from fastmoco.bench.roofline import LEVELS

OURS = "fastmoco bf16"
DETERMINISTIC, CHEAP = "fastmoco bf16, deterministic", 0.02  # below so much it should be the default
PUBLISHED, CHANNELS_LAST = "published fp16 autocast", "channels-last fp16 autocast"
ARCH, PIXELS, LARGE, SMALL = "resnet50", 224, 256, 32
# What is asked for. How many times as fast as a baseline of the same run, by pairs in a batch.
RATIOS = ((LARGE, PUBLISHED, 2.2), (LARGE, CHANNELS_LAST, 1.45), (SMALL, PUBLISHED, 3.0))
SHARE = 0.65  # of the bound of the fusion that was reached
# Pairs a second. The aims are what the kernels of MLPerf Training v4.0 would give at MoCo's mix of forward and backward
# (7,159 images a second on an H100, 7,945 on an H200); an H200's other two stand to its aim as an H100's do.
RATES = {
    "H100": {"floor": 3600, "good": 4400, "aim": 5400},
    "H200": {"floor": 4100, "good": 5000, "aim": 6120},
}
STEPS, WATCHED = 20, 100
PRECISION = "bf16"  # that the proofs must be of

MET, MISSED, ABSENT, UNPROVEN = "met", "missed", "not measured", "not proven"
PASSED = "passed"


class Target(NamedTuple):
    """One line: what is asked for, how much of it, what was measured, and the verdict."""

    what: str
    wanted: str
    measured: str = "-"
    verdict: str = ABSENT


class RecordRows(NamedTuple):
    """Rows of one record by provider, and whether it was finished."""

    rows: dict[str, Row]
    finished: bool = True

    def sound(self, *providers: str) -> bool:
        """Whether a verdict may rest on `providers`: enough samples of each, and none above its bound."""
        return self._fewest(providers) >= FEWEST and not self._over(providers)

    def note(self, *providers: str) -> str:
        """How many samples stand behind a figure of `providers`, and what speaks against it."""
        few, over = self._fewest(providers) < FEWEST, self._over(providers)
        doubts = {"too few": few, "above its bound: one of the two is wrong": over, "unfinished": not self.finished}
        return f"({', '.join([f'n = {self._fewest(providers)}', *(word for word, so in doubts.items() if so)])})"

    def _fewest(self, providers: Sequence[str]) -> int:
        return min(len(self.rows[name].samples) for name in providers)

    def _over(self, providers: Sequence[str]) -> bool:
        return any((self.rows[name].share or 0) > 1 for name in providers)


def table(records: Sequence[Record], gate: str = PASSED) -> str:
    """The targets as a Markdown table, and what is known of the levels of fusion.

    `gate` says how the tests of the step ended. Unless they passed, what was measured proves nothing.
    """
    results, lines = targets(records), []
    if gate != PASSED:
        results = [item if item.verdict == ABSENT else item._replace(verdict=UNPROVEN) for item in results]
        lines += [f"The gate's tests did not pass ({gate}): nothing below is proven, whatever was measured.", ""]
    lines += ["| target | wanted | measured | verdict |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(target)} |" for target in results]
    return "\n".join([*lines, "", *levels(records)])


def targets(records: Sequence[Record]) -> list[Target]:
    """Every target, in the order in which the project states them."""
    steps = {batch: _record_with(records, "step", OURS, batch) for batch in (LARGE, SMALL)}
    return [
        *(_ratio(steps[batch], baseline, wanted, batch) for batch, baseline, wanted in RATIOS),
        _share(steps[LARGE]),
        *_rates(records),
        _equal(_record_with(records, EQUAL, GRAPH, precision=PRECISION, deterministic="on")),
        _waits(_record_with(records, WAITS, REPLAYED, precision=PRECISION)),
    ]


def levels(records: Sequence[Record]) -> list[str]:
    """Lines on the fusion that was reached and on the bounds of the next levels, or on that none was timed; and on what
    deterministic algorithms cost."""
    record = _record_with(records, "step", OURS)
    if OURS not in record.rows:
        return ["Level of fusion: not measured."]
    row = record.rows[OURS]
    level, bounds = row.extra["level"], row.extra["bounds"]
    after = LEVELS[LEVELS.index(level) + 1 :]
    following = ", ".join(f"{name} at most {bounds[name]:,.0f} pairs/s" for name in after if name in bounds)
    return [
        f"Level of fusion {level} ({OURS}): {row.median:,.0f} of at most {row.bound:,.0f} pairs/s "
        f"({row.share:.0%}) {record.note(OURS)}.",
        *_deterministic(record),
        f"What more fusion could bring, by roofline.py on this machine: {following}.",
    ]


def _deterministic(record: RecordRows) -> Iterator[str]:
    if DETERMINISTIC not in record.rows:
        return
    cost = 1 - record.rows[DETERMINISTIC].median / record.rows[OURS].median
    verdict = f"{'under' if cost < CHEAP else 'not under'} {100 * CHEAP:g} %"
    yield f"--deterministic on costs {100 * cost:.1f} %: {verdict} {record.note(OURS, DETERMINISTIC)}."


def _ratio(record: RecordRows, baseline: str, wanted: float, batch: int) -> Target:
    target = Target(f"{OURS} against {baseline}, {batch} pairs", f"{wanted:g} x")
    if not {OURS, baseline} <= record.rows.keys():
        return target
    ratio = record.rows[OURS].median / record.rows[baseline].median
    measured = f"{ratio:.2f} x {record.note(OURS, baseline)}"
    return target._replace(measured=measured, verdict=_verdict(ratio >= wanted, record.sound(OURS, baseline)))


def _share(record: RecordRows) -> Target:
    target = Target(f"{OURS}, share of the bound of its fusion, {LARGE} pairs", f"{100 * SHARE:g} %")
    if OURS not in record.rows:
        return target
    row = record.rows[OURS]
    assert row.share is not None, "the step has a bound"
    measured = f"{row.share:.1%} of {row.bound:,.0f} pairs/s {record.note(OURS)}"
    return target._replace(measured=measured, verdict=_verdict(row.share >= SHARE, record.sound(OURS)))


def _rates(records: Sequence[Record]) -> Iterator[Target]:
    of = next((name for name in RATES for item in records if name in item.environment["device"]), next(iter(RATES)))
    record = _record_with([item for item in records if of in item.environment["device"]], "step", OURS)
    for name, wanted in RATES[of].items():
        target = Target(f"{OURS} on one {of}, {LARGE} pairs: {name}", f"{wanted:,} pairs/s")
        if OURS in record.rows:
            rate = record.rows[OURS].median
            measured = f"{rate:,.0f} pairs/s {record.note(OURS)}"
            target = target._replace(measured=measured, verdict=_verdict(rate >= wanted, record.sound(OURS)))
        yield target


def _equal(record: RecordRows) -> Target:
    target = Target("replayed steps equal eager ones bit for bit", f"0 tensors differ after {STEPS} steps")
    if not {EAGER, GRAPH, OTHER} <= record.rows.keys():
        return target
    again, graph, other = (record.rows[name].median for name in (EAGER, GRAPH, OTHER))
    steps = record.rows[GRAPH].config["steps"]
    measured = f"{graph:.0f} differ after {steps}" + _remark(record)
    if again:
        largest = record.rows[EAGER].extra["largest"]
        measured += f"; so do {again:.0f} between two eager runs, by {largest:.3g} at most"
    # Without its control or over fewer steps equality shows nothing; a difference does, unless eager runs differ too.
    proves = (graph or steps >= STEPS) and other and not again
    return target._replace(measured=measured, verdict=_verdict(not graph, proves))


def _waits(record: RecordRows) -> Target:
    target = Target("waits of the host in a profile", f"0 in {WATCHED} steps")
    if not {REPLAYED, READ} <= record.rows.keys():
        return target
    waits, steps = record.rows[REPLAYED].median, record.rows[REPLAYED].config["steps"]
    proves = (waits or steps >= WATCHED) and record.rows[READ].median >= READS
    return target._replace(measured=f"{waits:.0f} in {steps}" + _remark(record), verdict=_verdict(not waits, proves))


def _record_with(records: Sequence[Record], name: str, provider: str, batch: int = LARGE, **config: str) -> RecordRows:
    # Of one record, the first with `provider`: only what was timed in turn may be compared.
    wanted = {"arch": ARCH, "px": PIXELS, "batch": batch, **config}
    for item in records:
        if item.environment.get("device_type") != "cuda":
            continue
        rows = [row for row in item.rows if row.name == name and row.unit != "MB"]
        by_provider = {row.provider: row for row in rows if wanted.items() <= row.config.items()}
        if provider in by_provider:
            return RecordRows(by_provider, not item.environment.get("unfinished"))
    return RecordRows({})


def _remark(record: RecordRows) -> str:
    return "" if record.finished else " (unfinished)"


def _verdict(met: bool, proves: object) -> str:
    return ABSENT if not proves else MET if met else MISSED
