"""Comparisons have the error rates they claim, say "unclear" where they cannot tell, and name what else differed."""

import dataclasses
import random
from pathlib import Path

import pytest

from fastmoco.bench import record_files
from fastmoco.bench.comparison import FEWEST, compare, differences
from fastmoco.bench.comparison import report as compared
from fastmoco.bench.record_files import Record, Row, load, save

ENVIRONMENT = record_files.environment()


def rows_at(scale: float = 1.0, noise: float = 0.01, unit: str = "ms", seed: int = 0, n: int = 20) -> list[Record]:
    rng = random.Random(seed)
    return record_with([scale * rng.gauss(1, noise) for _ in range(n)], unit)


def record_with(samples: list[float], unit: str = "ms", **environment: object) -> list[Record]:
    row = Row("step", "ours", unit, tuple(samples), {"batch": 32})
    return [Record("step", (row,), ENVIRONMENT | environment, "fastmoco bench step", "2026-01-01")]


def verdicts(scale: float, noise: float, draws: int, unit: str = "ms", n: int = 20) -> list[str]:
    return [
        compare(rows_at(1, noise, unit, 2 * i, n), rows_at(scale, noise, unit, 2 * i + 1, n), draws=300)[0].verdict
        for i in range(draws)
    ]


def test_a_ten_percent_slow_down_is_found_in_over_95_of_100_draws():
    results = verdicts(1.10, noise=0.03, draws=200)
    assert results.count("slower") > 190
    assert verdicts(0.90, noise=0.03, draws=20, unit="pairs/s").count("slower") > 18  # of a rate, less is slower


def test_one_percent_of_noise_or_drift_is_not_called_a_change():
    assert verdicts(1.00, noise=0.01, draws=200).count("same") > 190
    assert verdicts(1.01, noise=0.01, draws=200).count("same") > 190


@pytest.mark.parametrize("noise", [0.03, 0.10])
def test_noise_is_called_a_change_in_under_5_of_100_draws(noise):
    results = verdicts(1.00, noise, draws=200, n=FEWEST)
    assert results.count("slower") + results.count("faster") < 10


def test_three_samples_never_tell_slower_from_faster():
    assert set(verdicts(2.0, noise=0.01, draws=20, n=3)) == {"unclear: n < 5"}
    assert set(verdicts(1.0, noise=0.001, draws=20, n=3)) == {"unclear: n < 5"}
    assert (
        compare(rows_at(n=3), rows_at(2.0))[0].verdict
        == compare(rows_at(), rows_at(2.0, n=4))[0].verdict
        == "unclear: n < 5"
    )
    assert verdicts(2.0, noise=0.01, draws=1, n=5) == ["slower"]


def test_a_wide_interval_is_not_called_the_same():
    wide = [0.7, 0.8, 1.0, 1.2, 1.3]
    assert compare(record_with(wide), record_with(wide))[0].verdict == "unclear"
    assert (
        compare(record_with([1.0] * 5), record_with([1.02] * 5))[0].verdict == "same"
    )  # certain, and too small to matter
    assert compare(record_with([1.0] * 5), record_with([1.06] * 5))[0].verdict == "slower"


def test_bytes_are_counted_so_that_one_sample_tells():
    results = [compare(record_with([100.0], "MB"), record_with([mb], "MB"))[0].verdict for mb in (100.0, 120.0, 80.0)]
    assert results == ["same", "more", "less"]


def test_only_the_same_measurement_is_paired_and_files_without_one_are_refused():
    other = dataclasses.replace(rows_at()[0].rows[0], config={"batch": 64})
    stranger = [dataclasses.replace(rows_at()[0], rows=(other,))]
    assert compare(rows_at(), stranger) == []
    with pytest.raises(ValueError, match=r"A, a, holds step \(batch 32\) by ours. B, b, holds step \(batch 64\) by"):
        compared("a", rows_at(), "b", stranger)


def test_the_report_names_files_circumstances_and_medians():
    a = record_with([1.0] * 5, load=0.1, threads=1, commit="abc", time="10:00 UTC", omp_num_threads=None)
    b = record_with([2.0] * 6, load=0.9, threads=2, commit="def", time="11:00 UTC", omp_num_threads="2")
    lines = compared("a.json", a, "b.json", b).splitlines()
    assert lines[0] == "A: a.json, commit abc, 2026-01-01 10:00 UTC; B: b.json, commit def, 2026-01-01 11:00 UTC"
    assert lines[1:4] == [
        "threads: 1 in A, 2 in B",
        "OMP_NUM_THREADS: not set in A, 2 in B",
        "load a core at the start: 0.1 in A, 0.9 in B",
    ]
    assert "above 1, B is slower" in lines[4]
    assert "| 1 ms (n = 5) | 2 ms (n = 6) | 2.000 | 2.000 to 2.000 | slower |" in lines[-1]


def test_rows_of_one_file_alone_are_listed_and_unfinished_records_named():
    (item,) = record_with([1.0] * 5)
    more = dataclasses.replace(item.rows[0], provider="theirs")
    longer = [dataclasses.replace(item, rows=(*item.rows, more), environment={**item.environment, "unfinished": True})]
    text = compared("a", [item], "b", longer)
    assert text.endswith("\n\nonly in B: step (batch 32) by theirs") and "only in A" not in text
    assert ", unfinished" in text.splitlines()[0]
    assert compared("a", longer, "b", [item]).endswith("\n\nonly in A: step (batch 32) by theirs")
    same = compared("a", [item], "b", [item])
    assert "only in" not in same and "unfinished" not in same


def test_differences_name_versions_and_are_silent_where_nothing_differs():
    newer = {"versions": {**ENVIRONMENT["versions"], "torch": "9.9"}}
    before = ENVIRONMENT["versions"]["torch"]
    assert differences(rows_at(), record_with([1.0], **newer)) == [f"torch: {before} in A, 9.9 in B"]
    assert differences(rows_at(), rows_at()) == []


def test_a_record_of_before_threads_were_recorded_is_compared_too(tmp_path: Path):
    """Written to a file and read again, as a record of that time would be."""
    without = {name: value for name, value in ENVIRONMENT.items() if name not in ("threads", "load")}
    save(tmp_path / "old.json", [dataclasses.replace(item, environment=without) for item in rows_at()])
    old = load(tmp_path / "old.json")
    new = [dataclasses.replace(item, environment=ENVIRONMENT) for item in old]
    assert f"threads: not recorded in A, {ENVIRONMENT['threads']} in B" in differences(old, new)
    assert len(compare(old, new)) == sum(len(item.rows) for item in old)


@pytest.mark.parametrize(("before", "after", "verdict"), [(0, 0, "same"), (0, 2, "more"), (2, 0, "less")])
def test_counts_may_be_zero(before: float, after: float, verdict: str):
    (change,) = compare(record_with([before], "calls"), record_with([after], "calls"))
    assert change.verdict == verdict
