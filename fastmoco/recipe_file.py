"""Recipes in files: a run's recipe.json, or a short TOML of what differs from a preset.

    preset = "v2"
    arch = "resnet18"
    batch_size = 128
    flip_p = 0.0

Values become the flags that they stand for, so a file can say what the command line can, and is checked alike.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fastmoco.presets import PRESETS
from fastmoco.recipe import Augmentation, Recipe, RecipeError

FIELDS = {field.name for kind in (Recipe, Augmentation) for field in dataclasses.fields(kind)} - {"augmentation"}
RUN_FILE = "recipe.json"


class RecipeFile(NamedTuple):
    """What a file says."""

    preset: str | None
    """The preset that it starts from, where it names one."""
    values: dict[str, Any]
    """Values of fields, by name; those of the augmentation stand beside the others."""


def read(path: Path) -> RecipeFile:
    """A recipe file, or that of the run `path`; raises RecipeError if it is damaged or says the unknown."""
    file = path / RUN_FILE if path.is_dir() else path
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not a text"
        raise RecipeError(f"{file}: {why}: give a run, its recipe.json, or a TOML file") from error
    data = _parse(file, text)
    preset = data.pop("preset", None)
    if preset is not None and preset not in PRESETS and "recipe" not in data:
        raise RecipeError(f"{file}: there is no preset {preset!r}: use one of {', '.join(PRESETS)}")
    if isinstance(data.get("recipe"), dict):  # what a run wrote: whole, and perhaps by an older version
        preset = preset if preset in PRESETS else "v1"
        asked = Recipe.from_dict(data["recipe"] | data.get("left_open", {}))  # other images settle it anew
        return RecipeFile(preset, differences(PRESETS[preset][1], asked))
    values = flat({name.replace("-", "_"): value for name, value in data.items()})
    for name in values:
        if name not in FIELDS:
            near = difflib.get_close_matches(name, FIELDS, 1)
            raise RecipeError(
                f"{file}: a recipe has no {name!r}: " + (f"perhaps you meant {near[0]}" if near else "leave it out")
            )
    return RecipeFile(preset, values)


def preset_of(path: Path) -> str:
    """The preset that a file starts from; raises RecipeError if it names none."""
    preset = read(path).preset
    if preset is None:
        raise RecipeError(f'{path} names no preset: give one before --recipe, or write preset = "v2" at its top')
    return preset


def words(values: Mapping[str, Any]) -> list[str]:
    """Values by field as the words of a command line; None stands for a flag that is not given."""
    return [word for name, value in values.items() for word in _words(f"--{name.replace('_', '-')}", value)]


def differences(base: Recipe, recipe: Recipe) -> dict[str, Any]:
    """Fields of `recipe` that differ from `base`, with its values; those of the augmentation beside the others."""
    usual = flat(base.as_dict())
    return {name: value for name, value in flat(recipe.as_dict()).items() if value != usual[name]}


def flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields with those of the augmentation beside the others, as flags are."""
    inner = values.get("augmentation", {})
    return {name: value for name, value in values.items() if name != "augmentation"} | dict(inner)


def toml(preset: str) -> str:
    """The preset as a TOML file that lists every field."""
    about, recipe = PRESETS[preset]
    lines = [f"# {about}", f'preset = "{preset}"', ""]
    return "\n".join(lines + [f"{name} = {json.dumps(value)}" for name, value in flat(recipe.as_dict()).items()])


def _parse(file: Path, text: str) -> dict[str, Any]:
    try:
        data = json.loads(text) if file.suffix == ".json" else tomllib.loads(text)
    except (json.JSONDecodeError, tomllib.TOMLDecodeError) as error:
        raise RecipeError(f"{file} is damaged ({error}): mend that place") from error
    if not isinstance(data, dict):
        raise RecipeError(f"{file} holds no fields of a recipe: write name = value")
    return data


def _words(flag: str, value: Any) -> Iterator[str]:
    if isinstance(value, bool):
        yield flag if value else f"--no-{flag[2:]}"
    elif isinstance(value, (tuple, list)):
        yield flag
        yield from map(str, value)
    elif value is not None:
        yield f"{flag}={value}"
