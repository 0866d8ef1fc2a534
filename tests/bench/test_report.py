"""Records survive a round trip, comparisons have the error rates they claim, tables state their circumstances."""

import dataclasses
import json
import random

import pytest

from fastmoco.bench import report
from fastmoco.bench.report import Record, Row, compare, load, readme, record, save, table


ENVIRONMENT = report.environment()


def made(scale: float = 1.0, noise: float = 0.01, unit: str = "ms", seed: int = 0, n: int = 20) -> list[Record]:
    rng = random.Random(seed)
    samples = tuple(scale * rng.gauss(1, noise) for _ in range(n))
    rows = (Row("step", "ours", unit, samples, {"batch": 32}, baseline="ours", bound=0.5),)
    return [Record("step", rows, ENVIRONMENT, "python -m fastmoco.bench step", "2026-01-01")]


def verdicts(scale: float, noise: float, draws: int, unit: str = "ms") -> list[str]:
    return [
        compare(made(1, noise, unit, seed=2 * i), made(scale, noise, unit, seed=2 * i + 1), draws=300)[0].verdict
        for i in range(draws)
    ]


def test_a_ten_percent_slow_down_is_found_in_over_95_of_100_draws():
    found = verdicts(1.10, noise=0.03, draws=200)
    assert found.count("slower") > 190
    assert verdicts(0.90, noise=0.03, draws=20, unit="pairs/s").count("slower") > 18  # of a rate, less is slower


def test_one_percent_of_noise_or_drift_is_not_called_a_change():
    assert verdicts(1.00, noise=0.01, draws=200).count("same") > 190
    assert verdicts(1.01, noise=0.01, draws=200).count("same") > 190


def test_compare_pairs_only_the_same_measurement():
    other = dataclasses.replace(made()[0].rows[0], config={"batch": 64})
    stranger = [dataclasses.replace(made()[0], rows=(other,))]
    assert compare(made(), stranger) == []
    assert "no row in common" in report.compare_table([])


def test_json_round_trip_and_its_refusals(tmp_path):
    save(tmp_path / "a.json", made())
    assert load(tmp_path / "a.json") == made()
    data = json.loads((tmp_path / "a.json").read_text())
    for spoil in (lambda d: d[0].pop("rows"), lambda d: d[0].update(schema=99), lambda d: d[0]["rows"][0].pop("unit")):
        spoiled = json.loads(json.dumps(data))
        spoil(spoiled)
        (tmp_path / "b.json").write_text(json.dumps(spoiled))
        with pytest.raises(ValueError, match="b.json is not a benchmark record"):
            load(tmp_path / "b.json")
    for text in ("{", "{}", "[]", "3"):
        (tmp_path / "c.json").write_text(text)
        with pytest.raises(ValueError, match="c.json is not a benchmark record"):
            load(tmp_path / "c.json")


def test_csv_has_a_line_for_each_row(tmp_path):
    save(tmp_path / "a.csv", made())
    lines = (tmp_path / "a.csv").read_text().splitlines()
    assert len(lines) == 2 and lines[0].startswith("subject,device") and ",ours," in lines[1]


def test_share_of_the_bound_never_exceeds_one_by_its_direction():
    time = Row("a", "p", "ms", (2.0,), bound=1.0)
    rate = Row("a", "p", "pairs/s", (50.0,), bound=100.0)
    assert time.share == rate.share == 0.5


def test_the_table_names_device_versions_commit_command_spread_and_baseline():
    fast = Row("step", "ours", "pairs/s", (200.0, 210.0, 220.0), baseline="plain", bound=400.0)
    plain = Row("step", "plain", "pairs/s", (100.0, 105.0, 110.0), baseline="plain")
    text = table([record("step", [fast, plain])])
    env = report.environment()
    for part in (env["device"], f"torch {env['versions']['torch']}", "2.00 x plain", "200 to 220", "52 %"):
        assert part in text, part


def test_readme_replaces_only_what_stands_between_the_markers():
    text = "before\n<!-- bench -->\nold\n<!-- /bench -->\nafter"
    out = readme(text, made())
    assert out.startswith("before\n") and out.endswith("after") and "old" not in out and "**step**" in out
    assert readme(out, made()) == out
    with pytest.raises(ValueError, match="markers"):
        readme("no markers", made())


def test_a_row_without_samples_is_refused():
    with pytest.raises(ValueError, match="no samples"):
        Row("a", "p", "ms", ())
