"""What a run's folder holds, for those that read it."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from fastmoco.encoder import build_encoder
from fastmoco.options import UsageError
from fastmoco.parallel import Parallel
from fastmoco.recipe import Recipe
from fastmoco.runs import checkpoint
from fastmoco.runs.checkpoint import CheckpointError
from fastmoco.runs.facts import read_facts, read_json
from fastmoco.runs.pretrained import Pretrained, pretrained

T = TypeVar("T")
QUERY, KEY = "encoder_q.", "encoder_k."  # what stands before the names of either encoder's weights in a checkpoint


class SavedRun(NamedTuple):
    """The newest good checkpoint of a run and the facts beside it."""

    step: int
    state: dict[str, Tensor]
    recipe: Recipe
    precision: str
    facts: dict[str, Any]
    """What RUN/recipe.json holds."""

    @property
    def query(self) -> dict[str, Tensor]:
        """Weights of the query encoder, the one that is kept, by torchvision's names and in torchvision's order."""
        order = build_encoder(self.recipe).state_dict()
        weights = without(QUERY, self.state)
        return {name: weights[name].contiguous() for name in order}


def load(run: Path) -> SavedRun:
    """The newest good checkpoint of `run`; raises UsageError if it is no run, CheckpointError if it has none."""
    facts = read_facts(run)
    path = checkpoint.latest(run)
    if path is None:
        raise CheckpointError(f"{run} has no checkpoint yet: let it train until its first one")
    content = checkpoint.load(path, verified=True)
    return SavedRun(
        content.step,
        content.state,
        Recipe.from_dict(content.meta["recipe"]),
        content.meta.get("precision", "fp32"),
        facts,
    )


def without(prefix: str, weights: Mapping[str, T]) -> dict[str, T]:
    """The entries whose names start with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


class Hold:
    """A lock on a run's folder, for as long as this process lives and does not close it."""

    def __init__(self, file: int) -> None:
        self._file = file

    def close(self) -> None:
        """Let it go."""
        os.close(self._file)


def hold(run: Path) -> Hold | None:
    """Lock a run against a second process that would write to it; None if the disk knows no locks.

    Raises UsageError if another process holds it.
    """
    file = os.open(run, os.O_RDONLY)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        raise UsageError(f"another process is training in {run}: wait for its end, or stop it") from None
    except OSError:
        os.close(file)
        return None
    return Hold(file)


def one_rank(device: str) -> Parallel:
    """This process alone on a device; raises UsageError if a launcher started several."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("this command runs in one process: start it with fastmoco, not with torchrun")
    return Parallel.alone(device)


def load_encoder(run: Path, parallel: Parallel, untrained: bool = False) -> tuple[Pretrained, Recipe, int]:
    """Query encoder of the newest good checkpoint of `run`, in evaluation mode on the device, its recipe and step.

    With `untrained` it has the weights that the recipe's seed draws, and the step is 0. Raises UsageError if `run` is
    no run, CheckpointError if it has no good checkpoint.
    """
    saved_run = None if untrained else load(run)
    recipe = saved_run.recipe if saved_run else Recipe.from_dict(read_facts(run)["recipe"])
    weights, step = (without(QUERY, saved_run.state), saved_run.step) if saved_run else (None, 0)
    return pretrained(recipe, weights, step, parallel.device), recipe, step


def figures_name(name: str, untrained: bool) -> str:
    """Name of an evaluation's files in RUN, without suffix: those of untrained weights stand beside the others."""
    return f"{name}-untrained" if untrained else name


def keep_earlier(run: Path, figures: dict[str, Any], *names: str) -> None:
    """Rename the files NAME.* of an earlier evaluation, so that new ones do not replace them, and say so.

    They become NAME.1.*, or the first number that is free. RUN/NAME.json of the first name tells what the earlier
    figures were. Those that are equal to the new ones, but for the seconds they took, are left to be replaced.
    """
    earlier = read_json(run / f"{names[0]}.json")
    if not earlier or earlier | {"seconds": 0} == json.loads(json.dumps(figures)) | {"seconds": 0}:
        return
    number = next(n for n in itertools.count(1) if not (run / f"{names[0]}.{n}.json").exists())
    for name in names:
        for suffix in (".json", ".png", ".safetensors"):
            if (run / f"{name}{suffix}").exists():
                os.replace(run / f"{name}{suffix}", run / f"{name}.{number}{suffix}")
    print(f"note: the figures of an earlier evaluation are kept as {run / names[0]}.{number}.json")
