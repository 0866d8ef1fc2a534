"""`--dry-run` tells the size of a run, tries it small, and writes none."""

from __future__ import annotations

import math
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from fastmoco.cli import main
from fastmoco.data.manifest import scan
from fastmoco.options import Options
from fastmoco.parallel import Parallel
from fastmoco.recipe import RecipeError
from fastmoco.train import dry_run
from fastmoco.train.dry_run import Knn, Trial, _extrapolate, _sizes
from fastmoco.train.job import prepare


def test_it_tells_images_steps_memory_and_time_and_writes_nothing(images: Path, flags, tmp_path: Path, capsys) -> None:
    before = sorted(tmp_path.rglob("*"))
    where = ["--data", str(images), "--device", "cpu", "--threads", "1"]
    assert main(["pretrain", "demo", *flags, *where, "--out", str(tmp_path / "run"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert f"images: 40 in {images}/train" in said and "steps: 30 of 8 pairs, 5 an epoch, 6 epochs" in said
    assert (
        "by batches of 4 and 8 and one of kNN; 0." in said and "GB of it for decoded images (--decoded-cache)" in said
    )
    assert "pairs/s" in said and "no run was written" in said
    assert sorted(tmp_path.rglob("*")) == before


def test_later_epochs_of_a_kept_set_are_cut_and_not_decoded(
    images: Path, recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = {8: 100.0, 40: 20.0}  # of the few images that stand for later epochs, and of the first
    monkeypatch.setattr(dry_run, "_rate", lambda job, images, *rest: rates[len(images)])
    for cache, expected in ((None, 6 / (1 / 20 + 5 / 100)), (0.0, 20.0), (1e-6, 20.0)):
        options = Options(data=images, device="cpu", threads=1, decoded_cache=cache)
        options = replace(options, out=tmp_path / "run")
        job = prepare(replace(recipe, epochs=6), options, "demo", Parallel())
        assert dry_run._rate_of_loader(job, 8) == pytest.approx(expected)


@pytest.mark.parametrize("knn", [True, False])
def test_images_that_are_kept_count_those_of_validation_too(
    images: Path, recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, knn: bool
) -> None:
    monkeypatch.setattr(dry_run, "_trial", lambda job, pairs: Trial(pairs, 1, 1.0))
    monkeypatch.setattr(dry_run, "_rate", lambda *_: 1.0)
    monkeypatch.setattr(dry_run, "_knn", lambda *_: Knn(2, 52, 1.0, 0.5))
    options = Options(data=images, out=tmp_path / "run", device="cpu", threads=1, knn=knn, decoded_cache=math.inf)
    sets = (scan(images / name, cache=False).sizes for name in ("train", "val")[: 1 + knn])
    expected = 1 + sum(3 * int(sizes.prod(1).sum()) for sizes in sets) / 2**30
    assert dry_run.estimate(recipe, options, "demo")["memory"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("cache", [None, 0.0])
def test_shards_in_windows_are_tried_too(images: Path, recipe, tmp_path: Path, cache: float | None) -> None:
    """With a cache few of the images stand for all, and their windows are of what these few shards hold."""
    (tmp_path / "shards").mkdir()
    paths = sorted((images / "train").rglob("*.jpg"))
    for number in range(5):
        with tarfile.open(tmp_path / "shards" / f"{number}.tar", "w") as archive:
            for path in paths[number::5]:
                archive.add(path, path.relative_to(images / "train"))
    windows = replace(recipe, order="windows", window_shards=1)
    options = Options(data=tmp_path / "shards", out=tmp_path / "run", device="cpu", threads=1, decoded_cache=cache)
    assert dry_run.estimate(windows, options, "demo")["pairs_per_s"] > 0
    # The control: of images in no shards there are no windows.
    with pytest.raises(RecipeError, match="order windows needs images in tar archives"):
        dry_run.estimate(windows, replace(options, data=images), "demo")


def test_a_run_that_cannot_start_is_refused_as_the_run_itself(images: Path, flags, tmp_path: Path, capsys) -> None:
    where = ["--data", str(images), "--device", "cpu", "--dry-run"]
    assert main(["pretrain", "demo", *flags, *where, "--batch-size", "80"]) == 2
    assert "more than the 40 images" in capsys.readouterr().err
    assert main(["pretrain", "v2", "--dry-run"]) == 2 and "needs --data" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("group", "per_rank", "sizes"), [(32, 256, [32, 64]), (32, 32, [32]), (0, 8, [4, 8]), (0, 4096, [32, 64])]
)
def test_trials_are_small(recipe, group: int, per_rank: int, sizes: list[int]) -> None:
    assert _sizes(replace(recipe, batch_size=4096, bn_group=group), per_rank) == sizes


def test_memory_grows_with_the_batch_on_top_of_what_is_fixed() -> None:
    assert _extrapolate([Trial(32, 1, 2.0), Trial(64, 1, 3.0)], 256) == pytest.approx(9.0)
    assert _extrapolate([Trial(16, 1, 2.0)], 16) == 2.0


def test_a_batch_that_does_not_fit_is_refused_in_the_runs_own_words(images: Path, tmp_path: Path, capsys) -> None:
    """And not with the size of a trial's batch, which nobody gave."""
    where = [f"--data={images}", f"--out={tmp_path / 'run'}", "--device=cpu", "--no-knn"]
    said = []
    for more in ([], ["--dry-run"]):
        assert main(["pretrain", "small", *where, *more]) == 2
        said.append(capsys.readouterr().err.splitlines()[-1])
    assert said[0] == said[1] and "batch_size 128 is more than the 40 images" in said[0]


def test_knn_evaluations_are_counted_in_time_and_memory(
    images: Path, recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(dry_run, "_trial", lambda job, pairs: Trial(pairs, 1.0, 0.001))
    monkeypatch.setattr(dry_run, "_rate", lambda *_: 1.0)
    options = Options(data=images, out=tmp_path / "run", device="cpu", threads=1, decoded_cache=0)
    without = dry_run.estimate(recipe, replace(options, knn=False), "demo")
    assert without["knn_seconds"] == 0 and without["memory"] < 0.01 and "kNN" not in capsys.readouterr().out
    twice = dry_run.estimate(recipe, options, "demo")
    assert twice["memory"] > 0.05  # the whole process, which imported torch and encoded a batch
    assert twice["seconds"] == pytest.approx(without["seconds"] + twice["knn_seconds"]) and twice["knn_seconds"] > 0
    assert "for 2 kNN evaluations of 52 images" in capsys.readouterr().out
    dry_run.estimate(recipe, replace(options, knn_every=2), "demo")
    # Before step 0, after epochs 2 and 4, and at the end: those that a run of six epochs writes down.
    assert "for 4 kNN evaluations of 52 images" in capsys.readouterr().out
