"""`import FILE --out RUN`: published MoCo checkpoints and torchvision weights as a run of ours.

The run can be evaluated, exported and continued with `pretrain --resume`. A MoCo checkpoint brings both encoders, the
queue and the momentum; the momentum update that the released code still owes is applied. Weights of a plain network
bring the backbone: both encoders start from it at step 0, with a fresh projection head and queue.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmoco import atomic, environment
from fastmoco.contrast.step import Step
from fastmoco.data import manifest
from fastmoco.interop import foreign, upstream
from fastmoco.interop.foreign import ForeignFileError
from fastmoco.interop.names import BODY, backbone, inner_network, is_parameter, recognise
from fastmoco.options import Import, UsageError, require_new
from fastmoco.parallel import Parallel
from fastmoco.presets import PRESETS
from fastmoco.recipe import Recipe, RecipeError
from fastmoco.runs import checkpoint
from fastmoco.runs.facts import RECIPE
from fastmoco.runs.run_folder import KEY, QUERY, without
from fastmoco.terminal import counted

FIRST_NORM = "encoder_q.bn1.num_batches_tracked"  # advances once a step, so it counts the steps of a published file
IMAGENET = 1_281_167  # images that published checkpoints were trained on


class ImportedRun(NamedTuple):
    """A file as a run of ours."""

    recipe: Recipe
    state: dict[str, Tensor]
    """By the names of `Step.state`."""
    step: int
    precision: str
    preset: str
    notes: list[str]
    """What the file lacked, and what stands in its place."""


def convert(content: Mapping[str, Any], options: Import, images: int | None = None) -> ImportedRun:
    """`content` of a checkpoint file as a run; raises ForeignFileError if it is none of the kinds that are known.

    `images` is the size of the set that training goes on with.
    """
    weights = upstream.weights_of(content)
    if not without(QUERY, weights) and not _is_v3(weights):
        weights = {ours: weights[theirs] for ours, theirs in inner_network(weights).items()} or weights
    _check_kind(weights, options.file)
    try:
        if isinstance(content.get(upstream.OWN), dict):
            return _own(content, weights, content[upstream.OWN], options)
        if without(QUERY, weights):
            return _from_published(content, weights, options, images)
        return _plain(weights, options)
    except (ForeignFileError, RecipeError, UsageError):
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
        # Right names, and something under them that no checkpoint has there.
        raise ForeignFileError(f"{options.file} is not laid out as a checkpoint is ({error!r})") from error


def command(options: Import) -> None:
    """`import FILE`: write RUN and say what was found."""
    assert options.out is not None
    require_new(options.out)
    content = foreign.read(options.file)
    data = None if options.data is None else manifest.scan(manifest.split(options.data)[0])
    run = convert(content, options, None if data is None else len(data))
    write(run, options, None if data is None else len(data))
    recipe = run.recipe
    print(f"{options.out}: {recipe.arch}, {recipe.head} head, queue of {recipe.queue_size}, at step {run.step}")
    for note in run.notes:
        print(f"note: {note}")


def write(run: ImportedRun, options: Import, images: int | None) -> None:
    """RUN/recipe.json and one checkpoint at the imported step."""
    assert options.out is not None
    options.out.mkdir(parents=True)
    meta = {"recipe": run.recipe.as_dict(), "precision": run.precision}
    checkpoint.save(options.out, run.step, run.state, meta)
    steps = (images or IMAGENET) // run.recipe.batch_size
    facts = {
        "preset": run.preset,
        **meta,
        "options": {"data": None if options.data is None else str(options.data), "val": None},
        "ranks": 1,
        "images": images,
        "steps": steps * run.recipe.epochs,
        "versions": environment.versions(),
        "commit": environment.commit(),
        "command": environment.command(),
        "device": "imported",
        "imported": {"file": options.file.name, "sha256": atomic.sha256(options.file), "notes": run.notes},
    }
    atomic.write_json(options.out / RECIPE, facts)


def _own(content: Mapping[str, Any], weights: dict, own: dict, options: Import) -> ImportedRun:
    flags: dict[str, Any] = {"--epochs": options.epochs, "--batch-size": options.batch_size}
    flags["--preset"] = None if options.preset == "auto" else options.preset
    extra = [flag for flag, value in flags.items() if value is not None]
    if extra:
        raise UsageError(f"{options.file} was written by fastmoco and brings its recipe: leave {extra[0]} out")
    try:
        recipe, step = Recipe.from_dict(own["recipe"]), int(own["step"])
        momentum = upstream.velocities(content["optimizer"], recipe)
        queue = weights["queue"].t().contiguous().to(getattr(torch, own["queue_dtype"]))
        state = _sides(weights) | {f"velocity.{name}": value for name, value in momentum.items()}
        state |= {"queue": queue, "queue_pointer": weights["queue_ptr"], **own["rest"]}
        precision = str(own["precision"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ForeignFileError(
            f"{options.file} says that fastmoco wrote it, but not as it writes ({error!r}): export it again"
        ) from error
    _check_shapes(state, recipe, options.file)
    preset = next((name for name, (_, preset_recipe) in PRESETS.items() if preset_recipe == recipe), "custom")
    return ImportedRun(recipe, state, step, precision, preset, [])


def _from_published(content: Mapping[str, Any], weights: dict, options: Import, images: int | None) -> ImportedRun:
    preset = options.preset if options.preset != "auto" else "v2" if f"{QUERY}fc.2.weight" in weights else "v1"
    recipe = _recipe_of(weights, without(QUERY, weights), preset, options)
    settings = upstream.group(content.get("optimizer"))
    recipe = dataclasses.replace(
        recipe,
        sgd_momentum=float(settings.get("momentum", recipe.sgd_momentum)),
        weight_decay=float(settings.get("weight_decay", recipe.weight_decay)),
    )
    step, epoch = int(weights.get(FIRST_NORM, torch.zeros(()))), content.get("epoch")
    if images is not None and isinstance(epoch, int):
        step = epoch * (images // recipe.batch_size)
    fresh, notes = _template(recipe), []
    state = fresh | _sides(weights)
    if not without(KEY, weights):
        notes.append("the file has no key encoder: it starts as a copy of the query encoder")
        state |= {KEY + name: value.clone() for name, value in without(QUERY, weights).items()}
    state |= {f"velocity.{name}": v for name, v in upstream.velocities(content.get("optimizer"), recipe).items()}
    if not upstream.velocities(content.get("optimizer"), recipe):
        notes.append("the file has no optimiser: momentum starts at zero")
    if "queue" in weights:
        pointer = weights.get("queue_ptr", torch.zeros(1, dtype=torch.int64)).reshape(1).to(torch.int64)
        count = torch.tensor(step * recipe.batch_size)
        state |= {"queue": weights["queue"].t().contiguous(), "queue_pointer": pointer, "queue_count": count}
    else:
        notes.append("the file has no queue: it starts with random vectors")
    _check_shapes(state, recipe, options.file, fresh)
    _owed_update(state, recipe.ema_momentum)
    return ImportedRun(recipe, state, step, "fp32", preset, notes)


def _plain(weights: dict[str, Tensor], options: Import) -> ImportedRun:
    preset = options.preset if options.preset != "auto" else "v2"
    recipe = _recipe_of({}, weights, preset, options)
    fresh = _template(recipe)
    own = {name: weights[name] for name in backbone(weights) if name.startswith(BODY)}
    state = fresh | {side + name: value.clone() for side in (QUERY, KEY) for name, value in own.items()}
    _check_shapes(state, recipe, options.file, fresh)
    missing = [name for name in backbone(without(QUERY, fresh)) if name not in own and is_parameter(name)]
    if missing:
        raise ForeignFileError(f"{options.file} lacks {missing[0]} of a {recipe.arch}: give a whole network")
    notes = ["plain weights: both encoders start from this backbone, with a fresh projection head and queue"]
    others = [name for name in backbone(weights) if name not in own]
    if others:
        notes.append(f"{counted(len(others), 'weight')} of other parts left out, {others[0]} the first")
    return ImportedRun(recipe, state, 0, "fp32", preset, notes)


def _recipe_of(weights: dict[str, Tensor], query: dict[str, Tensor], preset: str, options: Import) -> Recipe:
    network = recognise({name: tuple(value.shape) for name, value in query.items()})
    if network is None:
        raise ForeignFileError(f"{options.file} holds no network that fastmoco knows: its shapes are of no ResNet")
    changes: dict[str, Any] = network._asdict()
    if weights:  # of a MoCo checkpoint, whose head and queue say more
        last = query.get("fc.2.weight", query.get("fc.weight"))
        if last is None:
            raise ForeignFileError(f"{options.file} has no projection head (fc.weight or fc.2.weight)")
        changes |= {"head": "mlp" if "fc.2.weight" in query else "linear", "dim": last.shape[0]}
        if "queue" in weights:
            changes["queue_size"] = weights["queue"].shape[-1]
    changes_asked = {"epochs": options.epochs, "batch_size": options.batch_size}
    changes |= {name: value for name, value in changes_asked.items() if value is not None}
    return dataclasses.replace(PRESETS[preset][1], **changes)


def _template(recipe: Recipe) -> dict[str, Tensor]:
    state = Step(recipe, Parallel(), "fp32").state()
    return {name: value.float() if name == "queue" else value for name, value in state.items()}


def _sides(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in weights.items() if name.startswith((QUERY, KEY))}


def _owed_update(state: dict[str, Tensor], momentum: float) -> None:
    for name, query in without(QUERY, state).items():
        if is_parameter(name):
            state[KEY + name] = torch.lerp(state[KEY + name], query, 1 - momentum)


def _is_v3(weights: Mapping[str, Tensor]) -> bool:
    return any(name.startswith(("base_encoder.", "momentum_encoder.")) for name in weights)


def _check_kind(weights: Mapping[str, Tensor], file: Path) -> None:
    if _is_v3(weights):
        raise ForeignFileError(f"{file} is a MoCo v3 checkpoint, which has no queue: only v1 and v2 can be imported")
    if without(QUERY, weights) or "conv1.weight" in weights:
        return
    holds = f"it holds {', '.join(sorted(weights)[:3])}" if weights else "it holds no weights"
    raise ForeignFileError(f"{file} is neither a MoCo v1 or v2 checkpoint nor a residual network: {holds}")


def _check_shapes(state: dict[str, Tensor], recipe: Recipe, file: Path, fresh: dict | None = None) -> None:
    fresh = fresh or _template(recipe)
    wrong = [name for name in fresh if name in state and state[name].shape != fresh[name].shape]
    missing = [name for name in fresh if name not in state]
    extra = [name for name in state if name not in fresh and not name.startswith("loss_scale")]
    for what, names in (("another shape of", wrong), ("no", missing), ("an unknown", extra)):
        if names:
            raise ForeignFileError(f"{file} has {what} {names[0]} for a {recipe.arch} with a {recipe.head} head")
    for name, value in state.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise ForeignFileError(f"{file} is damaged: {name} holds infinite or NaN values")
        if value.is_floating_point() and name != "queue":
            state[name] = value.float().contiguous()
