"""Two versions are run in turn, each from its own folder, and the first run of each does not count."""

import dataclasses
from pathlib import Path

import pytest
import torch

from fastmoco.bench import loader, versions
from fastmoco.bench.journal import Journal
from fastmoco.bench.versions import DEMO, OTHER, THIS, VIEWS
from fastmoco.cli import main
from fastmoco.presets import PRESETS

CPU = torch.device("cpu")
RECIPE = dataclasses.replace(PRESETS["v2"][1], batch_size=32, crop_size=40)
MAIN = """
import json, sys
from pathlib import Path
log = Path({log!r})
log.write_text(log.read_text() + "{name} " + sys.argv[1] + "\\n")
flags = dict(zip(sys.argv[1:], sys.argv[2:]))
assert flags["--device"] in ("cpu", "cuda"), "the command takes no other"
number = log.read_text().count("{name}")
if sys.argv[1] == "pretrain":
    Path(flags["--out"]).mkdir()
    Path(flags["--out"], "summary.json").write_text(json.dumps({{"knn_after": {value} + number}}))
elif {breaks}:
    sys.exit("the photographs are gone")
else:
    rows = [{{"provider": "another", "samples": [1.0]}}, {{"provider": {provider!r}, "samples": [{value} + number]}}]
    Path(flags["--json"]).write_text(json.dumps([{{"rows": rows}}]))
"""


def checkout(folder: Path, log: Path, value: int, breaks: bool = False) -> Path:
    """A folder whose package `fastmoco` notes each call in `log` and reports `value` plus the number of the call."""
    package = folder / "fastmoco"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "environment.py").write_text(f"def commit(): return {folder.name!r}\n")
    words = {"log": str(log), "name": folder.name, "value": value, "breaks": breaks, "provider": loader.KERNEL}
    (package / "__main__.py").write_text(MAIN.format(**words))
    return folder


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """The calls so far; a function that makes "before", which is compared, and "now", which stands for ours."""
    log = tmp_path / "log"
    log.touch()
    monkeypatch.setattr(versions.synthetic, "make", lambda folder: folder)
    monkeypatch.setattr(versions, "photographs", lambda folder, count: folder)

    def make(breaks: bool = False) -> Path:
        now = checkout(tmp_path / "now", log, 100)
        monkeypatch.setattr(versions.fastmoco, "__file__", str(now / "fastmoco" / "__init__.py"))
        return checkout(tmp_path / "before", log, 200, breaks)

    return log, make


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_versions_take_turns_each_from_its_own_folder_and_the_first_of_each_does_not_count(device, folders):
    log, make = folders
    found = versions.run(RECIPE, torch.device(device), rounds=2, against=make())
    rows = {(row.name, row.provider): row for row in found}
    assert (
        log.read_text().split("\n")[:-1] == ["before pretrain", "now pretrain"] * 3 + ["before bench", "now bench"] * 3
    )
    assert list(rows) == [(name, who) for name in (DEMO, VIEWS) for who in (OTHER, THIS)]
    assert rows[DEMO, OTHER].extra == {"commit": "before", "kNN": [202, 203]}
    assert rows[DEMO, THIS].extra == {"commit": "now", "kNN": [102, 103]}
    assert rows[VIEWS, OTHER].samples == (205, 206) and rows[VIEWS, THIS].samples == (105, 106)
    assert all(row.baseline == OTHER and row.config["other"] == "before" for row in rows.values())


def test_a_case_that_fails_says_why_and_costs_only_its_own_rows(folders):
    journal = Journal()
    rows = versions.run(RECIPE, CPU, rounds=1, against=folders[1](breaks=True), journal=journal)
    assert {row.name for row in rows} == {DEMO} and list(journal.failures) == [VIEWS]
    assert "ended with code 1: the photographs are gone" in journal.failures[VIEWS]


def test_what_cannot_be_compared_is_refused(folders, tmp_path, capsys):
    with pytest.raises(ValueError, match="holds no fastmoco"):
        versions.run(RECIPE, CPU, against=tmp_path)
    with pytest.raises(ValueError, match="the cases are whole demo"):
        versions.run(RECIPE, CPU, against=folders[1](), only="nonsense")
    for flags in (["versions"], ["step", "--against", str(tmp_path)]):
        assert main(["bench", *flags]) == 2
        assert "bench versions --against CHECKOUT" in capsys.readouterr().err


@pytest.mark.slow
def test_the_views_of_a_real_checkout_are_counted(tmp_path):
    here = Path(versions.__file__).resolve().parent.parent
    assert versions._views(here, CPU, RECIPE, tmp_path).value > 0
