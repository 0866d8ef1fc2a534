"""`python -m fastmoco.bench.shard_scan SHARDS`: what several processes gain where shards are looked at first.

SHARDS is a local folder of tar archives. In each round what is known of them is made anew by each number of processes,
in changing order; 0 is the process of this command, without children. Printed are images a second, and the ratio to one
child in the same round: median, least and most.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np

from fastmoco import environment
from fastmoco.data import shard_set
from fastmoco.data.shard_source import LocalShards, Shard
from fastmoco.recipe import Recipe


def seconds(source: LocalShards, shards: list[Shard], processes: int) -> tuple[float, int]:
    """Seconds until the pieces of all shards are kept, and the number of images in them."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        began = time.perf_counter()
        shard_set.build(source, shards, Recipe.max_pixels, cached=False, processes=processes)
        took = time.perf_counter() - began
        return took, sum(len(shard_set.piece(source, shard, Recipe.max_pixels).records) for shard in shards)


def measured(folder: Path, counts: list[int], rounds: int) -> dict[str, object]:
    """Images a second with each number of processes, and their ratio to one child in the same round."""
    source = LocalShards.of(str(folder), map(str, folder.glob("*.tar")))
    shards = source.shards()
    _, images = seconds(source, shards, counts[-1])  # has the archives in memory
    found: dict[int, list[float]] = {count: [] for count in counts}
    for number in range(rounds):
        at = number % len(counts)
        for count in counts[at:] + counts[:at]:
            found[count].append(images / seconds(source, shards, count)[0])
    rates = {count: _spread(np.array(each)) for count, each in found.items()}
    ratios = {count: _spread(np.array(each) / np.array(found[1])) for count, each in found.items() if 1 in found}
    gigabytes = sum(shard.bytes for shard in shards) / 1e9
    return {"shards": len(shards), "gb": gigabytes, "images": images, "images_per_s": rates, "beside_one": ratios}


def _spread(values: np.ndarray) -> list[float]:
    return [float(np.round(each, 3)) for each in (np.median(values), values.min(), values.max())]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shards", type=Path)
    parser.add_argument("--processes", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(json.dumps({"versions": environment.versions(), "commit": environment.commit(), "cores": os.cpu_count()}))
    print(json.dumps(measured(options.shards.resolve(), options.processes, options.rounds)))


if __name__ == "__main__":
    main()
