"""`data scan` lists exactly the broken files, remembers what it knows, and says it all on paper and as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from fastmoco.cli import main
from fastmoco.data.manifest import Manifest, scan
from fastmoco.data.pipeline import undecodable

INSIDE = {"no tables", "harmed webp", "harmed png", "cut tiff"}


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def check_full_scan(folder: Path, names: dict[str, str], broken: set[str]) -> None:
    quick, full = scan(folder), scan(folder, decode=undecodable)
    by_file = {name: kind for kind, name in names.items()}
    assert {by_file[path] for path, _ in quick.rejected} == broken - INSIDE
    assert {by_file[path] for path, _ in full.rejected} == broken  # no more: the odd ones are good
    assert all(reason for _, reason in full.rejected)


def broken(names: dict[str, str]) -> set[str]:
    odd = {"grey", "cmyk", "progressive", "sixteen", "palette", "rgba", "webp", "rotated"}
    assert odd <= names.keys() and len(names) == 18
    return names.keys() - odd


def test_a_full_scan_lists_exactly_the_broken_files(
    tmp_path: Path, write_set: Callable[[Path, int], dict[str, str]]
) -> None:
    names = write_set(tmp_path / "data", 200)
    check_full_scan(tmp_path / "data", names, broken(names))


@pytest.mark.slow
def test_a_full_scan_of_2000_files(tmp_path: Path, write_set: Callable[[Path, int], dict[str, str]]) -> None:
    names = write_set(tmp_path / "data", 2000)
    check_full_scan(tmp_path / "data", names, broken(names))


def test_a_second_full_scan_decodes_only_what_is_new(
    tmp_path: Path, write_set: Callable[[Path, int], dict[str, str]]
) -> None:
    write_set(tmp_path / "data", 200)
    first, calls = scan(tmp_path / "data", decode=undecodable), []

    def counted(manifest: Manifest, threads: int | None) -> Iterable[str]:
        calls.append(list(manifest.paths))
        return undecodable(manifest, threads)

    again = scan(tmp_path / "data", decode=counted)
    assert again.rejected == first.rejected and again.paths == first.paths and calls == []
    assert scan(tmp_path / "data").rejected == first.rejected  # a quick scan knows what a full one found
    (tmp_path / "data" / "new.jpg").write_bytes((tmp_path / "data" / first.paths[0]).read_bytes())
    assert len(scan(tmp_path / "data")) == len(first) + 1 and calls == []
    assert len(scan(tmp_path / "data", decode=counted)) == len(first) + 1 and calls == [["new.jpg"]]


def test_the_command_prints_and_writes_what_it_found(
    tmp_path: Path, write_set: Callable[[Path, int], dict[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    names = write_set(tmp_path / "data" / "train" / "a", 200)
    write_set(tmp_path / "data" / "train" / "b", 200)
    write_set(tmp_path / "data" / "val" / "b", 200)
    assert main(["data", "scan", str(tmp_path / "data"), "--full", "--json", str(tmp_path / "facts.json")]) == 0
    output = capsys.readouterr().out
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["training"]["images"] == 380 and facts["training"]["classes"] == {"a": 190, "b": 190}
    assert {entry["file"] for entry in facts["validation"]["left_out"]} == {f"b/{names[k]}" for k in broken(names)}
    stored = sum(path.stat().st_size for path in (tmp_path / "data" / "val").rglob("*.jpg"))
    assert 0.5 * stored < facts["validation"]["bytes"] < stored
    for line in ("classes   2, of 190 to 190 images", "left out  20", f"a/{names['gif']}", "not an image: 2"):
        assert line in output, line
    assert "\r" not in capsys.readouterr().err  # no bar where there is no terminal
    assert main(["data", "scan", str(tmp_path / "data"), "--max-pixels", "3600"]) == 0
    assert "pixels, over the limit of 3600: " in capsys.readouterr().out
