"""The three dictionaries side by side, all else alike: speed of a step, and the bytes that it moves, holds and keeps.

The recipe is one with a queue. Beside it stand NT-Xent over its batch, the one-sided end-to-end form with shuffled
keys, and a bank from which as many negatives are drawn as the queue has keys.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch

from fastmoco.bench.journal import Journal
from fastmoco.bench.memory import peak_bytes
from fastmoco.bench.record_files import Row
from fastmoco.bench.step import graph_mode, ours
from fastmoco.bench.timing import interleave
from fastmoco.contrast.step import Step
from fastmoco.contrast.update import PRECISIONS, resolve_precision
from fastmoco.data.noise import noise_images
from fastmoco.kernels.sgd_ema import cost as sgd_ema_cost
from fastmoco.kernels.tensor_table import TensorTable
from fastmoco.parallel import Parallel
from fastmoco.recipe import Recipe

QUEUE = "queue"


def forms(recipe: Recipe) -> dict[str, Recipe]:
    """`recipe`, which has a queue, and what it is with another dictionary; raises ValueError if it has none."""
    if recipe.dictionary != "queue":
        raise ValueError("dictionaries are compared at a recipe that has a queue: use --preset v1, v2, cifar or demo")
    fields: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(Recipe)}

    def instead(*defaults: str, **changes: Any) -> Recipe:
        return dataclasses.replace(recipe, **{name: fields[name] for name in defaults}, **changes)

    batch = functools.partial(instead, "queue_size", "queue_dtype", "ema_momentum", dictionary="batch")
    return {
        QUEUE: dataclasses.replace(recipe, symmetric=False),
        "batch, all views": batch(symmetric=True, same_view_negatives=True),
        "batch, one-sided": batch(symmetric=False),
        "bank": instead("ema_momentum", dictionary="bank", symmetric=False),
    }


def run(
    recipe: Recipe,
    device: torch.device,
    *,
    rounds: int = 20,
    warmup: int = 3,
    precision: str = "",
    journal: Journal | None = None,
) -> list[Row]:
    """Rows of `forms`: pairs a second; peak MB; MB moved by loss, dictionary and update, from their costs; MB of state.

    The journal has each set of rows as it comes.
    """
    journal = journal or Journal()
    precision = resolve_precision(precision or "auto", device)
    config = {"arch": recipe.arch, "px": recipe.crop_size, "batch": recipe.batch_size, "keys": recipe.check_queue()}
    config["precision"] = precision
    pool = functools.cache(torch.cuda.graph_pool_handle) if device.type == "cuda" else None
    starts = {
        name: functools.partial(ours, each, device, precision, graph=graph_mode(device), pool=pool)
        for name, each in forms(recipe).items()
    }

    def keep(what: str, unit: str, values: dict[str, tuple[float, ...]]) -> None:
        journal.keep(Row(what, name, unit, each, config, QUEUE) for name, each in values.items())

    with journal.attempt("time"):
        times = interleave({n: start() for n, start in starts.items()}, rounds=rounds, warmup=warmup, device=device)
        keep("step", "pairs/s", {n: tuple(recipe.batch_size / s for s in t.samples) for n, t in times.items()})
    with journal.attempt("memory"):
        keep("peak memory of a step", "MB", {n: (_peak(start, device) / 1e6,) for n, start in starts.items()})
    with journal.attempt("bytes"):
        bytes_ = {name: _bytes(each, device, precision) for name, each in forms(recipe).items()}
        keep("moved by loss, dictionary and update", "MB", {n: (moved / 1e6,) for n, (moved, _) in bytes_.items()})
        keep("state of a checkpoint", "MB", {n: (kept / 1e6,) for n, (_, kept) in bytes_.items()})
    return journal.rows


def _peak(start: Callable[[], Callable[[], object]], device: torch.device) -> int:
    steps: list[Callable[[], object]] = []

    def first() -> None:
        steps.append(start())
        steps[0]()

    return peak_bytes(lambda: steps[0](), device, first)


def _bytes(recipe: Recipe, device: torch.device, precision: str) -> tuple[int, int]:
    step = Step(recipe, Parallel(device=device), precision, images=noise_images(recipe))  # type: ignore[arg-type]
    update, encoders = step.update, (step.encoder_q, step.encoder_k)
    copies: list[list[torch.Tensor]] = [[] if each is None else list(each.parameters()) for each in encoders]
    table = TensorTable(*(list(group.values()) for group in (update.q, update.velocity, update.k)), *copies)
    moved, _ = sgd_ema_cost(table, [copy.dtype for copy in copies[0]])
    rows = recipe.forward_views * recipe.batch_size
    costs = step.dictionary.costs(rows, PRECISIONS[step.precision].work)
    moved += sum(nbytes for nbytes, _ in costs.values())
    return moved, sum(value.nbytes for value in step.state().values())
