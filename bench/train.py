"""Training as it runs: loader and step together, beside the step alone, and the share of time spent on waiting."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from fastmoco.bench.journal import Journal
from fastmoco.bench.record_files import Row
from fastmoco.bench.step import WORK, graph_mode, machine_at, pairs_bound
from fastmoco.contrast.graph import runner
from fastmoco.contrast.step import Step
from fastmoco.contrast.update import resolve_precision
from fastmoco.data.noise import noise_batch
from fastmoco.data.plan import Plan
from fastmoco.environment import cores
from fastmoco.parallel import Parallel
from fastmoco.recipe import Recipe
from fastmoco.train.metrics import Pace

STEPS = 3  # in a sample
LOADED, ALONE = "fastmoco, loader and step", "fastmoco, step alone"


def run(
    recipe: Recipe,
    device: torch.device,
    *,
    rounds: int = 5,
    precision: str = "auto",
    data: Path | None = None,
    journal: Journal | None = None,
) -> list[Row]:
    """Pairs a second with the loader and without, and how much of the time was waited for batches.

    The journal has the step alone before the loader is started.
    """
    journal, parallel = journal or Journal(), Parallel(device=device)
    chosen = resolve_precision(precision or "auto", device)
    bound = pairs_bound(recipe, machine_at(device, chosen), WORK[chosen].itemsize)
    config = {"arch": recipe.arch, "px": recipe.crop_size, "batch": recipe.batch_size, "precision": chosen}
    step, batch = Step(recipe, parallel, chosen), noise_batch(recipe, parallel)
    advance = runner(step, lambda: batch, graph_mode(device))
    alone = [_rate(recipe, device, lambda: advance(batch, 1e-3)) for _ in range(rounds + 1)][1:]
    rows = [Row("train", ALONE, "pairs/s", tuple(alone), config, ALONE, bound)]
    journal.keep(rows)
    with journal.attempt(LOADED):
        loaded, wait = _with_loader(recipe, parallel, data, partial(advance, lr=1e-3), rounds)
        rows.insert(0, Row("train", LOADED, "pairs/s", tuple(loaded), config, ALONE, bound, {"data wait": wait}))
    return rows


def _with_loader(
    recipe: Recipe, parallel: Parallel, data: Path | None, advance: Callable, rounds: int
) -> tuple[list[float], float]:
    # Here, because they need DALI, which a machine that only runs steps may lack.
    from fastmoco.bench.loader import PREFETCH, WARM_UP, images
    from fastmoco.data.loader import Loader, Loading

    with images(data, max(64, recipe.batch_size)) as manifest:
        plan = Plan(recipe, manifest.sizes)
        with Loader(manifest, plan, parallel, range(1 << 30), Loading(cores(), PREFETCH)) as loader:
            pace = Pace(parallel.device)

            def train() -> None:
                advance(next(loader))
                pace.step()

            for _ in range(WARM_UP[parallel.device.type]):
                train()
            _rate(recipe, parallel.device, train)  # which ends with nothing left to do, as every sample must begin
            waited, started = loader.wait_seconds, time.perf_counter()
            rates = [_rate(recipe, parallel.device, train) for _ in range(rounds)]
            return rates, (loader.wait_seconds - waited) / (time.perf_counter() - started)


def _rate(recipe: Recipe, device: torch.device, advance: Callable[[], object]) -> float:
    started = time.perf_counter()
    for _ in range(STEPS):
        advance()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return STEPS * recipe.batch_size / (time.perf_counter() - started)
