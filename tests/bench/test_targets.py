"""Targets are met, missed or not measured as the records say, and nothing else decides."""

import dataclasses

import pytest

from fastmoco.bench import record_files, targets
from fastmoco.bench.comparison import FEWEST
from fastmoco.bench.proof import EAGER, EQUAL, GRAPH, OTHER, READ, REPLAYED, WAITS
from fastmoco.bench.record_files import Record, Row
from fastmoco.bench.targets import ABSENT, CHANNELS_LAST, OURS, PUBLISHED

SIZE = {"arch": "resnet50", "px": 224, "batch": 256}
BOUNDS = {"eager": 3000.0, "bnrelu": 6000.0, "stats": 6500.0, "main": 8000.0}
H100 = "NVIDIA H100 80GB HBM3"


def record(rows: list[Row], device: str = H100, kind: str = "cuda", **more: object) -> Record:
    return record_files.record(
        "step", rows, {**record_files.environment(), "device": device, "device_type": kind, **more}
    )


def step(rates: dict[str, float], device: str = H100, n: int = FEWEST, **size: object) -> Record:
    rows = []
    for provider, rate in rates.items():
        extra = {"level": "bnrelu", "bounds": BOUNDS}
        rows.append(Row("step", provider, "pairs/s", (rate,) * n, SIZE | size, PUBLISHED, BOUNDS["bnrelu"], extra))
    return record(rows, device)


def proof(
    again: int = 0, graph: int = 0, other: int = 9, steps: int = 20, precision: str = "bf16", deterministic: str = "on"
) -> Record:
    values = {EAGER: again, GRAPH: graph, OTHER: other}
    extra = {"largest": 0.25, "compared": 500}
    config = SIZE | {"steps": steps, "precision": precision, "deterministic": deterministic}
    return record([Row(EQUAL, name, "tensors differ", (float(n),), config, extra=extra) for name, n in values.items()])


def watch(waits: int = 0, read: int = 6, steps: int = 100, precision: str = "bf16") -> Record:
    rows, size = ((REPLAYED, waits, steps), (READ, read, 3)), SIZE | {"precision": precision}
    return record([Row(WAITS, name, "calls", (float(n),), size | {"steps": taken}) for name, n, taken in rows])


def of_a_cpu(item: Record) -> Record:
    return dataclasses.replace(item, environment=item.environment | {"device_type": "cpu"})


def unfinished(item: Record) -> Record:
    return dataclasses.replace(item, environment=item.environment | {"unfinished": True})


GOOD = [
    step({PUBLISHED: 2000.0, CHANNELS_LAST: 3000.0, OURS: 4500.0}),
    step({PUBLISHED: 500.0, OURS: 1600.0}, batch=32),
    proof(),
    watch(),
]


def verdicts(records: list[Record]) -> list[str]:
    return [target.verdict for target in targets.targets(records)]


def test_what_was_reached_is_met_and_what_was_not_is_missed():
    assert verdicts(GOOD) == ["met", "met", "met", "met", "met", "met", "missed", "met", "met"]
    measured = [target.measured for target in targets.targets(GOOD)]
    assert measured[:3] == ["2.25 x (n = 5)", "1.50 x (n = 5)", "3.20 x (n = 5)"]
    assert measured[3:7] == ["75.0% of 6,000 pairs/s (n = 5)", *["4,500 pairs/s (n = 5)"] * 3]
    assert measured[7:] == ["0 differ after 20", "0 in 100"]
    slow = [
        step({PUBLISHED: 2000.0, CHANNELS_LAST: 3000.0, OURS: 3500.0}),
        step({PUBLISHED: 500.0, OURS: 1400.0}, batch=32),
    ]
    assert verdicts(slow) == ["missed"] * 7 + [ABSENT] * 2
    assert verdicts([proof(graph=1), watch(waits=2)])[-2:] == ["missed", "missed"]


def test_without_records_nothing_is_measured():
    assert verdicts([]) == [ABSENT] * 9 and all(target.measured == "-" for target in targets.targets([]))
    assert "Level of fusion: not measured." in targets.table([])


@pytest.mark.parametrize("spoiled", [{"arch": "resnet18"}, {"px": 112}, {"batch": 128}])
def test_another_size_is_no_measurement(spoiled):
    assert verdicts([step({PUBLISHED: 1.0, CHANNELS_LAST: 1.0, OURS: 4.0}, **spoiled)]) == [ABSENT] * 9


def test_too_few_samples_are_no_measurement_and_one_more_is():
    few, enough = (step({PUBLISHED: 2000.0, CHANNELS_LAST: 3000.0, OURS: 5500.0}, n=n) for n in (FEWEST - 1, FEWEST))
    assert verdicts([few]) == [ABSENT] * 9 and verdicts([enough])[:2] == ["met", "met"]
    assert targets.targets([unfinished(few)])[0].measured == "2.75 x (n = 4, too few, unfinished)"
    mixed = step({PUBLISHED: 2000.0, OURS: 5500.0})
    published, ours = mixed.rows
    rows = (dataclasses.replace(published, samples=published.samples[:1]), ours)
    first, _, _, share, *_ = targets.targets([dataclasses.replace(mixed, rows=rows)])
    assert (first.measured, first.verdict, share.verdict) == ("2.75 x (n = 1, too few)", ABSENT, "met")


def test_a_rate_above_its_bound_is_no_measurement_and_one_at_its_bound_is():
    over, at = (step({PUBLISHED: 2000.0, CHANNELS_LAST: 3000.0, OURS: rate}) for rate in (9000.0, 6000.0))
    assert verdicts([over]) == [ABSENT] * 9 and verdicts([at])[3:7] == ["met"] * 4
    share = targets.targets([over])[3].measured
    assert share == "150.0% of 6,000 pairs/s (n = 5, above its bound: one of the two is wrong)"


def test_what_was_not_finished_counts_and_is_said():
    text = targets.table([unfinished(item) for item in GOOD])
    assert "| 2.25 x (n = 5, unfinished) | met |" in text and "| 0 differ after 20 (unfinished) | met |" in text
    assert "(75%) (n = 5, unfinished)." in text and "unfinished" not in targets.table(GOOD)


def test_a_cpu_proves_nothing():
    assert verdicts([of_a_cpu(item) for item in GOOD]) == [ABSENT] * 9
    old = [dataclasses.replace(item, environment={"device": H100}) for item in GOOD]  # does not say what it is of
    assert verdicts(old) == [ABSENT] * 9


def test_the_proofs_are_asked_for_in_bf16():
    assert verdicts([proof(precision="fp32"), watch(precision="fp32")])[-2:] == [ABSENT] * 2
    assert verdicts([proof(), watch()])[-2:] == ["met"] * 2


def test_where_the_gate_fails_nothing_is_proven():
    text = targets.table(GOOD[:2], "exit code 1")
    assert text.startswith("The gate's tests did not pass (exit code 1): nothing below is proven")
    assert "| met |" not in text and "| missed |" not in text
    assert text.count("| not proven |") == 7 and text.count("| not measured |") == 2
    assert "gate" not in targets.table(GOOD) and "| not proven |" not in targets.table(GOOD)


def test_a_missing_baseline_costs_its_own_target():
    assert verdicts([step({CHANNELS_LAST: 3000.0, OURS: 4500.0})])[:2] == [ABSENT, "met"]


def test_providers_of_two_records_are_not_compared():
    apart = [step({OURS: 4500.0}), step({PUBLISHED: 2000.0})]
    assert verdicts(apart)[0] == ABSENT and verdicts(apart[::-1])[0] == ABSENT


def test_each_gpu_has_rates_of_its_own_and_others_none():
    rates = {PUBLISHED: 2000.0, CHANNELS_LAST: 3000.0, OURS: 4500.0}
    expected = {H100: ["met", "met", "missed"], "NVIDIA H200": ["met", "missed", "missed"], "NVIDIA A100": [ABSENT] * 3}
    for device, target in expected.items():
        other = step(rates, device)
        assert verdicts([other])[:2] == ["met", "met"] and verdicts([other])[4:7] == target


def test_equality_is_asked_of_deterministic_algorithms():
    assert verdicts([proof(graph=3, again=3, deterministic="off")])[-2] == ABSENT
    assert verdicts([proof(graph=3, again=3, deterministic="off"), proof()])[-2] == "met"


@pytest.mark.parametrize(("rate", "says"), [(4450.0, "1.1 %: under 2 %"), (4300.0, "4.4 %: not under 2 %")])
def test_what_deterministic_algorithms_cost_is_said(rate, says):
    text = targets.table([step({PUBLISHED: 2000.0, OURS: 4500.0, targets.DETERMINISTIC: rate})])
    assert f"--deterministic on costs {says}" in text
    assert "deterministic" not in targets.table([step({PUBLISHED: 2000.0, OURS: 4500.0})])


def test_bytes_of_a_step_are_no_rates():
    assert verdicts([record([Row("step", OURS, "MB", (9e3,) * FEWEST, SIZE)])]) == [ABSENT] * 9


def test_equality_counts_only_beside_its_controls_and_over_all_steps():
    assert verdicts([proof(other=0)])[-2] == verdicts([proof(steps=5)])[-2] == ABSENT
    assert verdicts([proof(graph=3, steps=5)])[-2] == "missed"
    (equal,) = [target for target in targets.targets([proof(again=2, graph=3)]) if "bit for bit" in target.what]
    assert equal.verdict == ABSENT
    assert equal.measured == "3 differ after 20; so do 2 between two eager runs, by 0.25 at most"


def test_waits_count_only_where_a_reading_is_seen_and_over_all_steps():
    assert verdicts([watch(read=0)])[-1] == verdicts([watch(steps=25)])[-1] == ABSENT
    assert verdicts([watch(waits=1, steps=25)])[-1] == "missed"


def test_the_level_of_fusion_is_said_and_what_the_next_would_bring():
    text = targets.table(GOOD)
    assert "fusion bnrelu (fastmoco bf16): 4,500 of at most 6,000 pairs/s (75%) (n = 5)." in text
    assert text.endswith("on this machine: stats at most 6,500 pairs/s, main at most 8,000 pairs/s.")
