"""Images that are not there are no bad images; what only watches a run does not stop it; a start leaves no folder."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from fastmoco.cli import main
from fastmoco.data import quarantine
from fastmoco.data.errors import DataError
from fastmoco.data.loader import Loader
from fastmoco.data.manifest import scan
from fastmoco.data.plan import Plan
from fastmoco.data.quarantine import Quarantine
from fastmoco.options import Options
from fastmoco.parallel import Parallel
from fastmoco.runs import checkpoint
from fastmoco.runs.lines import read_lines
from fastmoco.runs.run_folder import hold
from fastmoco.train import loop
from fastmoco.train.loop import pretrain

STEPS = 30


@pytest.fixture
def copy(images, tmp_path) -> Path:
    return Path(shutil.copytree(images, tmp_path / "data"))


def pretrain_here(recipe, out: Path, data: Path, **changes) -> dict:
    return pretrain(recipe, Options(data=data, out=out, device="cpu", threads=1, log_every=5, **changes))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def command_line(recipe, *more: str) -> list[str]:
    fields = ("width", "crop_size", "batch_size", "bn_group", "queue_size", "epochs", "knn_k")
    flags = [f"--{name.replace('_', '-')}={getattr(recipe, name)}" for name in fields]
    return ["pretrain", "demo", *flags, "--device=cpu", "--threads=1", "--no-knn", *more]


@pytest.mark.slow
def test_a_run_resumed_where_its_images_are_not_is_left_as_it_was(recipe, copy, tmp_path, monkeypatch, capsys):
    """Stopped, resumed from another folder, with the disk gone, empty and back: equal to the uncut run bit for bit."""
    monkeypatch.chdir(copy.parent)
    assert main(command_line(recipe, "--data=data", "--out=whole")) == 0
    assert main(command_line(recipe, "--data=data", "--out=run", "--stop-after=11")) == 0
    assert Path(json.loads(Path("run/recipe.json").read_text())["options"]["data"]) == copy
    before = contents(tmp_path / "run")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    resume = ["pretrain", "demo", "--resume", "--out=../run"]
    copy.rename(tmp_path / "gone")
    for empty in (False, True):  # a disk that is not mounted leaves an empty folder
        if empty:
            (copy / "train").mkdir(parents=True)
        capsys.readouterr()
        assert main(resume) == 3
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
        assert contents(tmp_path / "run") == before
    shutil.rmtree(copy)
    (tmp_path / "gone").rename(copy)
    assert main(resume) == 0
    one, other = (checkpoint.load(checkpoint.latest(tmp_path / name)) for name in ("whole", "run"))
    assert one.step == other.step == STEPS and not (tmp_path / "run" / quarantine.NAME).exists()
    assert [name for name in one.state if not torch.equal(one.state[name], other.state[name])] == []


def test_moved_images_are_said_and_checked(recipe, copy, images, tmp_path, capsys):
    pretrain_here(recipe, tmp_path / "run", copy, stop_after=6)
    moved = copy.rename(tmp_path / "moved")
    pretrain_here(recipe, tmp_path / "run", moved, resume=True, stop_after=8)
    assert f"the images are in {moved / 'train'} now, before in {copy / 'train'}: 8 of them" in capsys.readouterr().err
    assert json.loads((tmp_path / "run/recipe.json").read_text())["options"]["data"] == str(moved)
    # The control: other images under the same names.
    other = Path(shutil.copytree(moved, tmp_path / "other"))
    for path in (other / "train").rglob("*.jpg"):
        path.write_bytes(path.read_bytes() + b"\0")
    before = contents(tmp_path / "run")
    with pytest.raises(DataError, match="is not the image that the run was started with"):
        pretrain_here(recipe, tmp_path / "run", other, resume=True)
    assert contents(tmp_path / "run") == before


def test_an_archive_that_has_gone_is_named(recipe, copy, tmp_path):
    import tarfile

    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        archive.add(copy / "train", "")
    pretrain_here(recipe, tmp_path / "run", tmp_path / "set.tar", stop_after=4, knn=False)
    (tmp_path / "set.tar").unlink()
    with pytest.raises(DataError, match="set.tar: no such folder, list or tar"):
        pretrain_here(recipe, tmp_path / "run", tmp_path / "set.tar", resume=True)
    assert not (tmp_path / "run" / quarantine.NAME).exists()


def unreadable(count: int, total: int):
    """A reader that fails for `count` of every `total` images."""
    honest = loop.manifest.Manifest.read

    def read(self, index, *place):
        if index % total < count:
            raise OSError(5, "Input/output error")
        return honest(self, index, *place)

    return read


@pytest.mark.parametrize("loss", ["the folder", "every file", "every read"])
def test_images_that_go_while_a_run_reads_stop_it_without_a_record(loss, recipe, copy, tmp_path, monkeypatch):
    images = scan(copy / "train", cache=False)
    quarantine_ = Quarantine(images, tmp_path / quarantine.NAME, max_share=1.0)
    plan = Plan(recipe, images.sizes)
    with Loader(images, plan, Parallel(), range(100), quarantine=quarantine_) as batches:
        next(batches)
        if loss == "the folder":
            copy.rename(tmp_path / "unmounted")
        elif loss == "every file":
            for path in copy.rglob("*.jpg"):
                path.unlink()
        else:
            monkeypatch.setattr(type(images), "read", unreadable(1, 1))
        with pytest.raises(DataError, match="none was noted as bad") as error:
            for _ in batches:
                pass
    assert error.value.exit_code == 3 and not (tmp_path / quarantine.NAME).exists()


def test_a_file_that_goes_is_still_quarantined(recipe, copy, tmp_path):
    """The control: one image of forty is missing, and the others are there."""
    images = scan(copy / "train", cache=False)
    (copy / "train" / images.paths[7]).unlink()
    quarantine_ = Quarantine(images, tmp_path / quarantine.NAME, max_share=0.1)
    with Loader(images, Plan(recipe, images.sizes), Parallel(), range(5), quarantine=quarantine_) as batches:
        assert len(list(batches)) == 5
    assert [record.file for record in quarantine_.records()] == [images.paths[7]]


def spoil_val(data: Path, how: str) -> None:
    val = data / "val"
    if how == "another class":
        (val / "extra").mkdir()
        shutil.copy(next(val.rglob("*.jpg")), val / "extra/x.jpg")
    elif how == "empty":
        shutil.rmtree(val)
        val.mkdir()
    elif how == "a README only":
        shutil.rmtree(val)
        (data / "test").mkdir()
        (data / "test/README").write_text("to come")
    elif how == "a class of train is bad":
        for path in (data / "train/down").iterdir():
            path.write_bytes(b"")
        (data / "train/sideways").mkdir()
        shutil.copy(next((data / "train/across").iterdir()), data / "train/sideways/x.jpg")
    elif how == "bad files":
        for path in val.rglob("*.jpg"):
            jpeg = path.read_bytes()
            at = jpeg.index(b"\xff\xdb")
            path.write_bytes(jpeg[:at] + jpeg[at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big") :])


@pytest.mark.parametrize("how", ["another class", "empty", "a README only", "a class of train is bad", "bad files"])
def test_validation_images_never_stop_a_run(how, recipe, copy, tmp_path, capsys):
    spoil_val(copy, how)
    summary = pretrain_here(recipe, tmp_path / "run", copy, stop_after=2)
    assert summary["steps"] == 2 and summary["knn_after"] is None
    assert "no kNN evaluation" in capsys.readouterr().err


def test_a_gpu_without_memory_for_knn_is_a_warning(recipe, images, tmp_path, monkeypatch, capsys):
    def short_of_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(loop.knn, "evaluate", short_of_memory)
    assert pretrain_here(recipe, tmp_path / "run", images, stop_after=2)["steps"] == 2
    assert capsys.readouterr().err.count("no kNN evaluation from here on: CUDA out of memory") == 1
    assert read_lines(tmp_path / "run/knn.jsonl") == []


LATIN = os.fsdecode(b"caf\xe9.jpg")


def test_names_of_any_bytes(recipe, copy, tmp_path, capsys):
    down = copy / "train/down"
    down.rename(copy / "train" / os.fsdecode(b"vers le b\xe2s $x$"))
    (copy / "val/down").rename(copy / "val" / os.fsdecode(b"vers le b\xe2s $x$"))
    folder = copy / "train/across"
    shutil.copy(folder / "0.jpg", folder / LATIN)
    (folder / os.fsdecode(b"b\xe9d.jpg")).write_bytes(b"no image")
    assert main(["data", "scan", str(copy), "--json", str(tmp_path / "facts.json")]) == 0
    pretrain_here(recipe, tmp_path / "run", copy, stop_after=2)
    assert main(["evaluate", "knn", str(tmp_path / "run"), "--device=cpu"]) == 0
    assert main(["evaluate", "linear", str(tmp_path / "run"), "--fast", "--epochs=1", "--device=cpu"]) == 0
    assert main(["report", str(tmp_path / "run")]) == 0
    for end in ("npz", "parquet"):
        pytest.importorskip("pyarrow") if end == "parquet" else None
        out = tmp_path / f"features.{end}"
        assert main(["embed", str(tmp_path / "run"), "--data", str(copy / "train"), "--out", str(out)]) == 0


def test_a_start_that_fails_leaves_no_folder_behind(recipe, images, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("no")

    for owner, name in ((loop, "Monitor"), (loop.agreement, "compare")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fails)
            with pytest.raises(RuntimeError, match="no"):
                pretrain_here(recipe, tmp_path / "run", images, stop_after=1)
        assert not (tmp_path / "run").exists()
    pretrain_here(recipe, tmp_path / "run", images, stop_after=1, knn=False)
    with monkeypatch.context() as patch:  # the control: a run that was there stays
        patch.setattr(loop, "Monitor", fails)
        with pytest.raises(RuntimeError, match="no"):
            pretrain_here(recipe, tmp_path / "run", images, resume=True)
    assert checkpoint.latest(tmp_path / "run") is not None


def test_two_jobs_on_one_run_are_refused(recipe, images, tmp_path, capsys):
    pretrain_here(recipe, tmp_path / "run", images, stop_after=1, knn=False)
    lock = hold(tmp_path / "run")
    resume = ["pretrain", "demo", "--resume", f"--out={tmp_path / 'run'}", "--no-knn", "--stop-after=2", "--device=cpu"]
    assert main(resume) == 2
    assert "another process is training in" in capsys.readouterr().err
    lock.close()
    assert main(resume) == 0


def test_settings_that_are_seldom_meant_are_said(recipe, images, tmp_path, capsys):
    from dataclasses import replace

    odd = replace(recipe, queue_size=400, crop_size=8, lr=1e3, precision="fp16")
    notes = "\n".join(loop.prepare(odd, Options(data=images, out=tmp_path / "x"), "demo", Parallel()).notes)
    for text in ("more keys than there are images", "views of 8 pixels", "learning rate of 1000", "fp16"):
        assert text in notes
    plain = loop.prepare(replace(recipe, queue_size=8), Options(data=images, out=tmp_path / "x"), "demo", Parallel())
    assert "warning" not in "\n".join(plain.notes)


def test_few_images_get_a_remedy_that_works(recipe):
    sizes = np.full((16, 2), 40, np.int32)
    from dataclasses import replace

    from fastmoco.recipe import Recipe, RecipeError

    with pytest.raises(RecipeError, match="--batch-size 16 --bn-group 16"):
        Plan(Recipe(), sizes)
    assert Plan(replace(Recipe(), batch_size=16, bn_group=16), sizes).steps_per_epoch == 1


def test_the_chance_level_of_a_symmetric_loss_is_that_of_two():
    import math
    from dataclasses import replace

    from fastmoco.presets import PRESETS
    from fastmoco.train.expectation import chance_formula, chance_level

    v2 = PRESETS["v2"][1]
    assert chance_level(v2) == math.log(65537) and chance_formula(v2) == "ln(K+1)"
    assert chance_level(replace(v2, symmetric=True)) == 2 * math.log(65537)
    assert chance_formula(replace(v2, symmetric=True)) == "2 ln(K+1)"
