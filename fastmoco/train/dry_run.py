"""`pretrain --dry-run`: what a run would take, from its images and a few steps of small batches. No run is written."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from fastmoco.contrast.step import Step
from fastmoco.data.decoded import bytes_decoded
from fastmoco.data.loader import EVALUATION_BATCH, Loader, Loading
from fastmoco.data.manifest import Manifest
from fastmoco.data.noise import noise_batch
from fastmoco.data.plan import Plan
from fastmoco.evaluate.features import extract
from fastmoco.options import Options
from fastmoco.parallel import Parallel
from fastmoco.recipe import Recipe
from fastmoco.train.job import Job, places, prepare
from fastmoco.train.metrics import memory

LEAST = 32  # pairs in the smaller batch where batch norm asks for no more
STEPS, BATCHES = 2, 4  # that are timed, after one that is not
UNTIL_KEPT = 8  # batches of the same images after which all of them are kept, and none is under way from before
TINY_RATE = 1e-6


class Trial(NamedTuple):
    """What one rank did with a batch of `pairs`."""

    pairs: int
    rate: float
    """Pairs a second of the step alone."""
    memory: float
    """Peak of the process, in GiB."""


class Knn(NamedTuple):
    """The kNN evaluations of a run, by one batch that was tried."""

    times: int
    images: int
    """In each: those that vote and those that are classified."""
    seconds: float
    """Of all of them."""
    memory: float
    """Peak of the process, in GiB."""


def estimate(recipe: Recipe, options: Options, preset: str) -> dict[str, Any]:
    """Print what the run would take, and return it.

    `images` and `steps` are counts. `memory` is the peak of one rank in GiB: of its GPU, or on a CPU of its process.
    `pairs_per_s` is of all ranks together. `seconds` is the time of the whole run; `knn_seconds` of them are for kNN
    evaluations, 0 where there are none. Memory and time are extrapolated from two small batches and one of an
    evaluation. Of several ranks the first tries for all of them. Raises what the run itself would raise before its
    first step.
    """
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    if rank:
        return {}
    parallel = Parallel.alone(options.device)
    job = prepare(recipe, places(options, preset, parallel), preset, parallel)
    per_rank = job.recipe.check_ranks(world)
    steps = job.total  # before any trial, so that a batch that does not fit is refused in the run's own words
    trials = [_trial(job, pairs) for pairs in _sizes(job.recipe, per_rank)]
    kept = sum(job.kept_bytes)
    loaded = _rate_of_loader(job, trials[-1].pairs)
    ours = trials[-1].rate
    rate = world * (min(ours, loaded) if parallel.device.type == "cuda" else 1 / (1 / ours + 1 / loaded))
    knn = _knn(job, trials[0].pairs, world)  # after steps, as in the run: much of what they took stays with the process
    facts = {
        "images": len(job.train_set),
        "steps": steps,
        "memory": max(_extrapolate(trials, per_rank), knn.memory) + kept / 2**30,
        "pairs_per_s": rate,
        "seconds": steps * job.recipe.batch_size / rate + knn.seconds,
        "knn_seconds": knn.seconds,
    }
    for line in _lines(job, world, trials, loaded, kept, knn, facts):
        print(line)
    return facts


def _sizes(recipe: Recipe, per_rank: int) -> list[int]:
    unit = recipe.bn_group or min(LEAST, max(2, per_rank // 2))
    return sorted({min(per_rank, unit), min(per_rank, 2 * unit)})


def _small(recipe: Recipe, pairs: int) -> Recipe:
    return replace(recipe, batch_size=pairs, lr=TINY_RATE)


def _trial(job: Job, pairs: int) -> Trial:
    recipe, parallel = _small(job.recipe, pairs), job.parallel
    step = _step(job, recipe)
    batch = noise_batch(recipe, parallel)
    seconds = _seconds(lambda: step.step(batch, TINY_RATE), STEPS, parallel.device)
    return Trial(pairs, pairs / seconds, memory(parallel.device))


def _step(job: Job, recipe: Recipe) -> Step:
    options = job.options
    return Step(recipe, job.parallel, encoder=options.encoder, update=options.update, images=len(job.train_set))


def _knn(job: Job, pairs: int, world: int) -> Knn:
    if job.val_set is None:
        return Knn(0, 0, 0.0, 0.0)
    every, device = job.options.knn_every, job.parallel.device
    times = 2 + ((job.recipe.epochs - 1) // every if every else 0)
    share = -(-len(job.train_set) // world)
    few = job.train_set.take(range(min(EVALUATION_BATCH, share)))
    step, features = _step(job, _small(job.recipe, pairs)), job.recipe.knn_features
    began = time.perf_counter()
    extract(step.encoder_q, few, job.recipe, job.parallel, loading=job.loading, features=features)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    images, seconds = len(job.train_set) + len(job.val_set), time.perf_counter() - began
    return Knn(times, images, times * images * seconds / len(few) / world, memory(device))


def _rate_of_loader(job: Job, pairs: int) -> float:
    """Pairs a second over all epochs: where all images are kept decoded, in the later ones they are but cut."""
    decoding = _rate(job, job.train_set, pairs, replace(job.loading, decoded_bytes=0))
    kept = job.loading.decoded_bytes
    if kept < bytes_decoded(job.train_set.sizes, kept + 1):
        return decoding
    few = job.train_set.take(range(pairs))
    cutting = _rate(job, few, pairs, replace(job.loading, decoded_bytes=bytes_decoded(few.sizes, kept)), UNTIL_KEPT)
    return job.recipe.epochs / (1 / decoding + (job.recipe.epochs - 1) / cutting)


def _rate(job: Job, images: Manifest, pairs: int, loading: Loading, first: int = 1) -> float:
    plan = Plan(_small(job.recipe, pairs), images.sizes, shards=images.shards)
    with Loader(images, plan, job.parallel, range(BATCHES + first), loading) as loader:
        return pairs / _seconds(lambda: next(loader), BATCHES, job.parallel.device, first)


def _seconds(work: Callable[[], object], times: int, device: torch.device, first: int = 1) -> float:
    """Of one call, after `first` ones that are not counted."""
    started = 0.0
    for number in range(first + times):
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = started if number >= first else time.perf_counter()
    return (time.perf_counter() - started) / times


def _extrapolate(trials: list[Trial], pairs: int) -> float:
    if len(trials) == 1:
        return trials[0].memory
    first, last = trials
    return last.memory + (last.memory - first.memory) / (last.pairs - first.pairs) * (pairs - last.pairs)


def _lines(
    job: Job, world: int, trials: list[Trial], loaded: float, kept: int, knn: Knn, facts: dict[str, Any]
) -> list[str]:
    place = "its GPU" if job.parallel.device.type == "cuda" else "the CPU"
    ranks = f" for each of {world} ranks" if world > 1 else ""
    tried = " and ".join(str(trial.pairs) for trial in trials)
    return [
        *job.notes,
        f"images: {facts['images']} in {job.train_set.root}",
        f"steps: {facts['steps']} of {job.recipe.batch_size} pairs, {job.plan.steps_per_epoch} an epoch, "
        f"{job.recipe.epochs} epochs",
        f"memory: about {facts['memory']:.1f} GiB on {place}{ranks}, by batches of {tried}"
        + (" and one of kNN" if knn.times else "")
        + (f"; {kept / 1e9:.2g} GB of it for decoded images (--decoded-cache)" if kept else ""),
        f"time: about {_duration(facts['seconds'])} at {facts['pairs_per_s']:.1f} pairs/s "
        f"(each rank alone: step {trials[-1].rate:.1f}, loader {loaded:.1f})"
        + (f", with {_duration(knn.seconds)} for {knn.times} kNN evaluations of {knn.images} images" * bool(knn.times)),
        "this was a trial: no run was written",
    ]


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"
