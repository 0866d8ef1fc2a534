"""Targets are met, missed or not measured as the records say, and nothing else decides."""

import pytest

from fastmoco.bench import report, targets
from fastmoco.bench.proof import EAGER, EQUAL, GRAPH, OTHER, READ, REPLAYED, WAITS
from fastmoco.bench.report import Record, Row
from fastmoco.bench.targets import ABSENT, CHANNELS_LAST, OURS, OURS_KEY, PUBLISHED

SIZE = {"arch": "resnet50", "px": 224, "batch": 256}
BOUNDS = {"eager": 3000.0, "bnrelu": 6024.0, "key": 6306.0, "stats": 6500.0, "main": 7934.0}


def record(rows: list[Row], device: str = "NVIDIA H100 80GB HBM3") -> Record:
    return report.record("step", rows, {**report.environment(), "device": device})


def step(rates: dict[str, float], device: str = "NVIDIA H100 80GB HBM3", **size: object) -> Record:
    rows = []
    for provider, rate in rates.items():
        level = "key" if provider == OURS_KEY else "bnrelu"
        extra = {"level": level, "bounds": BOUNDS}
        rows.append(Row("step", provider, "pairs/s", (rate,), SIZE | size, PUBLISHED, BOUNDS[level], extra))
    return record(rows, device)


def proof(again: int = 0, graph: int = 0, other: int = 9, steps: int = 20) -> Record:
    found = {EAGER: again, GRAPH: graph, OTHER: other}
    extra = {"largest": 0.25, "compared": 500}
    config = SIZE | {"steps": steps}
    return record([Row(EQUAL, name, "tensors differ", (float(n),), config, extra=extra) for name, n in found.items()])


def watch(found: int = 0, read: int = 6, steps: int = 100) -> Record:
    rows = ((REPLAYED, found, steps), (READ, read, 3))
    return record([Row(WAITS, name, "calls", (float(n),), SIZE | {"steps": taken}) for name, n, taken in rows])


GOOD = [
    step({PUBLISHED: 2000.0, CHANNELS_LAST: 3000.0, OURS: 4500.0, OURS_KEY: 4700.0}),
    step({PUBLISHED: 500.0, OURS: 1600.0}, batch=32),
    proof(),
    watch(),
]


def verdicts(records: list[Record]) -> list[str]:
    return [target.verdict for target in targets.targets(records)]


def test_what_was_reached_is_met_and_what_was_not_is_missed():
    assert verdicts(GOOD) == ["met", "met", "met", "met", "met", "met", "missed", "met", "met"]
    measured = [target.measured for target in targets.targets(GOOD)]
    assert measured[:4] == ["2.25 x", "1.50 x", "3.20 x", "74.7% of 6,024 pairs/s"]
    assert measured[4:] == ["4,500 pairs/s"] * 3 + ["0 differ after 20", "0 in 100"]
    slow = [step({PUBLISHED: 2000.0, CHANNELS_LAST: 3000.0, OURS: 3500.0}), step({PUBLISHED: 500.0, OURS: 1400.0}, batch=32)]
    assert verdicts(slow) == ["missed"] * 7 + [ABSENT] * 2
    assert verdicts([proof(graph=1), watch(found=2)])[-2:] == ["missed", "missed"]


def test_without_records_nothing_is_measured():
    assert verdicts([]) == [ABSENT] * 9 and all(target.measured == "-" for target in targets.targets([]))
    assert "Level of fusion: not measured." in targets.table([])


@pytest.mark.parametrize("spoiled", [{"arch": "resnet18"}, {"px": 112}, {"batch": 128}])
def test_another_size_is_no_measurement(spoiled):
    assert verdicts([step({PUBLISHED: 1.0, CHANNELS_LAST: 1.0, OURS: 4.0}, **spoiled)]) == [ABSENT] * 9


def test_a_missing_baseline_costs_its_own_target():
    assert verdicts([step({CHANNELS_LAST: 3000.0, OURS: 4500.0})])[:2] == [ABSENT, "met"]


def test_providers_of_two_records_are_not_compared():
    apart = [step({OURS: 4500.0}), step({PUBLISHED: 2000.0})]
    assert verdicts(apart)[0] == ABSENT and verdicts(apart[::-1])[0] == ABSENT


def test_the_rates_are_asked_of_an_h100_alone():
    other = step({PUBLISHED: 2000.0, CHANNELS_LAST: 3000.0, OURS: 4500.0}, "NVIDIA H200")
    assert verdicts([other])[:2] == ["met", "met"] and verdicts([other])[4:7] == [ABSENT] * 3


def test_bytes_of_a_step_are_no_rates():
    assert verdicts([record([Row("step", OURS, "MB", (9e3,), SIZE)])]) == [ABSENT] * 9


def test_equality_counts_only_beside_its_controls_and_over_all_steps():
    assert verdicts([proof(other=0)])[-2] == verdicts([proof(steps=5)])[-2] == ABSENT
    assert verdicts([proof(graph=3, steps=5)])[-2] == "missed"
    (equal,) = [target for target in targets.targets([proof(again=2, graph=3)]) if "bit for bit" in target.what]
    assert equal.verdict == ABSENT
    assert equal.measured == "3 differ after 20; so do 2 between two eager runs, by 0.25 at most"


def test_waits_count_only_where_a_reading_is_seen_and_over_all_steps():
    assert verdicts([watch(read=0)])[-1] == verdicts([watch(steps=25)])[-1] == ABSENT
    assert verdicts([watch(found=1, steps=25)])[-1] == "missed"


def test_the_level_of_fusion_is_said_and_what_the_next_would_bring():
    text = targets.table(GOOD)
    assert "fusion bnrelu (fastmoco bf16): 4,500 of at most 6,024 pairs/s (75%)" in text
    assert "fusion key (fastmoco bf16, fused key encoder): 4,700 of at most 6,306 pairs/s (75%)" in text
    assert text.endswith("on this machine: stats at most 6,500 pairs/s, main at most 7,934 pairs/s.")
    assert "machine: key at most 6,306" in targets.table([step({OURS: 4500.0})])
