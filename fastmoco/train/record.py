"""What a run writes about itself: recipe.json at its start, its settings for people, summary.json at its end."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastmoco import environment
from fastmoco.options import UsageError, restarted
from fastmoco.parallel import Parallel
from fastmoco.recipe import Recipe
from fastmoco.train.monitor import KNN, LOG, chance_level, expectation, read_lines

if TYPE_CHECKING:
    from fastmoco.train.loop import Run


def write(run: Run, preset: str) -> None:
    """Make RUN with recipe.json in it, or note there that the run goes on; UsageError where RUN is another run's."""
    facts = {
        "preset": preset,
        "recipe": run.recipe.as_dict(),
        "options": {
            name: str(value) if isinstance(value, Path) else value
            for name, value in dataclasses.asdict(run.options).items()
        },
        "ranks": run.parallel.world,
        "images": len(run.train_set),
        "steps": run.total,
        "precision": run.step.precision,
        "versions": environment.versions(),
        "commit": environment.commit(),
        "command": environment.command(),
        "device": _device_name(run.parallel),
    }
    path = run.out / "recipe.json"
    if path.exists():
        first = json.loads(path.read_text())
        keys = ("commit", "command", "device", "versions", "ranks")
        first.setdefault("resumed", []).append({"step": run.done, **{key: facts[key] for key in keys}})
        facts = first
    else:
        _create(run.out, run.options.resume or restarted())
    write_json(path, facts)


def announce(run: Run, preset: str, note: str) -> None:
    """Say every setting, and what a healthy loss looks like."""
    say = run.monitor.say
    say(f"recipe ({preset}):")
    for name, value in _flat(run.recipe.as_dict()).items():
        say(f"  {name:<22}{value}")
    if run.recipe.lr == "auto":
        say(f"  {'lr (auto)':<22}{run.recipe.base_lr:g}")
    say("options:")
    for name, value in dataclasses.asdict(run.options).items():
        say(f"  {name:<22}{value}")
    per_rank = run.recipe.batch_size // run.parallel.world
    say(
        f"{len(run.train_set)} images, {run.plan.steps_per_epoch} steps an epoch, {run.total} steps; "
        f"{run.parallel.world} rank(s) of {per_rank} on {_device_name(run.parallel)}, {run.step.precision}; "
        f"writing {run.out}"
    )
    say(expectation(run.recipe, run.plan.steps_per_epoch))
    for line in (note, f"resumed after step {run.done}" if run.options.resume else ""):
        if line:
            say(line)


def queue_note(asked: Recipe, recipe: Recipe, images: int) -> str:
    """What `--queue-size auto` came to, and whether it is more than suits so few images; empty where not asked for."""
    if asked.queue_size != "auto":
        return ""
    many = 4 * recipe.queue_size > images
    remedy = ", more than a quarter of them: a smaller --batch-size makes the queue smaller" if many else ""
    return f"queue_size auto: {recipe.queue_size} keys for {images} images{remedy}. "


def summary(run: Run) -> dict[str, Any]:
    """What RUN/summary.json holds, but for whether the run was stopped."""
    log, neighbours = read_lines(run.out / LOG), read_lines(run.out / KNN)
    end = log[-1] if log else {}
    return {
        "steps": run.done,
        "epochs": run.done / run.plan.steps_per_epoch,
        "pairs_per_s": statistics.median(line["pairs_per_s"] for line in log) if log else None,
        "data_wait": statistics.median(line["data_wait"] for line in log) if log else None,
        **{name: end.get(name) for name in ("loss", "top1", "top5")},
        "chance_loss": chance_level(run.recipe),
        "knn_before": neighbours[0]["top1"] if neighbours and neighbours[0]["step"] == 0 else None,
        "knn_after": neighbours[-1]["top1"] if neighbours and neighbours[-1]["step"] == run.done else None,
        "seconds": run.monitor.seconds,
        "skipped_steps": sum(line.get("nonfinite", 0) for line in log),
        "rollbacks": run.rollbacks,
    }


def _create(out: Path, resume: bool) -> None:
    try:
        out.mkdir(parents=True, exist_ok=resume)
    except FileExistsError as error:
        raise UsageError(f"{out} exists: continue it with --resume, or give --out another name") from error


def _device_name(parallel: Parallel) -> str:
    if parallel.device.type == "cuda":
        return torch.cuda.get_device_name(parallel.device)
    return f"CPU, {environment.cores()} cores"


def _flat(data: dict[str, Any]) -> dict[str, Any]:
    inner = data.get("augmentation", {})
    return {name: value for name, value in {**data, **inner}.items() if name != "augmentation"}


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write `data` whole or not at all."""
    draft = path.with_name(path.name + ".writing")
    with draft.open("w", encoding="utf-8") as file:
        file.write(json.dumps(data, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def closing(summary: dict[str, Any], out: Path) -> str:
    """The last line of a run, from its summary."""
    lines = [f"{summary['steps']} steps in {summary['seconds']:.0f} s"]
    if summary["loss"] is not None:
        lines.append(f"loss {summary['loss']:.3f} (chance {summary['chance_loss']:.3f})")
        lines.append(f"{summary['pairs_per_s']:.1f} pairs/s")
    if summary["knn_after"] is not None:
        before = f" (before: {summary['knn_before']:.1f}%)" if summary["knn_before"] is not None else ""
        lines.append(f"kNN top-1 {summary['knn_after']:.1f}%{before}")
    return f"done: {', '.join(lines)}; see {out}/summary.json and {out}/curves.png"
