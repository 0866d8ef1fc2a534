"""`--recipe FILE`: a file says what flags can, flags win over it, and what it cannot say is named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fastmoco import recipe_file
from fastmoco.cli import main, parse
from fastmoco.presets import PRESETS
from fastmoco.recipe import Recipe, RecipeError

V2 = PRESETS["v2"][1]


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text('preset = "v2"\narch = "resnet18"\nbatch-size = 128\nsymmetric = true\nmilestones = [3, 4]\n')
    path.write_text(path.read_text() + "shuffle_bn = false\n[augmentation]\nflip_p = 0.0\ncrop_scale = [0.5, 1.0]\n")
    return path


def chosen(tmp_path: Path, *words: str) -> Recipe:
    return parse(["pretrain", *words, "--data", str(tmp_path), "--out", str(tmp_path / "x")])[1].recipe


def test_a_toml_file_names_its_preset_and_what_differs(toml: Path, tmp_path: Path) -> None:
    views = replace(V2.augmentation, flip_p=0.0, crop_scale=(0.5, 1.0))
    expected = replace(V2, arch="resnet18", batch_size=128, symmetric=True, milestones=(3, 4), shuffle_bn=False)
    expected = replace(expected, augmentation=views)
    for words in (["--recipe", str(toml)], [f"--recipe={toml}"], ["v2", "--recipe", str(toml)]):
        assert chosen(tmp_path, *words) == expected
    assert chosen(tmp_path, "--recipe", str(toml), "--batch-size", "64") == replace(expected, batch_size=64)
    assert chosen(tmp_path, "v2", "--shuffle-bn", "--recipe", str(toml)) == replace(expected, shuffle_bn=True)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_printed_as_toml_is_itself_again(preset: str, tmp_path: Path, capsys) -> None:
    assert main(["presets", "--toml", preset]) == 0
    (tmp_path / "a.toml").write_text(capsys.readouterr().out)
    assert chosen(tmp_path, "--recipe", str(tmp_path / "a.toml")) == PRESETS[preset][1]


def test_a_run_is_a_recipe(tmp_path: Path) -> None:
    recipe, run = replace(V2, width=0.5, augmentation=replace(V2.augmentation, blur_p=0.1)), tmp_path / "run"
    run.mkdir()
    facts = {"preset": "v2", "recipe": recipe.as_dict(), "options": {"data": "/elsewhere"}}
    (run / "recipe.json").write_text(json.dumps(facts))
    for source in (run, run / "recipe.json"):
        found = parse(["pretrain", "--recipe", str(source), "--data", "/here", "--out", str(tmp_path / "x")])[1]
        assert found.recipe == recipe and found.preset == "v2" and found.options.data == Path("/here")
    (run / "recipe.json").write_text(json.dumps(facts | {"preset": "custom"}))
    assert chosen(tmp_path, "--recipe", str(run)) == recipe


def test_every_field_survives_the_way_through_flags(tmp_path: Path) -> None:
    """A control that nothing is left out: all fields of a preset, from another one."""
    for preset, (_, recipe) in PRESETS.items():
        words = recipe_file.words(recipe_file.differences(V2, recipe))
        assert chosen(tmp_path, "v2", *words) == recipe, preset
    assert recipe_file.words({"knn": False, "symmetric": True, "lr": 1e-5, "data": None, "milestones": (1, 2)}) == [
        *("--no-knn", "--symmetric", "--lr=1e-05", "--milestones", "1", "2")
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('preset = "v2"\ntemprature = 0.1\n', "a recipe has no 'temprature': perhaps you meant temperature"),
        ('preset = "v2"\nthreads = 4\n', "a recipe has no 'threads'"),
        ('preset = "v9"\n', "there is no preset 'v9': use one of v1, v2"),
        ("batch_size = 64\n", "names no preset"),
        ('preset = "v2"\nbatch_size = \n', "is damaged"),
        ('preset = "v2"\nbatch_size = 300\n', "use --batch-size 288 or 320"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line(text: str, says: str, tmp_path: Path, capsys) -> None:
    (tmp_path / "a.toml").write_text(text)
    where = ["--data", str(tmp_path), "--out", str(tmp_path / "x")]
    assert main(["pretrain", "--recipe", str(tmp_path / "a.toml"), *where]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1


def test_another_preset_than_the_files_or_no_file_is_refused(toml: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="starts from preset v2, not v1"):
        chosen(tmp_path, "v1", "--recipe", str(toml))
    with pytest.raises(RecipeError, match="give a run, its recipe.json, or a TOML file"):
        chosen(tmp_path, "--recipe", str(tmp_path / "none.toml"))


def test_a_resumed_run_keeps_its_recipe(toml: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.json").write_text(json.dumps({"preset": "v2", "recipe": V2.as_dict(), "options": {}}))
    with pytest.raises(ValueError, match="was started with"):
        parse(["pretrain", "v2", "--recipe", str(toml), "--resume", "--out", str(run)])


def test_the_presets_are_listed(capsys) -> None:
    assert main(["presets"]) == 0
    shown = capsys.readouterr().out
    assert all(f"{name}\n" in shown and about in shown for name, (about, _) in PRESETS.items())
    assert main(["presets", "--toml", "v9"]) == 2 and "use one of v1" in capsys.readouterr().err
