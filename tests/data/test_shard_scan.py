"""A scan by shards says what one of a folder says, in parts or at once, and reads no shard twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from data import test_remote
from data.shard_server import ShardServer

from fastmoco.cli import main
from fastmoco.data import pieces
from fastmoco.data.manifest import scan

own_places, shards, server = test_remote.own_places, test_remote.shards, test_remote.server
FACTS = ("images", "bytes", "classes", "height", "width", "transparent", "passed_over", "decoded", "archives")


def scanned(path: object, out: Path, *flags: str) -> dict:
    assert main(["data", "scan", str(path), "--json", str(out), *flags]) == 0
    return json.loads(out.read_text())["training"]


@pytest.mark.parametrize("full", [False, True])
def test_a_scan_by_shards_agrees_with_one_of_files(
    shards: Path, server: ShardServer, tmp_path: Path, full: bool
) -> None:
    flags = ["--full"] if full else []
    files, far = scanned(shards, tmp_path / "a", *flags), scanned(server.url, tmp_path / "b", *flags)
    assert {name: files[name] for name in FACTS} == {name: far[name] for name in FACTS}
    assert sorted(row["file"] for row in files["left_out"]) == sorted(row["file"] for row in far["left_out"])
    if full:
        assert far["one_colour"]["images"] == files["one_colour"]["images"]


def test_ranges_are_scanned_apart_and_joined(
    shards: Path, server: ShardServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    whole = scanned(shards, tmp_path / "whole")
    for machine in range(3):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"machine {machine}"))
        first = str(2 * machine)
        part = scanned(
            server.url, tmp_path / "p", "--shards", first, str(2 * machine + 2), "--index", str(tmp_path / "ix")
        )
        assert part["archives"] == 2 and not (tmp_path / "ix" / "shards.json").exists()
    assert "in 2 of 6 archives" in capsys.readouterr().out
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "last"))
    monkeypatch.setattr(pieces, "read", lambda *_: pytest.fail("a shard was read"))
    joined = scanned(server.url, tmp_path / "joined", "--index", str(tmp_path / "ix"))
    assert {name: whole[name] for name in FACTS} == {name: joined[name] for name in FACTS}
    # Copied beside the shards, the index opens the set on a machine that knows nothing of it.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "fresh"))
    near = server.folder
    for path in (tmp_path / "ix").rglob("*"):
        if path.is_file():
            (near / path.relative_to(tmp_path / "ix")).parent.mkdir(exist_ok=True)
            path.rename(near / path.relative_to(tmp_path / "ix"))
    assert len(scan(server.url)) == whole["images"]


def test_a_sample_is_spread_over_the_set(server: ShardServer, tmp_path: Path) -> None:
    part = scanned(server.url, tmp_path / "part", "--sample", "2")
    assert part["archives"] == 2 and part["of"] == 6 and 30 < part["images"] < 40
    assert {name for name, count in server.sent.items() if name.endswith(".tar")} == {"000001.tar", "000004.tar"}


def test_wrong_use_is_one_line(
    server: ShardServer, photo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["data", "scan", server.url, "--shards", "4", "9"]) == 2
    assert "there are 6: use 0 to 6" in capsys.readouterr().err
    assert main(["data", "scan", str(photo_folder), "--sample", "2"]) == 2
    assert "is no set of shards alone" in capsys.readouterr().err
    assert main(["data", "scan", str(tmp_path / "none"), "--sample", "2"]) == 2
