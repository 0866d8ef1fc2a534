"""`fastmoco.pretrain` is the command: the same run from the same words, and mistakes as exceptions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fastmoco
from fastmoco.cli import main
from fastmoco.options import UsageError
from fastmoco.recipe import RecipeError

FEW = {"device": "cpu", "threads": 1, "knn": False}


def test_a_run_from_python_is_the_commands_bit_for_bit(images: Path, recipe, flags, tmp_path: Path) -> None:
    where = ["--data", str(images), "--out", str(tmp_path / "command"), "--device", "cpu", "--threads", "1", "--no-knn"]
    assert main(["pretrain", "demo", *flags, *where, "--stop-after", "3"]) == 0
    summary = fastmoco.pretrain(recipe, images, tmp_path / "python", stop_after=3, **FEW)
    assert summary["steps"] == 3 and summary["out"] == str(tmp_path / "python") and not summary["stopped"]
    ours, theirs = (fastmoco.load(tmp_path / name).state_dict() for name in ("python", "command"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    facts = [json.loads((tmp_path / name / "recipe.json").read_text()) for name in ("python", "command")]
    assert facts[0]["recipe"] == facts[1]["recipe"]

    longer = fastmoco.pretrain("demo", out=tmp_path / "python", resume=True, stop_after=4, **FEW)
    assert longer["steps"] == 4 and fastmoco.load(longer["out"]).step == 4


def test_a_recipe_file_and_settings_reach_the_run(images: Path, recipe, tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(fastmoco_toml(recipe))
    facts = fastmoco.pretrain(tmp_path / "a.toml", images, tmp_path / "run", batch_size=4, dry_run=True, **FEW)
    assert facts["images"] == 40 and facts["steps"] == 60 and not (tmp_path / "run").exists()


def fastmoco_toml(recipe) -> str:
    from fastmoco import recipe_file

    values = recipe_file.differences(fastmoco.PRESETS["demo"][1], recipe)
    return 'preset = "demo"\n' + "\n".join(f"{name} = {json.dumps(value)}" for name, value in values.items())


def test_mistakes_are_exceptions_before_anything_is_written(images: Path, recipe, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(TypeError, match="no setting 'epoch': perhaps you meant epochs"):
        fastmoco.pretrain("v2", images, out, epoch=3)
    with pytest.raises(UsageError, match="v3 is no preset and no file"):
        fastmoco.pretrain("v3", images, out)
    with pytest.raises(UsageError, match="needs data PATH"):
        fastmoco.pretrain("v2", out=out)
    with pytest.raises(RecipeError, match="use batch_size 288 or 320"):
        fastmoco.pretrain("v2", images, out, batch_size=300)
    with pytest.raises(UsageError, match="epochs"):
        fastmoco.pretrain("v2", images, out, epochs="many")
    with pytest.raises(UsageError, match="was started with"):
        fastmoco.pretrain(recipe, images, out, stop_after=1, **FEW)
        fastmoco.pretrain(replace(recipe, temperature=0.3), out=out, resume=True)
    with pytest.raises(UsageError, match="continue it with resume, or give out another name"):
        fastmoco.pretrain(recipe, images, out)
    assert (out / "recipe.json").is_file()
