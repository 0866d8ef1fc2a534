"""This version of fastmoco beside another checkout of it, in turn: the whole demo, and the loader's finished views.

Every sample is a process of its own that finds one of the two on PYTHONPATH: the same interpreter and libraries, the
same images. The first of each fills caches and compiles loops, and does not count.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

import fastmoco
from fastmoco.bench.journal import Journal
from fastmoco.bench.loader import KERNEL, photographs
from fastmoco.bench.record_files import Row, matches
from fastmoco.data import synthetic
from fastmoco.recipe import Recipe

DEMO, VIEWS = "whole demo, time to its kNN", "loader, finished views"
THIS, OTHER = "fastmoco", "fastmoco, the other version"
OWN = "each version's own"  # precision: what it trains in where nobody asks for one
COMMIT = "from fastmoco.environment import commit; print(commit())"


class VersionError(RuntimeError):
    """A command of one of the two versions did not end with 0; the message has its last words."""


class _Sample(NamedTuple):
    value: float
    extra: dict[str, float]


class _Case(NamedTuple):
    unit: str
    config: dict[str, object]
    take: Callable[[Path], _Sample]  # of the version in this folder


def run(
    recipe: Recipe,
    device: torch.device,
    *,
    rounds: int = 5,
    precision: str = "",
    against: Path,
    only: str = "",
    journal: Journal | None = None,
) -> list[Row]:
    """Seconds of `pretrain demo` with both kNN evaluations, and pairs a second of the loader at the recipe's size.

    `against` is the folder of the other version, one that has a package fastmoco. The precision is the demo's; without
    one each version takes its own. A case whose command fails is noted in the journal and costs its own rows. Raises
    ValueError if `against` holds no fastmoco, or if `only` leaves no case.
    """
    if not (against / "fastmoco" / "__init__.py").exists():
        raise ValueError(f"{against} holds no fastmoco: name the folder of a checkout")
    journal = journal or Journal()
    versions = {OTHER: against.resolve(), THIS: Path(fastmoco.__file__).resolve().parent.parent}
    commits = {name: _python(folder, "-c", COMMIT).strip() for name, folder in versions.items()}
    with tempfile.TemporaryDirectory() as scratch:
        cases = _cases(recipe, device, precision, Path(scratch))
        names = [name for name in cases if matches(name, only)]
        if not names:
            raise ValueError(f"nothing to time is left: the cases are {'; '.join(cases)}")
        for name in names:
            with journal.attempt(name):
                _in_turn(name, cases[name], versions, commits, rounds, journal)
    return journal.rows


def _in_turn(
    name: str, case: _Case, versions: Mapping[str, Path], commits: Mapping[str, str], rounds: int, journal: Journal
) -> None:
    samples: dict[str, list[_Sample]] = {provider: [] for provider in versions}
    for number in range(rounds + 1):
        for provider, folder in versions.items():
            sample = case.take(folder)
            samples[provider] += [sample] if number else []
        if number:
            journal.keep(_row(name, case, provider, commits, taken) for provider, taken in samples.items())


def _row(name: str, case: _Case, provider: str, commits: Mapping[str, str], taken: list[_Sample]) -> Row:
    config = {**case.config, "other": commits[OTHER]}
    extra = {key: [sample.extra[key] for sample in taken] for key in taken[0].extra}
    values = tuple(sample.value for sample in taken)
    return Row(name, provider, case.unit, values, config, OTHER, extra={"commit": commits[provider], **extra})


def _cases(recipe: Recipe, device: torch.device, precision: str, scratch: Path) -> dict[str, _Case]:
    size: dict[str, object] = {"px": recipe.crop_size, "batch": recipe.batch_size}
    return {
        DEMO: _Case("s", {"precision": precision or OWN}, lambda folder: _demo(folder, device, precision, scratch)),
        VIEWS: _Case("pairs/s", size, lambda folder: _views(folder, device, recipe, scratch)),
    }


def _demo(version: Path, device: torch.device, precision: str, scratch: Path) -> _Sample:
    images = synthetic.make(scratch / "demo")
    flags = ["--precision", precision] if precision else []
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        out = Path(folder) / "run"  # which a run makes itself
        start = time.perf_counter()
        where = ("--data", images, "--device", device.type, "--out", out)
        _python(version, "-m", "fastmoco", "pretrain", "demo", *where, *flags)
        seconds = time.perf_counter() - start
        summary = json.loads((out / "summary.json").read_text())
    return _Sample(seconds, {"kNN": summary["knn_after"]})


def _views(version: Path, device: torch.device, recipe: Recipe, scratch: Path) -> _Sample:
    images, record = scratch / f"photographs-{recipe.batch_size}", scratch / "views.json"
    if not images.exists():
        images.mkdir()
        photographs(images, max(64, recipe.batch_size))
    size = ("--crop-size", recipe.crop_size, "--batch-size", recipe.batch_size)
    flags = ("--data", images, "--device", device.type, "--rounds", 1, "--only", KERNEL, "--json", record)
    _python(version, "-m", "fastmoco", "bench", "loader", *size, *flags)
    rows = [row for item in json.loads(record.read_text()) for row in item["rows"]]
    return _Sample(next(row["samples"][0] for row in rows if row["provider"] == KERNEL), {})


def _python(version: Path, *arguments: object) -> str:
    environment = {**os.environ, "PYTHONPATH": str(version)}
    command = [sys.executable, *map(str, arguments)]
    # Not from the folder we are in: `python -m` would find a package there before PYTHONPATH's.
    with tempfile.TemporaryDirectory() as elsewhere:
        done = subprocess.run(command, env=environment, cwd=elsewhere, capture_output=True, text=True)
    if done.returncode:
        words = " ".join(done.stderr.split())[-500:]
        raise VersionError(f"{version}: {' '.join(command[1:])} ended with code {done.returncode}: {words}")
    return done.stdout
