"""The README's first rows: of the newest record, beside others of the same run, and honest about what is missing."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from fastmoco.bench import headlines, record_files
from fastmoco.bench.record_files import Record, Row

ROOT = Path("/checkout")
ENVIRONMENT = {**record_files.environment(), "device": "A processor", "cores": 2}


def record_of(date: str, rate: float, kind: str = "cpu", px: int = 224, **more: object) -> Record:
    config = {"arch": "resnet50", "px": px, "batch": 32}
    rows = [
        Row("step", "fastmoco bf16", "pairs/s", (rate,), config),
        Row("step", headlines.PUBLISHED[kind], "pairs/s", (rate / 2,), config),
    ]
    return Record("step", tuple(rows), {**ENVIRONMENT, "device_type": kind, **more}, "fastmoco bench step", date)


def table(*records: Record) -> list[str]:
    files = {ROOT / f"bench/records/{number}.json": [record] for number, record in enumerate(records)}
    return headlines.table(files, ROOT).splitlines()[2:]


def test_the_newest_record_is_shown_with_its_link_and_its_neighbours() -> None:
    step = table(record_of("2026-03-01", 20), record_of("2026-01-01", 10))[0]
    assert step == (
        "| training step, ResNet-50, 224 px, bf16 | A processor, 2 cores | **20 pairs/s** | published bf16 autocast: "
        "10 pairs/s | [2026-03-01](bench/records/0.json) |"
    )


def test_what_no_record_shows_is_not_measured_yet() -> None:
    step, loader, gpu = table(record_of("2026-03-01", 20, px=112), record_of("2026-03-02", 20, unfinished=True))
    assert all("**not measured yet**" in line for line in (step, loader, gpu)) and "one GPU" in gpu


def test_a_gpu_has_a_row_of_its_own() -> None:
    gpu = dataclasses.replace(record_of("2026-03-01", 4000, "cuda"))
    lines = table(gpu)
    assert "not measured yet" in lines[0] and "**4,000 pairs/s**" in lines[2] and "2 cores" not in lines[2]
