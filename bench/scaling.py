"""Throughput on 1, 2, 4 ... ranks, each with the same share of work, by the launcher that training uses.

    python -m torch.distributed.run --nproc-per-node N -m fastmoco.bench.scaling FILE

is what each point starts; rank 0 reads its task from FILE and writes what it measured back.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fastmoco.bench.record_files import Row
from fastmoco.bench.step import graph_mode
from fastmoco.contrast.graph import closed_at_the_end, runner
from fastmoco.contrast.step import Step
from fastmoco.data.noise import noise_batch, noise_images
from fastmoco.environment import cores
from fastmoco.parallel import Parallel
from fastmoco.recipe import Recipe

WARMUP, STEPS = 1, 3


def run(
    recipe: Recipe, device: torch.device, *, rounds: int = 5, precision: str = "auto", most: int | None = None
) -> list[Row]:
    """Pairs a second of all ranks together; the bound is that of one rank times their number."""
    most = most or (torch.cuda.device_count() if device.type == "cuda" else min(cores(), 8))
    counts = [2**power for power in range(most.bit_length()) if 2**power <= most]
    # As many threads a rank however many ranks there are: what is compared is ranks.
    task = {"device": device.type, "rounds": rounds, "precision": precision or "auto", "threads": cores() // counts[-1]}
    rates = {ranks: _launch(recipe, ranks, task) for ranks in counts}
    alone = sorted(rates[1])[len(rates[1]) // 2]
    config = {"arch": recipe.arch, "px": recipe.crop_size, "batch a rank": recipe.batch_size}
    return [
        Row("scaling", _name(ranks), "pairs/s", tuple(samples), config, _name(1), ranks * alone)
        for ranks, samples in rates.items()
    ]


def work(task: dict) -> list[float]:
    """Measure on this rank among the others: pairs a second of all, `rounds` samples."""
    with Parallel.start(task["device"]) as parallel, closed_at_the_end():
        if parallel.device.type == "cpu":
            torch.set_num_threads(task["threads"])
        recipe = Recipe.from_dict(task["recipe"])
        precision = None if task["precision"] == "auto" else task["precision"]
        step = Step(recipe, parallel, precision, images=noise_images(recipe))
        batch = noise_batch(recipe, parallel)
        advance = runner(step, lambda: batch, graph_mode(parallel.device))
        for _ in range(WARMUP):
            advance(batch, 1e-3)
        return [_sample(parallel, recipe, lambda: advance(batch, 1e-3)) for _ in range(task["rounds"])]


def _sample(parallel: Parallel, recipe: Recipe, advance: Callable[[], object]) -> float:
    parallel.barrier()
    start = time.perf_counter()
    for _ in range(STEPS):
        advance()
    if parallel.device.type == "cuda":
        torch.cuda.synchronize()
    parallel.barrier()
    return STEPS * recipe.batch_size / (time.perf_counter() - start)


def _launch(recipe: Recipe, ranks: int, task: dict) -> list[float]:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # what other subjects left is the ranks'
    task = {**task, "recipe": dataclasses.replace(recipe, batch_size=recipe.batch_size * ranks).as_dict()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "task.json")
        path.write_text(json.dumps(task))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command += ["-m", "fastmoco.bench.scaling", str(path)]
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
        if result.returncode:
            raise RuntimeError(f"{ranks} ranks failed:\n{result.stderr}")
        return json.loads(path.read_text())


def _name(ranks: int) -> str:
    return "1 rank" if ranks == 1 else f"{ranks} ranks"


if __name__ == "__main__":
    file = Path(sys.argv[1])
    rows = work(json.loads(file.read_text()))
    if os.environ["RANK"] == "0":
        file.write_text(json.dumps(rows))
