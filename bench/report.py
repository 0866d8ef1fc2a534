"""Records of measurements: written with their circumstances, compared with bootstrap intervals, made into tables.

A record is one JSON file: the subject, the environment it was measured in, the command that measured it, and rows.
`compare` says of each row that two records share whether B is slower or faster than A; `readme` replaces what stands
between two markers in a text with the tables of the committed records.
"""

from __future__ import annotations

import csv
import json
import re
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path

import numpy as np

from fastmoco.environment import commit, cores, processor, versions

SCHEMA = 1
SHOWN = ("fastmoco", "torch", "triton", "nvidia-dali-cuda130")
RECORD_SCHEMA = {"subject": (str,), "rows": (list,), "environment": (dict,), "command": (str,), "date": (str,)}
ROW_SCHEMA = {
    "name": (str,), "provider": (str,), "unit": (str,), "samples": (list,), "config": (dict,), "extra": (dict,),
    "baseline": (str, type(None)), "bound": (int, float, type(None)),
}  # fmt: skip
TOLERANCE = 0.03  # a change smaller than this is not worth a verdict, however certain


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
    def median(self) -> float:
        """Median of the samples."""
        return statistics.median(self.samples)

    @property
    def share(self) -> float | None:
        """Share of the physical bound that was reached, from 0 to 1; None where the row has no bound."""
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
    """Device, clocks, versions and commit of this measurement."""
    return {
        "device": _device_name(device),
        "cores": cores(),
        "versions": versions(),
        "commit": commit(),
        "clocks": _clocks() if device.startswith("cuda") else {},
    }


def record(subject: str, rows: Sequence[Row], device: str = "cpu", timing: str = "") -> Record:
    """A record of `rows` measured by this process, now; `timing` says how: warm-up and rounds."""
    words = [word for word in sys.argv[1:] if word != "bench"]
    command = shlex.join(["fastmoco", "bench", *words])
    facts = {**environment(device), "timing": timing}
    return Record(subject, tuple(rows), facts, command, date.today().isoformat())


def save(path: str | Path, records: Sequence[Record]) -> None:
    """Write `records` as JSON, or one line a row where the name ends in .csv."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        return _save_csv(path, records)
    path.write_text(json.dumps([asdict(item) for item in records], indent=1) + "\n")


def load(path: str | Path) -> list[Record]:
    """Read `save`'s JSON; ValueError that names the file where it is none of ours."""
    try:
        items = json.loads(Path(path).read_text())
        if not isinstance(items, list) or not items:
            raise TypeError("it holds no list of records")
        return [_record(item) for item in items]
    except (OSError, json.JSONDecodeError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is not a benchmark record: {error}") from None


def table(records: Sequence[Record]) -> str:
    """The records as Markdown tables, each under a line that states its circumstances."""
    return "\n\n".join(f"{_caption(item)}\n\n{_rows(item)}" for item in records)


def readme(text: str, records: Sequence[Record]) -> str:
    """`text` with the tables of `records` between its two benchmark markers; ValueError where they are missing."""
    pattern = re.compile(r"(<!-- bench -->\n).*?(<!-- /bench -->)", re.S)
    if not pattern.search(text):
        raise ValueError("the text has no <!-- bench --> ... <!-- /bench --> markers to write between")
    return pattern.sub(lambda found: found.group(1) + table(records) + "\n" + found.group(2), text)


@dataclass(frozen=True)
class Change:
    """How one row moved: the ratio of costs B/A with its 95 % interval, and what that means."""

    row: Row
    ratio: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """slower or faster where the whole interval lies beyond the tolerance, else same."""
        if self.low > 1 + TOLERANCE:
            return "slower"
        return "faster" if self.high < 1 - TOLERANCE else "same"


def compare(before: Sequence[Record], after: Sequence[Record], draws: int = 2000) -> list[Change]:
    """Every row that stands in both, with the bootstrapped ratio of its cost (time, or one over a rate)."""
    old = {row.key: row for item in before for row in item.rows}
    both = [(old[row.key], row) for item in after for row in item.rows if row.key in old]
    return [_change(a, b, draws) for a, b in both]


def compare_table(changes: Sequence[Change]) -> str:
    """`compare`'s result as a Markdown table; a line that says so where the records share no row."""
    if not changes:
        return "The two records have no row in common."
    lines = ["| what | provider | cost B / A | 95 % interval | verdict |", "|---|---|---:|---:|---|"]
    for item in changes:
        interval = f"{item.low:.3f} to {item.high:.3f}"
        lines.append(f"| {label(item.row)} | {item.row.provider} | {item.ratio:.3f} | {interval} | {item.verdict} |")
    return "\n".join(lines)


def _change(a: Row, b: Row, draws: int) -> Change:
    rng = np.random.default_rng(0)
    ratios = _medians(_costs(b), draws, rng) / _medians(_costs(a), draws, rng)
    low, high = np.quantile(ratios, (0.025, 0.975))
    return Change(b, float(np.median(_costs(b)) / np.median(_costs(a))), float(low), float(high))


def _medians(samples: np.ndarray, draws: int, rng: np.random.Generator) -> np.ndarray:
    return np.median(rng.choice(samples, (draws, len(samples))), axis=1)


def _costs(row: Row) -> np.ndarray:
    return 1 / np.array(row.samples) if row.higher_is_better else np.array(row.samples)


def _rows(item: Record) -> str:
    lines = ["| what | provider | median | 20 % to 80 % | n | against baseline | share of bound |"]
    lines.append("|---|---|---:|---:|---:|---:|---:|")
    medians = {(row.name, json.dumps(row.config), row.provider): row.median for row in item.rows}
    for row in item.rows:
        base = medians.get((row.name, json.dumps(row.config), row.baseline))
        lines.append(
            f"| {label(row)} | {row.provider} | {_number(row.median)} {row.unit} | {_spread(row)} | "
            f"{len(row.samples)} | {_against(row, base)} | {_percent(row.share)} |"
        )
    return "\n".join(lines)


def _against(row: Row, base: float | None) -> str:
    if not base or row.provider == row.baseline:
        return ""
    return f"{row.median / base if row.higher_is_better else base / row.median:.2f} x {row.baseline}"


def _spread(row: Row) -> str:
    ordered = sorted(row.samples)
    last = len(ordered) - 1
    return f"{_number(ordered[round(0.2 * last)])} to {_number(ordered[round(0.8 * last)])}"


def label(row: Row) -> str:
    """What was measured, with its configuration."""
    config = ", ".join(f"{name} {value}" for name, value in row.config.items())
    return f"{row.name} ({config})" if config else row.name


def _caption(item: Record) -> str:
    env = item.environment
    shown = ", ".join(f"{name} {env['versions'][name]}" for name in SHOWN)
    where = f"{env['device']} ({env['cores']} cores)"
    how = f" ({env['timing']})" if env.get("timing") else ""
    return f"**{item.subject}** on {where}, {item.date}, {shown}, commit {env['commit']}: `{item.command}`{how}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"


def _save_csv(path: Path, records: Sequence[Record]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["subject", "device", "date", "name", "provider", "config", "unit", "n", "median", "bound"])
        for item in records:
            for row in item.rows:
                left = [item.subject, item.environment["device"], item.date, row.name, row.provider]
                writer.writerow([*left, json.dumps(row.config), row.unit, len(row.samples), row.median, row.bound])


def _record(item: dict) -> Record:
    if item["schema"] != SCHEMA:
        raise KeyError(f"schema {item['schema']}, this version reads {SCHEMA}")
    _check("record", item, RECORD_SCHEMA)
    for row in item["rows"]:
        _check("row", row, ROW_SCHEMA)
    rows = tuple(Row(**{**row, "samples": tuple(row["samples"])}) for row in item["rows"])
    return Record(**{**item, "rows": rows})


def _check(what: str, item: dict, schema: dict[str, tuple[type, ...]]) -> None:
    for name, types in schema.items():
        if not isinstance(item[name], types):
            raise TypeError(f"{name} of a {what} is {item[name]!r}")
    if what == "row" and not all(isinstance(sample, (int, float)) for sample in item["samples"]):
        raise TypeError(f"samples of {item['name']} are not all numbers")


def _device_name(device: str) -> str:
    if not device.startswith("cuda"):
        return processor()
    import torch

    return torch.cuda.get_device_name(device)


def _clocks() -> dict:
    try:
        import pynvml
    except ImportError:
        return {}
    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    return {
        "sm_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
        "memory_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM),
        "power_w": pynvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
        "power_limit_w": pynvml.nvmlDeviceGetPowerManagementLimit(handle) / 1e3,
        "driver": pynvml.nvmlSystemGetDriverVersion(),
    }
