"""`fastmoco.load`: the encoder of a run, of one of its checkpoints, or of a file that `import` takes."""

from __future__ import annotations

import json
import os
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from fastmoco.interop import foreign
from fastmoco.interop.foreign import ForeignFileError
from fastmoco.interop.load import convert
from fastmoco.options import Import, UsageError
from fastmoco.parallel import Parallel
from fastmoco.recipe import Recipe, RecipeError
from fastmoco.runs import checkpoint
from fastmoco.runs.facts import RECIPE
from fastmoco.runs.pretrained import Pretrained, pretrained
from fastmoco.runs.run_folder import QUERY, load_encoder, without


def load(source: str | os.PathLike, *, device: str = "auto", untrained: bool = False) -> Pretrained:
    """The pretrained encoder of `source`: an `nn.Module` in evaluation mode, frozen, in fp32.

    `source` is the folder of a run (its newest good checkpoint), one checkpoint (RUN/checkpoints/step_00000300), what
    `fastmoco export` wrote, or a file that `fastmoco import` takes: a MoCo v1 or v2 checkpoint (.pth.tar), or plain
    weights of a ResNet (.pth, .safetensors), whose head is then as the seed draws it. `device` is auto (a GPU where
    there is one), cpu, cuda or cuda:N. `untrained` gives a run's network before its first step, to compare with.

        encoder = fastmoco.load("runs/demo")
        images = torch.stack([encoder.transform(picture) for picture in ("a.jpg", "b.jpg")])   # [2, 3, S, S]
        features = encoder.features(images)                                                    # [2, feature_dim]

    `encoder.recipe` says how it was trained, `encoder.step` for how long. For whole folders `fastmoco.embed` is faster.

    Raises UsageError if there is no such run, CheckpointError if it has no good checkpoint, ForeignFileError if a file
    is damaged, unsafe or of another kind, ValueError if the device cannot be had. Nothing in a file is executed.
    """
    place, parallel = Path(source), Parallel.alone(device)
    if (place / checkpoint.MANIFEST).is_file():
        return _of_checkpoint(place.resolve(), parallel, untrained)  # `latest` is a link
    if place.is_dir() and ((place / RECIPE).is_file() or not (place / checkpoint.MODEL).is_file()):
        return load_encoder(place, parallel, untrained)[0]
    if place.name == checkpoint.MODEL and (place.parent / checkpoint.MANIFEST).is_file():
        return _of_checkpoint(place.parent, parallel, untrained)
    if not place.exists():
        raise UsageError(f"{place}: no such run, checkpoint or file: check the path")
    file = place / checkpoint.MODEL if place.is_dir() else place
    recipe, weights, step = _of_export(file) or _of_import(file)
    return pretrained(recipe, None if untrained else weights, 0 if untrained else step, parallel.device)


Weights = tuple[Recipe, dict[str, Tensor], int]


def _of_import(file: Path) -> Weights:
    weights = convert(foreign.read(file), Import(file, out=file))
    return weights.recipe, without(QUERY, weights.state), weights.step


def _of_export(file: Path) -> Weights | None:
    """What `export --format safetensors` wrote, whose header has the recipe; None for any other file."""
    if file.suffix != ".safetensors":
        return None
    weights = foreign.read(file)  # refuses what is no such file
    with safe_open(file, "pt") as opened:
        facts = opened.metadata() or {}
    if "recipe" not in facts:
        return None
    try:
        return Recipe.from_dict(json.loads(facts["recipe"])), weights, int(facts["step"])
    except (RecipeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ForeignFileError(f"{file} does not hold the recipe that it should ({error}): export it again") from error


def _of_checkpoint(path: Path, parallel: Parallel, untrained: bool) -> Pretrained:
    saved = checkpoint.load(path)
    recipe = Recipe.from_dict(saved.meta["recipe"])
    weights = None if untrained else without(QUERY, saved.state)
    return pretrained(recipe, weights, 0 if untrained else saved.step, parallel.device)
