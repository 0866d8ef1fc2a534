"""Records survive a round trip and say what is wrong with them, tables state their circumstances and their doubts."""

import csv
import dataclasses
import json
import random

import pytest

from fastmoco.bench import record_files
from fastmoco.bench.record_files import Record, Row, between_markers, load, page, record, save, table

ENVIRONMENT = record_files.environment()


def rows_at(scale: float = 1.0, noise: float = 0.01, unit: str = "ms", seed: int = 0, n: int = 20) -> list[Record]:
    rng = random.Random(seed)
    samples = tuple(scale * rng.gauss(1, noise) for _ in range(n))
    rows = (Row("step", "ours", unit, samples, {"batch": 32}, baseline="ours", bound=0.5),)
    return [Record("step", rows, ENVIRONMENT, "python -m fastmoco.bench step", "2026-01-01")]


def test_json_round_trip(tmp_path):
    save(tmp_path / "a.json", rows_at())
    assert load(tmp_path / "a.json") == rows_at()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda item: item.pop("rows"), "a record has rows too few"),
        (lambda item: item.update(more=1), "a record has more too few or too many"),
        (lambda item: item.update(schema=99), "its schema is 99, and this version reads 1"),
        (lambda item: item["rows"][0].pop("unit"), "a row has unit too few"),
        (lambda item: item["rows"].append(3), "a row is no object"),
        (lambda item: item["rows"][0].update(samples=["fast"]), "samples of step are not all numbers"),
        (lambda item: item["rows"][0].update(samples=[]), "row step/ours has no samples"),
        (lambda item: item["rows"][0].update(bound="high"), "bound of a row is 'high'"),
        (lambda item: item["rows"][0].update(name=3), "name of a row is 3"),
        (lambda item: item["rows"][0].update(extra=None), "extra of a row is None"),
    ],
)
def test_the_schema_refuses_what_is_no_record_in_plain_words(spoil, message, tmp_path):
    save(tmp_path / "b.json", rows_at())
    data = json.loads((tmp_path / "b.json").read_text())
    spoil(data[0])
    (tmp_path / "b.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"b.json: holds no benchmark record \(" + message):
        load(tmp_path / "b.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"{}", "holds no benchmark record"),
        (b"[]", "holds no benchmark record"),
        (b"3", "holds no benchmark record"),
        (b"[3]", "a record is no object"),
    ],
)
def test_a_file_that_is_no_record_is_named(content, message, tmp_path):
    (tmp_path / "c.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"c.json: .*{message}"):
        load(tmp_path / "c.json")


def test_a_place_that_is_no_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="none.json: no such file$"):
        load(tmp_path / "none.json")
    with pytest.raises(ValueError, match="cannot be read: Is a directory$"):
        load(tmp_path)


def test_csv_has_a_line_for_each_row(tmp_path):
    save(tmp_path / "a.csv", rows_at())
    lines = (tmp_path / "a.csv").read_text().splitlines()
    assert len(lines) == 2 and lines[0].startswith("subject,device") and ",ours," in lines[1]
    (line,) = csv.DictReader(lines)
    low, high = rows_at()[0].rows[0].spread
    assert (float(line["quantile 20 %"]), float(line["quantile 80 %"])) == (low, high)


def test_share_of_the_bound_goes_by_the_direction_of_the_unit():
    time = Row("a", "p", "ms", (2.0,), bound=1.0)
    rate = Row("a", "p", "pairs/s", (50.0,), bound=100.0)
    assert time.share == rate.share == 0.5


def test_the_table_names_device_versions_commit_command_spread_and_baseline():
    fast = Row("step", "ours", "pairs/s", (200.0, 210.0, 220.0), baseline="plain", bound=400.0)
    plain = Row("step", "plain", "pairs/s", (100.0, 105.0, 110.0), baseline="plain")
    text = table([record("step", [fast, plain], ENVIRONMENT)])
    env = ENVIRONMENT
    for part in (env["device"], f"torch {env['versions']['torch']}", "2.00 x plain", "204 to 216", "52 %"):
        assert part in text, part
    assert f"{env['threads']} thread" in text and f"load {env['load']:.2f} a core" in text


def test_a_record_of_before_without_threads_and_load_makes_a_table_too():
    new = ("threads", "omp_num_threads", "load", "time")
    old = {key: value for key, value in ENVIRONMENT.items() if key not in new}
    text = table([dataclasses.replace(rows_at()[0], environment=old)])
    assert f"({old['cores']} cores), 2026-01-01" in text and "thread" not in text


def test_unsteady_rows_and_shares_above_the_bound_are_marked_and_no_others():
    steady = Row("a", "p", "ms", (9.0, 10.0, 11.0), bound=10.0)
    unsteady = Row("a", "q", "ms", (5.0, 10.0, 15.0), bound=4.0)
    over = Row("a", "r", "pairs/s", (10.0, 10.0), bound=9.0)
    quiet, wide, fast = (table([record("a", [row], ENVIRONMENT)]) for row in (steady, unsteady, over))
    assert "unsteady" not in quiet and "over" not in quiet and "100 %" in quiet
    assert "| 7 to 13, unsteady |" in wide and "40 % |" in wide and wide.endswith("measured again on a quiet machine.")
    assert "| 10 to 10 |" in fast and "111 %, over |" in fast and fast.endswith("measured again on a quiet machine.")


def test_only_what_stands_between_the_markers_is_replaced():
    text = "before\n<!-- bench -->\nold\n<!-- /bench -->\nafter"
    assert between_markers(text, "new") == "before\n<!-- bench -->\nnew\n<!-- /bench -->\nafter"
    with pytest.raises(ValueError, match="markers"):
        between_markers("no markers", "new")


def test_the_configuration_stands_once_above_its_rows():
    rows = [Row("step", name, "ms", (1.0,), {"batch": batch}) for batch in (32, 64) for name in ("ours", "plain")]
    text = table([record("step", rows, ENVIRONMENT)])
    assert [text.count(f"step (batch {batch}):") for batch in (32, 64)] == [1, 1] and text.count("| ours |") == 2


def test_the_page_has_a_heading_for_each_subject_and_the_newest_record_first():
    old, new = rows_at()[0], dataclasses.replace(rows_at()[0], date="2026-02-02")
    text = page([old, dataclasses.replace(old, subject="loader"), new])
    assert text.index("## loader") < text.index("## step") < text.index("2026-02-02") < text.rindex("2026-01-01")


def test_a_row_without_samples_is_refused():
    with pytest.raises(ValueError, match="no samples"):
        Row("a", "p", "ms", ())


def test_what_is_not_finished_stands_beside_the_last_that_was(tmp_path):
    path = tmp_path / "a.b.json"
    save(path, rows_at())
    save(record_files.partial(path), rows_at(2.0))
    assert record_files.partial(path) == tmp_path / "a.b.partial.json" and record_files.record_paths(tmp_path) == [path]
    record_files.finish(path, rows_at(3.0))
    assert load(path) == rows_at(3.0) and [file.name for file in tmp_path.iterdir()] == ["a.b.json"]
    save(record_files.partial(tmp_path / "c.json"), rows_at())
    assert record_files.record_paths(tmp_path) == [path, tmp_path / "c.partial.json"]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    save(path, rows_at())
    monkeypatch.setattr(record_files.Path, "write_text", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save(path, rows_at(2.0))
    assert load(path) == rows_at()


def test_clocks_failures_and_an_early_end_stand_below_the_caption():
    clocks = {
        "samples": 3,
        "sm_mhz": {"median": 1800, "minimum": 1700},
        "memory_mhz": {"median": 2619, "minimum": 2619},
        "power_w": {"median": 620.0, "maximum": 630.0},
        "throttled": ["power cap"],
        "power_limit_w": 700.0,
    }
    more = {"clocks": clocks, "failed": {"fastmoco fp32": "OutOfMemoryError: no room"}, "unfinished": True}
    text = table([dataclasses.replace(rows_at()[0], environment=ENVIRONMENT | more)])
    message = "3 samples: 1,800 MHz (least 1,700), memory 2,619 MHz, 620 W (most 630 of 700), throttled by: power cap"
    assert message in text and "fastmoco fp32 failed: OutOfMemoryError: no room" in text and "Stopped before" in text
    without = {name: value for name, value in clocks.items() if name != "power_limit_w"}
    text = table([dataclasses.replace(rows_at()[0], environment=ENVIRONMENT | {"clocks": without | {"samples": 1}})])
    assert "\n1 sample: 1,800" in text and "620 W (most 630), throttled" in text
    plain = table(rows_at())
    assert "MHz" not in plain and "failed" not in plain and "Stopped" not in plain


def test_the_practical_bound_stands_below_the_table_where_a_record_knows_it():
    extra = {"practical": [4447.0, 4907.0], "convolutions": [270e12, 340e12]}
    row = Row("step", "ours", "pairs/s", (4000.0,) * 5, bound=6296.0, extra=extra)
    plain = Row("step", "theirs", "pairs/s", (2000.0,) * 5, bound=6296.0)
    text = record_files.table([record_files.record("step", [row, plain], record_files.environment())])
    assert "convolutions at the rate that they reach: ours 6,296 and 4,447 to 4,907." in text and "assumed" not in text
    guessed = dataclasses.replace(row, extra=extra | {"assumed": True})
    text = record_files.table([record_files.record("step", [guessed], record_files.environment())])
    assert "4,907. That rate is assumed: nothing is published of this GPU." in text
    assert "Bounds in" not in record_files.table([record_files.record("step", [plain], record_files.environment())])
