"""Commands as functions: `fastmoco.pretrain`."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastmoco import cli, environment, recipe_file
from fastmoco.options import Options, UsageError, check_places
from fastmoco.presets import PRESETS
from fastmoco.recipe import Recipe, RecipeError
from fastmoco.runs.facts import RECIPE

FRAMES = re.compile(r"[│╭╰─╮╯]+")
SETTINGS = recipe_file.FIELDS | {field.name for field in dataclasses.fields(Options)}


def pretrain(
    recipe: str | os.PathLike | Recipe,
    data: str | os.PathLike | None = None,
    out: str | os.PathLike | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Pretrain an encoder on the images of `data` and write the run to `out`: the command `fastmoco pretrain`.

    `recipe` is the name of a preset ("v2"), a recipe file (a run's recipe.json or a TOML file), or a `Recipe`.
    `settings` are the command's flags with underscores: fields of `Recipe` and of its augmentation (`epochs=100`,
    `flip_p=0.0`), and options (`threads=4`, `stop_after=1000`, `resume=True`, `device="cpu"`). The preset demo brings
    its own images and folder; all others need `data` and `out`, and `out` must be new unless `resume` is true.

        summary = fastmoco.pretrain("v2", "photos", "runs/photos", arch="resnet18", queue_size="auto", epochs=400)
        encoder = fastmoco.load(summary["out"])

    Returns what RUN/summary.json holds (steps, loss, top1, pairs_per_s, knn_before, knn_after, seconds ...), `out`, and
    `stopped`, which is true where Ctrl-C or a signal ended the run early, saved: go on with `resume=True`.

    Raises TypeError if there is no such setting, UsageError or RecipeError if a value cannot work, before anything is
    written; raises DataError if images are bad, CheckpointError if nothing can be resumed, NonFiniteError if training
    diverged.
    """
    unknown = sorted(set(settings) - SETTINGS)
    if unknown:
        near = difflib.get_close_matches(unknown[0], SETTINGS, 1)
        hint = f": perhaps you meant {near[0]}" if near else ""
        raise TypeError(f"pretrain() has no setting {unknown[0]!r}{hint}")
    flags = recipe_file.words({"data": data, "out": out, **settings})
    environment.spin_briefly()
    with _in_words_of_python():
        preset, before = _started_from(recipe, Path(out) if out is not None and settings.get("resume") else None)
        run = _pretrain_flags(preset, [*before, *flags])
        check_places(preset, run.options)
        from fastmoco.train.loop import pretrain as train

        return train(run.recipe, run.options, preset)


@contextlib.contextmanager
def _in_words_of_python() -> Iterator[None]:
    # A remedy names what is to be changed: here arguments, --batch-size being batch_size and --no-knn knn=False.
    try:
        yield
    except (UsageError, RecipeError) as error:
        text = re.sub(r"--no-([a-z-]+)", lambda flag: f"{flag[1]}=False", str(error))
        text = re.sub(r"--([a-z][a-z-]*)", lambda flag: flag[1].replace("-", "_"), text)
        raise type(error)(text) from error


def _started_from(recipe: str | os.PathLike | Recipe, resumed: Path | None) -> tuple[str, list[str]]:
    """Name of the preset, and the flags that make the recipe from it."""
    if isinstance(recipe, Recipe):
        changes = {name: recipe_file.differences(known, recipe) for name, (_, known) in PRESETS.items()}
        # Its name is that of the preset it is nearest to; but a run keeps the name that it was started with.
        name = min(changes, key=lambda name: len(changes[name]))
        if resumed is not None and (resumed / RECIPE).is_file():
            name = recipe_file.preset_of(resumed)
        return name, recipe_file.words(changes[name])
    if recipe in PRESETS:
        return str(recipe), []
    if not Path(recipe).exists():
        raise UsageError(f"{recipe} is no preset and no file: use a Recipe, a file, or one of {', '.join(PRESETS)}")
    return recipe_file.preset_of(Path(recipe)), [f"--recipe={os.fspath(recipe)}"]


def _pretrain_flags(preset: str, words: list[str]) -> Any:
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output):
            return cli.pretrain_settings(preset, words)
    except SystemExit as stop:  # a value of the wrong kind: the parser has printed why
        cause = " ".join(FRAMES.sub(" ", output.getvalue()).split()).removeprefix("Missing argument ")
        cause = cause.removeprefix("Value error ").partition(" Argument helptext")[0]
        raise UsageError(cause.partition(" For full helptext")[0]) from stop
