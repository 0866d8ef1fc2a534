"""`bench compare`: of every row that two files share, whether B is slower or faster than A, the same, or unclear.

The cost of a row is its time per unit of work, or the value itself where lower is better. Verdicts rest on a bootstrap
of the ratio of median costs B / A.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from fastmoco.bench.record_files import Record, Row, label, quantity

TOLERANCE = 0.03  # a change smaller than this is not worth a verdict, however certain
MARGIN = 0.05  # same: the whole interval lies within this of no change
# With three samples against three, one of the two lies wholly above the other by chance one time in ten (2 / C(6, 3));
# with five, one time in 126. A bootstrap of three is little more than their extremes.
FEWEST = 5
MEANING = (
    "cost B / A: time per unit of work, or the value itself where lower is better; above 1, B is slower. "
    f"same: the interval within {100 * MARGIN:.0f} % of 1; slower, faster: all of it beyond {100 * TOLERANCE:.0f} %, "
    f"from at least {FEWEST} samples in both (of counts, which do not vary, more or less from one); else unclear."
)
ABSENT = "not recorded"


@dataclass(frozen=True)
class Change:
    """How one row moved: the ratio of costs B / A with its 95 % interval, and what that means."""

    before: Row
    after: Row
    ratio: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """slower, faster (of counts: more, less), same or unclear; "unclear: n < 5" where samples are too few."""
        if min(len(self.before.samples), len(self.after.samples)) < FEWEST and not self.after.is_count:
            return f"unclear: n < {FEWEST}"
        if self.low > 1 + TOLERANCE:
            return "more" if self.after.is_count else "slower"
        if self.high < 1 - TOLERANCE:
            return "less" if self.after.is_count else "faster"
        return "same" if 1 - MARGIN <= self.low and self.high <= 1 + MARGIN else "unclear"


def compare(before: Sequence[Record], after: Sequence[Record], draws: int = 2000) -> list[Change]:
    """Every row that stands in both, with the bootstrapped ratio of its cost."""
    old = {row.key: row for item in before for row in item.rows}
    both = [(old[row.key], row) for item in after for row in item.rows if row.key in old]
    return [_change(a, b, draws) for a, b in both]


def report(a: str, before: Sequence[Record], b: str, after: Sequence[Record]) -> str:
    """What `bench compare` prints of the files `a` and `b`; raises ValueError if they share no row."""
    changes = compare(before, after)
    if not changes:
        raise ValueError(
            f"no row stands in both files: A, {a}, holds {_contents(before)}. B, {b}, holds {_contents(after)}"
        )
    head = [f"A: {a}, {_origin(before)}; B: {b}, {_origin(after)}", *differences(before, after)]
    return "\n".join([*head, MEANING, "", *_lines(changes), *_alone(before, after)])


def differences(before: Sequence[Record], after: Sequence[Record]) -> list[str]:
    """One line for each fact about the environment that is not the same in both."""
    a, b = _facts(before), _facts(after)
    return [
        f"{name}: {a.get(name, ABSENT)} in A, {b.get(name, ABSENT)} in B"
        for name in {**a, **b}
        if a.get(name, ABSENT) != b.get(name, ABSENT)
    ]


def _lines(changes: Sequence[Change]) -> list[str]:
    lines = ["| what | provider | A | B | cost B / A | 95 % interval | verdict |", "|---|---|---:|---:|---:|---:|---|"]
    for item in changes:
        row = item.after
        medians = " | ".join(f"{quantity(side)} (n = {len(side.samples)})" for side in (item.before, row))
        ratio = f"{item.ratio:.3f} | {item.low:.3f} to {item.high:.3f}"
        lines.append(f"| {label(row)} | {row.provider} | {medians} | {ratio} | {item.verdict} |")
    return lines


def _alone(before: Sequence[Record], after: Sequence[Record]) -> list[str]:
    contents = [
        {f"{label(row)} by {row.provider}": 0 for item in side for row in item.rows} for side in (before, after)
    ]
    lines = []
    for name, mine, other in (("A", *contents), ("B", *reversed(contents))):
        alone = [what for what in mine if what not in other]
        lines += ["", f"only in {name}: {'; '.join(alone)}"] if alone else []
    return lines


def _change(a: Row, b: Row, draws: int) -> Change:
    if a.is_count and 0 in (a.median, b.median):
        ratio = 1.0 if a.median == b.median else float("inf") if b.median else 0.0
        return Change(a, b, ratio, ratio, ratio)
    rng = np.random.default_rng(0)
    ratios = _medians(_costs(b), draws, rng) / _medians(_costs(a), draws, rng)
    low, high = np.quantile(ratios, (0.025, 0.975))
    return Change(a, b, float(np.median(_costs(b)) / np.median(_costs(a))), float(low), float(high))


def _medians(samples: np.ndarray, draws: int, rng: np.random.Generator) -> np.ndarray:
    return np.median(rng.choice(samples, (draws, len(samples))), axis=1)


def _costs(row: Row) -> np.ndarray:
    return 1 / np.array(row.samples) if row.higher_is_better else np.array(row.samples)


def _contents(records: Sequence[Record]) -> str:
    providers: dict[str, list[str]] = {}
    for row in (row for item in records for row in item.rows):
        providers.setdefault(label(row), []).append(row.provider)
    return "; ".join(f"{what} by {' / '.join(names)}" for what, names in providers.items()) or "no rows"


def _origin(records: Sequence[Record]) -> str:
    commits = _join(item.environment.get("commit", ABSENT) for item in records)
    dates = _join(f"{item.date} {item.environment.get('time', '')}".strip() for item in records)
    unfinished = ", unfinished" if any(item.environment.get("unfinished") for item in records) else ""
    return f"commit {commits}, {dates}{unfinished}"


def _facts(records: Sequence[Record]) -> dict[str, str]:
    each = [_describe(item.environment) for item in records]
    return {name: _join(facts.get(name, ABSENT) for facts in each) for facts in each for name in facts}


def _describe(env: dict) -> dict[str, object]:
    facts = {name: env[name] for name in ("device", "cores", "threads") if name in env}
    if "omp_num_threads" in env:
        facts["OMP_NUM_THREADS"] = env["omp_num_threads"] or "not set"
    if env.get("load") is not None:
        facts["load a core at the start"] = f"{env['load']:.1f}"
    if "driver" in env.get("clocks", {}):
        facts["driver"] = env["clocks"]["driver"]
    return facts | env.get("versions", {})


def _join(values: Iterable[object]) -> str:
    return " / ".join(dict.fromkeys(map(str, values)))
