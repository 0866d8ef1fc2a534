"""`checkpoint verify` and `checkpoint list`: what a run has on disk. Nothing is renamed or removed here."""

from __future__ import annotations

import time
from pathlib import Path

from fastmoco.options import CheckpointList, CheckpointVerify, UsageError
from fastmoco.runs import checkpoint
from fastmoco.runs.facts import read_facts

MIB = 2**20


def verify(options: CheckpointVerify) -> int:
    """Check every byte of every checkpoint: 0 if at least one is good, else 3. Raises UsageError if there is none."""
    good = 0
    for path in _checkpoints(options.run):
        reason = checkpoint.damage(path)
        good += reason is None
        print(f"{path.name}  {'good' if reason is None else f'damaged: {reason}'}")
    return 0 if good else checkpoint.CheckpointError.exit_code


def show(options: CheckpointList) -> None:
    """Print step, time and size of every checkpoint, and of those that were set aside."""
    root = options.run / "checkpoints"
    newest = (root / checkpoint.LATEST).resolve().name
    for path in [*_checkpoints(options.run), *sorted(root.glob(f"*{checkpoint.DAMAGED}*"))]:
        size = sum(file.stat().st_size for file in path.iterdir())
        date = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(path.stat().st_mtime))
        print(f"{path.name}  {date}  {size / MIB:8.1f} MiB{'  latest' if path.name == newest else ''}")


def _checkpoints(run: Path) -> list[Path]:
    if not run.is_dir():
        raise UsageError(f"{run} is no run: it does not exist")
    paths = checkpoint.steps(run)
    if not paths:
        read_facts(run)  # a folder without either is no run
        raise UsageError(f"{run} has no checkpoint yet")
    return paths
