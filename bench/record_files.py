"""Records of measurements: written with their circumstances, read again, made into tables.

A record is the subject, the environment it was measured in, the command that measured it, and rows; a JSON file holds
a list of them.
"""

from __future__ import annotations

import csv
import json
import re
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from fastmoco import atomic
from fastmoco.environment import commit, cores, moment, processor, versions

SCHEMA = 1
SHOWN = ("fastmoco", "torch", "triton", "nvidia-dali-cuda130")
RECORD_SCHEMA: dict[str, tuple[type, ...]] = {
    "schema": (int,),
    "subject": (str,),
    "rows": (list,),
    "environment": (dict,),
    "command": (str,),
    "date": (str,),
}
ROW_SCHEMA = {
    "name": (str,),
    "provider": (str,),
    "unit": (str,),
    "samples": (list,),
    "config": (dict,),
    "extra": (dict,),
    "baseline": (str, type(None)),
    "bound": (int, float, type(None)),
}
CSV_COLUMNS = (
    "subject",
    "device",
    "threads",
    "commit",
    "date",
    "name",
    "provider",
    "config",
    "unit",
    "better",
    "n",
    "median",
    "quantile 20 %",
    "quantile 80 %",
    "baseline",
    "bound",
)
BY_HOST = "the host"  # "launched by", of a row whose neighbours are CUDA graphs: its time may be that of the launches
COUNTS = ("MB", "calls", "tensors differ", "images differ")  # units
UNSTEADY = 0.25  # of the median: a row whose middle samples lie further apart says more about the machine
PAGE_HEAD = """# Records

Every committed measurement, from the JSON files in [bench/records](../bench/records); `fastmoco bench report` writes
this page. [benchmarks.md](benchmarks.md) says how to read a row. Each record was made by the command it names, on the
machine it names; only rows of the same table were measured in turn and may be compared."""
MARKED = (
    "Rows marked unsteady (20 % to 80 % span more than a quarter of the median) or over their bound (it was measured "
    "at another moment, or a cache held the data) should be measured again on a quiet machine."
)


@dataclass(frozen=True)
class Row:
    """One measured figure: `samples` in `unit` for `provider` of `name` under `config`."""

    name: str
    provider: str
    unit: str
    samples: tuple[float, ...]
    config: dict = field(default_factory=dict)
    baseline: str | None = None
    bound: float | None = None
    extra: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.samples:
            raise ValueError(f"row {self.name}/{self.provider} has no samples")

    @property
    def higher_is_better(self) -> bool:
        """Whether the unit is a rate (so much a second) rather than a time or a size."""
        return self.unit.endswith("/s")

    @property
    def is_count(self) -> bool:
        """Whether the value is a count, of bytes, say, which does not vary from sample to sample."""
        return self.unit in COUNTS

    @property
    def median(self) -> float:
        """Median of the samples."""
        return statistics.median(self.samples)

    @property
    def spread(self) -> tuple[float, float]:
        """The 20 % and the 80 % quantile of the samples, interpolated."""
        low, high = np.quantile(self.samples, (0.2, 0.8))
        return float(low), float(high)

    @property
    def unsteady(self) -> bool:
        """Whether the spread is more than a quarter of the median."""
        low, high = self.spread
        return high - low > UNSTEADY * self.median

    @property
    def share(self) -> float | None:
        """Share of the physical bound that was reached; None if the row has no bound.

        Above 1 where the machine was slower when its bound was measured, or where a cache held the data.
        """
        if self.bound is None:
            return None
        return self.median / self.bound if self.higher_is_better else self.bound / self.median

    @property
    def key(self) -> str:
        """What makes two rows of two records the same measurement."""
        return json.dumps([self.name, self.provider, self.unit, self.config], sort_keys=True)


@dataclass(frozen=True)
class Record:
    """Rows of one subject, and everything needed to read or repeat them."""

    subject: str
    rows: tuple[Row, ...]
    environment: dict
    command: str
    date: str
    schema: int = SCHEMA


def environment(device: str = "cpu") -> dict:
    """Device, its type, versions, commit, threads, time and load of the machine, now: ask before measuring.

    Clocks are left to those who measure: an idle card's say nothing.
    """
    return {
        "device": _device_name(device),
        "device_type": device.split(":")[0],
        "cores": cores(),
        "versions": versions(),
        "commit": commit(),
        "clocks": {},
        **moment(),
    }


def record(subject: str, rows: Sequence[Row], circumstances: dict, timing: str = "") -> Record:
    """A record of `rows` measured by this process today, under what `environment` said before it began.

    `timing` says how: warm-up and rounds. Beside what `environment` says, `circumstances` may hold "failed" (reasons,
    by what failed), "unfinished", and in "clocks" what `clocks.Clocks` summarises.
    """
    words = [word for word in sys.argv[1:] if word != "bench"]
    command = shlex.join(["fastmoco", "bench", *words])
    return Record(subject, tuple(rows), {**circumstances, "timing": timing}, command, date.today().isoformat())


def save(path: str | Path, records: Sequence[Record]) -> None:
    """Write `records` as JSON, or one line a row where the name ends in .csv; a file is replaced whole or not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic.replacing(path) as draft:
        if path.suffix == ".csv":
            _save_csv(draft, records)
        else:
            draft.write_text(json.dumps([asdict(item) for item in records], indent=1) + "\n")


def partial(path: str | Path) -> Path:
    """Where the record `path` is kept until it is finished: a.partial.json for a.json.

    A run that is stopped so leaves the record of an earlier one as it was.
    """
    path = Path(path)
    return path.with_name(f"{path.stem}.partial{path.suffix}")


def finish(path: str | Path, records: Sequence[Record]) -> None:
    """`save` finished `records`, in place of what `partial` holds of them."""
    save(path, records)
    partial(path).unlink(missing_ok=True)


def record_paths(folder: Path) -> list[Path]:
    """The records in `folder`. A .partial.json counts only if its finished file does not exist."""
    paths = sorted(folder.glob("*.json"))
    partials = {partial(path) for path in paths}
    return [path for path in paths if path not in partials]


def load(path: str | Path) -> list[Record]:
    """Read `save`'s JSON; ValueError that names the file and what is wrong where it is none of ours."""
    items = _json(path)
    if not isinstance(items, list) or not items:
        raise ValueError(f"{path}: holds no benchmark record")
    try:
        return [_record(item) for item in items]
    except ValueError as error:
        raise ValueError(f"{path}: holds no benchmark record ({error})") from None


def table(records: Sequence[Record]) -> str:
    """The records as Markdown: the circumstances of each, then a table for each comparison under its configuration."""
    return "\n\n".join(f"{_caption(item)}\n\n{_tables(item)}" for item in records)


def page(records: Sequence[Record]) -> str:
    """A page that holds all `records`, subject by subject, the newest first."""
    parts = [PAGE_HEAD]
    for subject in sorted({item.subject for item in records}):
        newest_first = sorted((item for item in records if item.subject == subject), key=lambda item: item.date)[::-1]
        parts += [f"## {subject}", table(newest_first)]
    return "\n\n".join(parts) + "\n"


def between_markers(text: str, inner: str) -> str:
    """`text` with `inner` between its two benchmark markers; raises ValueError if it has none."""
    pattern = re.compile(r"(<!-- bench -->\n).*?(<!-- /bench -->)", re.S)
    if not pattern.search(text):
        raise ValueError("the text has no <!-- bench --> ... <!-- /bench --> markers to write between")
    return pattern.sub(lambda match: match.group(1) + inner + "\n" + match.group(2), text)


def _tables(item: Record) -> str:
    parts = [f"{title}:\n\n{_rows(list(rows))}" for title, rows in groupby(item.rows, label)]
    if any(row.unsteady or _over(row.share) for row in item.rows):
        parts.append(MARKED)
    return "\n\n".join(parts)


def _rows(rows: Sequence[Row]) -> str:
    lines = ["| provider | median | 20 % to 80 % | n | against baseline | share of bound |"]
    lines.append("|---|---:|---:|---:|---:|---:|")
    medians: dict[str | None, float] = {row.provider: row.median for row in rows}
    for row in rows:
        lines.append(
            f"| {_provider(row)} | {quantity(row)} | {_spread(row)} | {len(row.samples)} | "
            f"{_against(row, medians.get(row.baseline))} | {_percent(row.share)} |"
        )
    return "\n".join([*lines, *_practical(rows)])


def _practical(rows: Sequence[Row]) -> list[str]:
    # Below the table: the bound, and the one with convolutions as fast as they are, where the record knows it.
    practical = [row for row in rows if row.extra.get("practical") and row.bound]
    if not practical:
        return []
    bounds = "; ".join(
        f"{row.provider} {_number(row.bound or 0)} and {_between(row.extra['practical'])}" for row in practical
    )
    assumed = " That rate is assumed: nothing is published of this GPU." * any(
        row.extra.get("assumed") for row in practical
    )
    what = "physical, and practical with convolutions at the rate that they reach"
    return ["", f"Bounds in pairs/s: {what}: {bounds}.{assumed}"]


def _between(values: Sequence[float]) -> str:
    low, high = _number(min(values)), _number(max(values))
    return low if low == high else f"{low} to {high}"


def _provider(row: Row) -> str:
    return row.provider + " (launched by the host)" * (row.extra.get("launched by") == BY_HOST)


def _against(row: Row, base: float | None) -> str:
    if not base or row.provider == row.baseline:
        return ""
    return f"{row.median / base if row.higher_is_better else base / row.median:.2f} x {row.baseline}"


def _spread(row: Row) -> str:
    low, high = row.spread
    return f"{_number(low)} to {_number(high)}" + (", unsteady" if row.unsteady else "")


def matches(name: str, words: str) -> bool:
    """Whether one of `words`, separated by commas, stands in `name`; true where there are none."""
    terms = [word.strip() for word in words.split(",") if word.strip()]
    return not terms or any(word in name for word in terms)


def label(row: Row) -> str:
    """What was measured, with its configuration."""
    config = ", ".join(f"{name} {value}" for name, value in row.config.items())
    return f"{row.name} ({config})" if config else row.name


def quantity(row: Row) -> str:
    """The median with its unit."""
    return f"{_number(row.median)} {row.unit}"


def _caption(item: Record) -> str:
    env = item.environment
    versions = ", ".join(f"{name} {env['versions'][name]}" for name in SHOWN)
    how = f" ({env['timing']})" if env.get("timing") else ""
    line = (
        f"**{item.subject}** on {_where(env)}, {item.date}, {versions}, commit {env['commit']}: `{item.command}`{how}"
    )
    return "\n".join([line, *_remarks(env)])


def _remarks(env: dict) -> list[str]:
    lines = []
    clocks = env.get("clocks", {})
    if clocks.get("samples"):
        sm, memory, power = (clocks[name] for name in ("sm_mhz", "memory_mhz", "power_w"))
        count, limit = clocks["samples"], clocks.get("power_limit_w")
        lines.append(
            f"{count} sample{'s' * (count > 1)}: {sm['median']:,.0f} MHz (least {sm['minimum']:,.0f}), memory "
            f"{memory['median']:,.0f} MHz, {power['median']:.0f} W (most {power['maximum']:.0f}"
            f"{f' of {limit:.0f}' if limit else ''}), throttled by: {', '.join(clocks['throttled']) or 'nothing'}"
        )
    lines += [f"{what} failed: {why}" for what, why in env.get("failed", {}).items()]
    if env.get("unfinished"):
        lines.append("Stopped before its end: these are the rows that were finished.")
    return [f"\n{line}" for line in lines]


def _where(env: dict) -> str:
    facts = [f"{env['cores']} cores"]
    if "threads" in env:  # records of before know neither
        facts.append(f"{env['threads']} thread{'s' if env['threads'] != 1 else ''}")
    if env.get("load") is not None:
        facts.append(f"load {env['load']:.2f} a core at the start")
    return f"{env['device']} ({', '.join(facts)})"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %" + (", over" if _over(share) else "")


def _over(share: float | None) -> bool:
    return share is not None and round(100 * share) > 100


def _save_csv(path: Path, records: Sequence[Record]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(CSV_COLUMNS)
        for item in records:
            facts = [item.environment.get(name) for name in ("device", "threads", "commit")]
            for row in item.rows:
                prefix = [item.subject, *facts, item.date, row.name, row.provider, json.dumps(row.config), row.unit]
                better = "higher" if row.higher_is_better else "lower"
                writer.writerow([*prefix, better, len(row.samples), row.median, *row.spread, row.baseline, row.bound])


def _json(path: str | Path) -> object:
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError:  # of the JSON, or of the text's encoding
        raise ValueError(f"{path}: not JSON") from None


def _record(item: Any) -> Record:
    _check("record", item, RECORD_SCHEMA)
    if item["schema"] != SCHEMA:
        raise ValueError(f"its schema is {item['schema']}, and this version reads {SCHEMA}")
    for row in item["rows"]:
        _check("row", row, ROW_SCHEMA)
        if not all(isinstance(sample, (int, float)) for sample in row["samples"]):
            raise ValueError(f"samples of {row['name']} are not all numbers")
    rows = tuple(Row(**{**row, "samples": tuple(row["samples"])}) for row in item["rows"])
    return Record(**{**item, "rows": rows})


def _check(what: str, item: object, schema: Mapping[str, tuple[type, ...]]) -> None:
    if not isinstance(item, dict):
        raise ValueError(f"a {what} is no object")
    if set(item) != set(schema):
        raise ValueError(f"a {what} has {', '.join(sorted(set(item) ^ set(schema)))} too few or too many")
    for name, types in schema.items():
        if not isinstance(item[name], types):
            raise ValueError(f"{name} of a {what} is {item[name]!r}")


def _device_name(device: str) -> str:
    if not device.startswith("cuda"):
        return processor()
    import torch

    return torch.cuda.get_device_name(device)
