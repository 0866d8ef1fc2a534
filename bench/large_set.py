"""`python -m fastmoco.bench.large_set FOLDER`: what 100 million images cost before one of them is read.

FOLDER takes about 65 bytes for each image, and is emptied at the end. Measured are the table of a set of made-up shards
(build, open, plan of a step, all that a loader does for a step but reading and decoding images, the end of an epoch,
restart) in 1 and 8 processes, and the same of a manifest of Python strings at the sizes of --lists. Cold is what comes
first, after the system was told to forget the table's pages; warm is the same again.
Memory is the proportional set size (PSS): a page that 8 processes share counts an eighth in each.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastmoco import environment
from fastmoco.data import image_table, pieces, shard_set
from fastmoco.data.batch import assemble
from fastmoco.data.image_table import RECORD, ImageTable, Piece
from fastmoco.data.loader import ImageSource
from fastmoco.data.manifest import Manifest, ShardManifest
from fastmoco.data.plan import Plan
from fastmoco.data.shard_source import LocalShards, Shard
from fastmoco.presets import PRESETS
from fastmoco.recipe import Recipe

PER_SHARD, CLASSES = 10_000, 1000
RECIPE = PRESETS["v2"][1]
STEPS = 200
MB = 1e6
NO_IMAGE = np.frombuffer(b"\xff\xd8", np.uint8)  # how a JPEG begins


def shards_of(images: int) -> list[Shard]:
    """Made-up shards of PER_SHARD images."""
    return [Shard(f"{number:06d}.tar", PER_SHARD * 102_400, str(number)) for number in range(images // PER_SHARD)]


def made_up(shards: list[Shard]) -> Iterator[tuple[str, int, Piece]]:
    """Their images: names of 29 bytes, each its own."""
    records = np.zeros(PER_SHARD, RECORD)
    records["offset"], records["bytes"] = np.arange(PER_SHARD) * 102_400 + 1536, 100_000
    records["size"] = np.random.default_rng(0).integers(200, 600, (PER_SHARD, 2))
    labels = [f"class{i % CLASSES:04d}" for i in range(PER_SHARD)]
    first = pieces.made(records, [f"{label}/000000_{i:07d}.jpg" for i, label in enumerate(labels)], labels)
    names = first.names.reshape(PER_SHARD, -1)
    for number, shard in enumerate(shards):
        own = names.copy()
        own[:, 10:16] = np.frombuffer(f"{number:06d}".encode(), np.uint8)
        yield shard.name, shard.bytes, first._replace(names=own.reshape(-1))


def proportional() -> float:
    """MB of this process, shared pages by share."""
    text = Path("/proc/self/smaps_rollup").read_text()
    return int(text.split("\nPss:")[1].split()[0]) / 1000


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds and result."""
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def planned(images: Manifest, recipe: Recipe) -> dict[str, float]:
    """Milliseconds of the plan of a batch (samples, boxes, photometric parameters, places), and of a loader's step.

    The steps of the plan are random ones; those of a loader follow each other, as in a run.
    """
    first, plan = timed(lambda: _step(Plan(recipe, images.sizes, shards=images.shards), images, 0))
    end = plan.steps_per_epoch
    plan = Plan(recipe, images.sizes, shards=images.shards)
    _step(plan, images, 1)
    some = np.random.default_rng(0).integers(2, end, STEPS).tolist()
    cold, _ = _median_and_busy(some, partial(_step, plan, images))
    warm, busy = _median_and_busy(some, partial(_step, plan, images))
    turn, _ = timed(lambda: _step(plan, images, end))
    facts = {"first": first, "cold_step": cold, "step": warm, "step_cpu": busy, "epoch_turn": turn}
    for name in ("cold_loader_step", "loader_step"):
        steps = range(end // 2, min(end // 2 + STEPS, end))
        seconds, busy = _median_and_busy(_loaded(images, plan, steps), lambda _: None)
        facts |= {name: seconds, f"{name}_cpu": busy}
    return {f"{name}_ms": 1e3 * seconds for name, seconds in facts.items()}


def _step(plan: Plan, images: Manifest, step: int) -> Plan:
    samples, epoch = plan.samples(step), plan.epoch(step)
    for view in plan.views:
        plan.boxes(epoch, samples, view), plan.photometric(epoch, samples, view)
    if images.places is not None:
        images.places[samples]
    return plan


def _median_and_busy(some: Iterable[int], work: Callable[[int], Any]) -> tuple[float, float]:
    """Median of the seconds from one to the next, and mean of the processor's, which other work hardly changes."""
    marks, before = [time.perf_counter()], time.process_time()
    for each in some:
        work(each)
        marks.append(time.perf_counter())
    return float(np.median(np.diff(marks))), (time.process_time() - before) / (len(marks) - 1)


def _loaded(images: Manifest, plan: Plan, steps: range) -> Iterator[int]:
    """The steps as a loader prepares them, with the same few bytes as every image and nothing decoded."""
    images = copy.copy(images)
    images.read = lambda *_: NO_IMAGE  # type: ignore[method-assign]

    def boxes(step: int, samples: np.ndarray) -> np.ndarray:
        return np.stack([plan.boxes(plan.epoch(step), samples, view) for view in plan.views])

    device, batch = torch.device("cpu"), plan.recipe.batch_size
    crops = torch.empty(len(plan.views), batch, 1, 1, 3, dtype=torch.uint8)
    source = ImageSource(images, None, boxes, device)
    with ThreadPoolExecutor(source.readers.most) as readers:
        for request in source.requests(readers, ((step, plan.samples(step)) for step in steps)):
            assemble(plan, request.step, crops, source.origins(request.step, plan.samples(request.step)))
            yield request.step


def forget(folder: Path) -> None:
    """Have the system drop the pages of a folder's files, so that they are read from the disk again."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def opened(run: Path, source: str, order: str) -> dict[str, float]:
    """What a rank does when a run is restarted: reads its own copy, opens the table, plans."""
    before = proportional()
    seconds, images = timed(lambda: Manifest.load(run, source))
    facts = planned(images, dataclasses.replace(RECIPE, order=order))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()  # until the others are as far
    return {"restart_s": seconds, **facts, "pss_mb": proportional() - before}


def together(processes: int, run: Path, source: str, order: str) -> dict[str, float]:
    """The slowest and the largest of so many processes at once."""
    command = [sys.executable, "-m", "fastmoco.bench.large_set", source, "--child", str(run), "--order", order]
    children = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(processes)
    ]
    for each in children:
        assert each.stdout is not None and each.stdout.readline() == "ready\n"
    answers = [json.loads(each.communicate("\n")[0]) for each in children]
    return {name: max(one[name] for one in answers) for name in answers[0]}


def of_table(folder: Path, images: int, processes: list[int]) -> dict[str, Any]:
    """A set of shards in a table."""
    shards, source = shards_of(images), LocalShards(str(folder), [])
    target = shard_set.folder_of(source, shards, RECIPE.max_pixels)
    seconds, _ = timed(lambda: image_table.write(target, made_up(shards)))
    piece = next(made_up(shards))[2]
    keep, _ = timed(lambda: pieces.save(folder / "piece.npz", piece, "", RECIPE.max_pixels))
    load, _ = timed(lambda: pieces.load(folder / "piece.npz", "", RECIPE.max_pixels))
    opening, table = timed(lambda: ImageTable(target))
    ShardManifest.of(source, table, shards, RECIPE.max_pixels).save(folder / "run.npz")
    facts: dict[str, Any] = {
        "images": len(table),
        "bytes_an_image": sum(path.stat().st_size for path in target.iterdir()) / len(table),
        "build_s": seconds,
        "piece_ms": 1e3 * (keep + load),
        "open_s": opening,
        "run_copy_mb": (folder / "run.npz").stat().st_size / MB,
    }
    for order in ("keyed", "windows"):
        facts[order] = {}
        for count in processes:
            forget(target)
            facts[order][count] = together(count, folder / "run.npz", str(folder), order)
    return facts


def of_lists(folder: Path, images: int, processes: list[int]) -> dict[str, Any]:
    """The same images as Python strings, in the order of a table: as of sets up to two million."""
    names = [f"class{i % CLASSES:04d}/{i:014d}.jpg" for i in range(images)]
    sizes = np.full((images, 2), 400, np.int32)
    (folder / "list").mkdir()
    Manifest(str(folder / "list"), names, sizes).save(folder / "run.npz")
    del names
    facts: dict[str, Any] = {"images": images}
    for count in processes:
        facts[str(count)] = together(count, folder / "run.npz", str(folder / "list"), "table")
    return facts


def main() -> None:
    """Measure, print and clean up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=100_000_000, help="a multiple of 10,000; 0 leaves the table out")
    parser.add_argument("--lists", type=int, nargs="*", default=[1_000_000, 1_281_167, 10_000_000])
    parser.add_argument("--processes", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--order", default="keyed", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(opened(options.child, str(options.folder), options.order)))
        return
    if options.folder.exists():
        raise SystemExit(f"{options.folder} exists: name a folder that may be removed")
    options.folder.mkdir(parents=True)
    os.environ["XDG_CACHE_HOME"] = str(options.folder / "cache")
    try:
        print(json.dumps({"versions": environment.versions(), "commit": environment.commit(), "cores": os.cpu_count()}))
        if options.images:
            print(json.dumps({"table": of_table(options.folder, options.images, options.processes)}, indent=2))
        for count in options.lists:
            shutil.rmtree(options.folder / "list", ignore_errors=True)
            few = [each for each in options.processes if each * count <= 11_000_000]  # gigabytes of strings
            print(json.dumps({"list": of_lists(options.folder, count, few)}, indent=2), flush=True)
    finally:
        shutil.rmtree(options.folder)


if __name__ == "__main__":
    main()
