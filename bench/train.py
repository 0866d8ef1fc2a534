"""Training as it runs: loader and step together, beside the step alone, and the share of time spent on waiting.

Where lightly and torchvision are installed, its own example of MoCo v2 trains on the same images, in turn with ours.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from fastmoco.bench import lightly_example
from fastmoco.bench.journal import Journal
from fastmoco.bench.record_files import Row
from fastmoco.bench.step import WORK, graph_mode, machine_at, pairs_bound
from fastmoco.contrast.graph import runner
from fastmoco.contrast.step import Step
from fastmoco.contrast.update import resolve_precision
from fastmoco.data.manifest import Manifest, scan, split
from fastmoco.data.noise import noise_batch, noise_images
from fastmoco.data.plan import Plan
from fastmoco.environment import cores
from fastmoco.parallel import Parallel
from fastmoco.recipe import Recipe
from fastmoco.train.metrics import Pace

STEPS = {"cpu": 3, "cuda": 20}  # in a sample
LOADED, ALONE = "fastmoco, loader and step", "fastmoco, step alone"
LIGHTLY, IN_TURN = "lightly's MoCo v2 example", "fastmoco, in turn with lightly's"
LOADS = (0.65, 0.9, 1.0)  # shares of a GPU's decoding engine that are tried beside the one that training takes


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

    On a GPU also with other shares of its decoding engine. The journal has the step alone before a loader is started,
    and then every row as it comes.
    """
    journal, parallel = journal or Journal(), Parallel(device=device)
    dtype_name = resolve_precision(precision or "auto", device)
    bound = pairs_bound(recipe, machine_at(device, dtype_name), WORK[dtype_name].itemsize)
    config = {"arch": recipe.arch, "px": recipe.crop_size, "batch": recipe.batch_size, "precision": dtype_name}
    step, batch = Step(recipe, parallel, dtype_name, images=_entries(recipe, data)), noise_batch(recipe, parallel)
    advance = runner(step, lambda: batch, graph_mode(device))

    def keep(provider: str, rates: list[float], **extra: float) -> None:
        journal.keep([Row("train", provider, "pairs/s", tuple(rates), config, ALONE, bound, extra)])

    keep(ALONE, [_rate(recipe, device, lambda: advance(batch, 1e-3)) for _ in range(rounds + 1)][1:])
    with journal.attempt(LOADED), _images(data, recipe) as manifest:
        for load in (None, *(LOADS if device.type == "cuda" else ())):
            name = LOADED if load is None else f"{LOADED}, engine's share {load:g}"
            with journal.attempt(name):
                rates, wait = _with_loader(recipe, parallel, manifest, lambda batch: advance(batch, 1e-3), rounds, load)
                keep(name, rates, **{"data wait": wait})
        if lightly_example.HAS_LIGHTLY:
            with journal.attempt(LIGHTLY):
                work = None if dtype_name in ("fp32", "tf32") else WORK[dtype_name]
                samples = _in_turn(recipe, parallel, manifest, lambda batch: advance(batch, 1e-3), rounds, work)
                journal.keep(
                    Row("train", name, "pairs/s", tuple(each), config, LIGHTLY, bound) for name, each in samples.items()
                )
    return sorted(journal.rows, key=lambda row: row.provider == ALONE)


def _entries(recipe: Recipe, data: Path | None) -> int:
    # Of a bank: for the noise and for the images, whichever are more.
    if data is None or recipe.dictionary != "bank":
        return noise_images(recipe)
    count = len(scan(split(data)[0], max_pixels=recipe.max_pixels))
    return max(noise_images(recipe), count)


def _images(data: Path | None, recipe: Recipe) -> AbstractContextManager[Manifest]:
    # Here, because they need DALI, which a machine that only runs steps may lack.
    from fastmoco.bench.loader import images

    return images(data, max(64, recipe.batch_size))


def _with_loader(
    recipe: Recipe, parallel: Parallel, manifest: Manifest, advance: Callable, rounds: int, load: float | None = None
) -> tuple[list[float], float]:
    from fastmoco.bench.loader import PREFETCH, WARM_UP
    from fastmoco.data.loader import Loader, Loading, in_one_call

    plan, loading = Plan(recipe, manifest.sizes), Loading(cores(), PREFETCH, load)
    with Loader(manifest, plan, parallel, range(1 << 30), loading) as loader:
        pace = Pace(parallel.device)

        def train() -> None:
            advance(next(loader))
            pace.step()

        for _ in range(WARM_UP[parallel.device.type]):
            train()
        for _ in range(PREFETCH + 3 * in_one_call(plan.per_rank, parallel.device)):
            next(loader)  # what was ready ahead, or the first samples would be faster than training goes on to be
        _rate(recipe, parallel.device, train)  # which ends with nothing left to do, as every sample must begin
        wait, start = loader.wait_seconds, time.perf_counter()
        rates = [_rate(recipe, parallel.device, train) for _ in range(rounds)]
        return rates, (loader.wait_seconds - wait) / (time.perf_counter() - start)


def _in_turn(
    recipe: Recipe, parallel: Parallel, manifest: Manifest, advance: Callable, rounds: int, autocast: torch.dtype | None
) -> dict[str, list[float]]:
    from fastmoco.bench.loader import PREFETCH
    from fastmoco.data.loader import Loader, Loading

    device, rates = parallel.device, {IN_TURN: list[float](), LIGHTLY: list[float]()}
    plan, loading = Plan(recipe, manifest.sizes), Loading(cores(), PREFETCH)
    with (
        Loader(manifest, plan, parallel, range(1 << 30), loading) as loader,
        lightly_example.training(recipe, manifest, device, autocast) as (train, drain),
    ):
        # No sample begins with batches that are ready: each loader fills up again while the other one's step is timed.
        ours = lambda: advance(next(loader)), lambda: [next(loader) for _ in range(PREFETCH)]  # noqa: E731
        for number in range(rounds + 1):
            for name, (step, empty) in {IN_TURN: ours, LIGHTLY: (train, drain)}.items():
                empty()
                rate = _rate(recipe, device, step)
                rates[name] += [rate] if number else []  # the first is the warm-up
    return rates


def _rate(recipe: Recipe, device: torch.device, advance: Callable[[], object]) -> float:
    start, steps = time.perf_counter(), STEPS[device.type]
    for _ in range(steps):
        advance()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return steps * recipe.batch_size / (time.perf_counter() - start)
