"""Runs on shards behind a URL end as runs on local ones do; a server that goes ends them in one line, for a while."""

from __future__ import annotations

import json
import math
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from data.shard_server import ShardServer

from fastmoco.cli import main
from fastmoco.data import manifest as manifest_module
from fastmoco.data import remote, shard_set
from fastmoco.data.manifest import ShardManifest
from fastmoco.data.quarantine import NAME as QUARANTINE
from fastmoco.evaluate import embed
from fastmoco.options import Options, UsageError
from fastmoco.parallel import Parallel
from fastmoco.recipe import Recipe
from fastmoco.runs import checkpoint
from fastmoco.train.job import places, prepare
from fastmoco.train.loop import pretrain
from fastmoco.train.record import announcement

pytest.importorskip("aiohttp")


@pytest.fixture
def server(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ShardServer]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.01)
    (tmp_path / "shards").mkdir()
    paths = sorted((images / "train").rglob("*.jpg"))
    for number in range(5):
        with tarfile.open(tmp_path / "shards" / f"{number}.tar", "w") as archive:
            for path in paths[number::5]:
                archive.add(path, path.relative_to(images / "train"))
    with ShardServer(tmp_path / "shards") as running:
        yield running


def run(recipe, data: object, out: Path, **changes: object) -> dict:
    options = {"device": "cpu", "threads": 1, "log_every": 5, "knn": False, "save_every": 1, "cache_gb": 0.01}
    return pretrain(recipe, Options(data=Path(str(data)), out=out, **{**options, "retry_seconds": 0.3, **changes}))


def weights(out: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(checkpoint.latest(out)).state


def equal(one: Path, other: Path) -> bool:
    ours, theirs = weights(one), weights(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["auto", "windows"])
def test_a_run_whose_server_goes_and_comes_back_ends_as_one_on_a_disk(
    recipe, server: ShardServer, tmp_path: Path, order: str, capsys: pytest.CaptureFixture
) -> None:
    recipe = replace(recipe, order=order, window_shards=2)
    run(recipe, server.folder, tmp_path / "near")
    cache = {"cache_gb": 0.01 if order == "windows" else 0}
    run(recipe, server.url, tmp_path / "far", stop_after=4, **cache)
    assert json.loads((tmp_path / "far" / "recipe.json").read_text())["options"]["data"] == server.url
    server.close()
    capsys.readouterr()
    limits = ["--retry-seconds", "0.2", "--cache-gb", "0", "--no-knn"]
    resume = ["pretrain", "demo", "--resume", "--device", "cpu", "--threads", "1", "--out", str(tmp_path / "far")]
    before = (tmp_path / "far" / "recipe.json").read_bytes()
    if order == "auto":
        assert main([*resume, *limits]) == 3
        (said,) = capsys.readouterr().err.strip().splitlines()
        assert "no image was noted as bad; repeat the command with --resume when the server is back" in said
        assert (tmp_path / "far" / "recipe.json").read_bytes() == before
    server.fault = lambda number: ("503", "cut", "lost", "slow")[number // 10 % 4] if number % 10 == 3 else ""
    server.open()
    run(recipe, server.url, tmp_path / "far", resume=True, retry_seconds=30, **cache)
    assert equal(tmp_path / "near", tmp_path / "far") and not (tmp_path / "far" / QUARANTINE).exists()


def test_a_window_without_room_in_the_cache_is_refused(recipe, server: ShardServer, tmp_path: Path) -> None:
    windows = replace(recipe, order="windows", window_shards=2)
    with pytest.raises(
        UsageError, match="--cache-gb 1e-05 does not hold a window of 2 shards .* fewer --window-shards"
    ):
        run(windows, server.url, tmp_path / "run", cache_gb=0.00001)
    assert not (tmp_path / "run").exists()


def test_validation_images_may_lie_behind_a_url_too(recipe, server: ShardServer, tmp_path: Path) -> None:
    own = Options(data=Path(f"{server.url}/{{0..3}}.tar"), val=Path(f"{server.url}/4.tar"), out=tmp_path / "run")
    own = places(replace(own, cache_gb=math.inf, retry_seconds=3), "demo", Parallel())
    job = prepare(recipe, own, "demo", Parallel())
    near = manifest_module.scan(server.folder / "4.tar")
    assert job.val_set is not None and job.val_set.labels.tolist() == near.labels.tolist()
    assert [job.val_set.read(i).tobytes() for i in range(8)] == [near.read(i).tobytes() for i in range(len(near))]
    assert len(job.train_set) == 32 and job.val_set.source.whole
    assert f"data {server.url}/{{0..3}}.tar, val {server.url}/4.tar" in next(announcement(job, "fp32", 0))
    assert not prepare(recipe, replace(own, cache_gb=0), "demo", Parallel()).val_set.source.whole  # has no room


def test_features_of_images_behind_a_url_keep_their_classes(server: ShardServer) -> None:
    for place in (server.url, Path(server.url)):  # which has one slash where the URL has two
        images, _ = embed._images_of(place, Recipe.max_pixels)
        assert images.labels is not None and images.classes == ["across", "down"]


def test_secrets_in_a_url_are_refused_before_anything_is_written(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["pretrain", "demo", "--data", "https://me:word@host/set", "--out", str(tmp_path / "run")]) == 2
    assert "word" not in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_what_a_run_began_with_before_there_was_a_choice_goes_on(recipe, images: Path, tmp_path: Path) -> None:
    """Recipes of older versions name no order: the run is resumed with a table."""
    run(recipe, images, tmp_path / "whole", stop_after=8)
    run(recipe, images, tmp_path / "run", stop_after=4)
    path = tmp_path / "run" / "recipe.json"
    facts = json.loads(path.read_text())
    assert facts["recipe"].pop("order") == "table" and facts["recipe"].pop("window_shards")
    path.write_text(json.dumps(facts))
    command = ["pretrain", "demo", "--resume", "--out", str(tmp_path / "run"), "--device", "cpu", "--threads", "1"]
    assert main([*command, "--no-knn", "--stop-after", "8"]) == 0
    assert equal(tmp_path / "whole", tmp_path / "run")
    assert main([*command, "--order", "keyed"]) == 2  # the control: no other order is taken
    assert torch.equal(weights(tmp_path / "run")["queue"], weights(tmp_path / "whole")["queue"])


@pytest.fixture
def shards(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The images in archives, whose order is that of the paths."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for part, each in (("train", 8), ("val", 6)):
        (tmp_path / "set" / part).mkdir(parents=True)
        paths = sorted((images / part).rglob("*.jpg"), key=str)
        for number in range(len(paths) // each):
            with tarfile.open(tmp_path / "set" / part / f"{number}.tar", "w") as archive:
                for path in paths[number * each :][:each]:
                    archive.add(path, path.relative_to(images / part))
    return tmp_path / "set"


@pytest.fixture
def table(shards: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Path]:
    """Has the archives share a table, as those of more than two million images do."""

    def share() -> Path:
        monkeypatch.setattr(manifest_module, "TABLE_UP_TO", 5)
        monkeypatch.setattr(shard_set, "LARGE_BYTES", 0)
        assert isinstance(manifest_module.scan(shards / "train"), ShardManifest)
        return shards

    return share


@pytest.mark.slow
def test_a_run_on_a_table_ends_as_one_on_a_list_of_the_same_images(
    recipe, shards: Path, table: Callable[[], Path], tmp_path: Path
) -> None:
    windows = replace(recipe, order="windows", window_shards=2)
    run(windows, shards, tmp_path / "list", stop_after=6)
    run(windows, table(), tmp_path / "run", stop_after=4)
    run(windows, shards, tmp_path / "run", stop_after=6, resume=True)
    assert equal(tmp_path / "list", tmp_path / "run")


@pytest.mark.slow
def test_every_command_takes_a_set_in_a_table(
    recipe, table: Callable[[], Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder, out = table(), str(tmp_path / "run")
    run(recipe, folder, tmp_path / "run", stop_after=2)
    for command in (
        ["data", "scan", str(folder)],
        ["evaluate", "knn", out, "--device", "cpu"],
        ["evaluate", "linear", out, "--fast", "--epochs", "1", "--lr", "1", "--device", "cpu"],
        ["embed", out, "--data", str(folder / "train"), "--out", str(tmp_path / "features.npz"), "--device", "cpu"],
        ["duplicates", out, "--device", "cpu"],
        ["report", out],
    ):
        assert main(command) == 0, (command, capsys.readouterr().err)
