"""What a run writes about itself: recipe.json at its start, its settings for people, summary.json at its end."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fastmoco import atomic, environment
from fastmoco.contrast.update import Precision
from fastmoco.data.shard_source import as_url
from fastmoco.options import Options, UsageError, is_restart
from fastmoco.parallel import Parallel
from fastmoco.presets import PRESETS
from fastmoco.recipe import Recipe
from fastmoco.runs.facts import RECIPE, go_on, read_facts
from fastmoco.runs.lines import KNN, LOG, read_lines
from fastmoco.train.expectation import chance_level, expectation
from fastmoco.train.job import Job

SUMMARY = "summary.json"
ON_CPU = "CPU, "  # how the name of a device that is no GPU begins


def write(job: Job, precision: str, step: int) -> None:
    """Make RUN with recipe.json in it, or note there that the run goes on; raises UsageError if RUN is taken."""
    facts: dict[str, Any] = {
        "preset": job.preset,
        "recipe": job.recipe.as_dict(),
        "left_open": job.left_open,
        "options": _told(job),
        "ranks": job.parallel.world,
        "images": len(job.train_set),
        "steps": job.total,
        "precision": precision,
        "versions": environment.versions(),
        "commit": environment.commit(),
        "command": environment.command(),
        "device": _device_name(job.parallel),
    }
    path = job.out / RECIPE
    if path.exists():
        first = read_facts(job.out)
        names = ("commit", "command", "device", "versions", "ranks")
        first.setdefault("resumed", []).append({"step": step, **{name: facts[name] for name in names}})
        first["options"] |= {name: facts["options"][name] for name in ("data", "val")}  # where they are now
        facts = first
    else:
        _create(job.out, job.options.resume or is_restart())
    atomic.write_json(path, facts)


def precision_before(job: Job) -> Precision | None:
    """What "auto" was where a run on CPUs began; None where it is to be asked of this device.

    Every CPU computes in what another one chose, and a run that goes on elsewhere stays the same run. What a GPU chose,
    or what an imported checkpoint says, binds no CPU.
    """
    goes_on = job.options.resume and (job.out / RECIPE).exists()
    if not goes_on or job.recipe.precision != "auto" or job.parallel.device.type != "cpu":
        return None
    facts = read_facts(job.out)
    before = facts.get("precision") if str(facts.get("device")).startswith(ON_CPU) else None
    return before if before in ("fp32", "bf16") else None


def _told(job: Job) -> dict[str, Any]:
    """The options, with places as text: pathlib makes one slash of a URL's two."""
    options = dataclasses.asdict(job.options)
    return {
        name: (as_url(value) or str(value)) if isinstance(value, Path) else value for name, value in options.items()
    }


def announcement(job: Job, precision: str, step: int) -> Iterator[str]:
    """Lines for the start of a run: what differs from its preset, its size, and what a healthy loss looks like."""
    yield f"{job.preset}: {_changes(job) or 'as the preset has it'} (every setting: {job.out / RECIPE})"
    per_rank = job.recipe.batch_size // job.parallel.world
    yield (
        f"{len(job.train_set)} images, {job.plan.steps_per_epoch} steps an epoch, {job.total} steps; "
        f"{job.parallel.world} rank{'s' * (job.parallel.world > 1)} of {per_rank} pairs on "
        f"{_device_name(job.parallel)}, {precision}; "
        f"lr {job.recipe.base_lr:g}; writing {job.out}"
    )
    yield expectation(job.recipe, job.plan.steps_per_epoch)
    yield from job.notes
    if any(job.kept_bytes):
        yield f"{sum(job.kept_bytes) / 1e9:.2g} GB of each rank's memory keep decoded images (--decoded-cache)"
    if job.options.resume:
        yield f"resumed after step {step}"


def _changes(job: Job) -> str:
    """The flags that make this run from its preset."""
    preset = PRESETS[job.preset][1] if job.preset in PRESETS else Recipe()
    recipe, usual, options = _flat(job.recipe.as_dict()), _flat(preset.as_dict()), dataclasses.asdict(job.options)
    changes = {name: value for name, value in recipe.items() if value != usual[name]}
    told = _told(job)
    changes |= {name: told[name] for name, value in options.items() if value != getattr(Options(), name, None)}
    for name in ("out", "resume"):  # told in lines of their own
        changes.pop(name, None)
    if preset.order_of(len(job.train_set)) == job.recipe.order:
        changes.pop("order", None)
    return ", ".join(f"{name} {value}" for name, value in changes.items())


def summary(job: Job, step: int, seconds: float, rollbacks: int) -> dict[str, Any]:
    """What RUN/summary.json holds, but for whether the run was stopped."""
    log, neighbours = read_lines(job.out / LOG), read_lines(job.out / KNN)
    end = log[-1] if log else {}
    return {
        "steps": step,
        "epochs": step / job.plan.steps_per_epoch,
        "pairs_per_s": statistics.median(line["pairs_per_s"] for line in log) if log else None,
        "data_wait": statistics.median(line["data_wait"] for line in log) if log else None,
        **{name: end.get(name) for name in ("loss", "top1", "top5")},
        "chance_loss": chance_level(job.recipe),
        "knn_before": neighbours[0]["top1"] if neighbours and neighbours[0]["step"] == 0 else None,
        "knn_after": neighbours[-1]["top1"] if neighbours and neighbours[-1]["step"] == step else None,
        "seconds": seconds,
        "skipped_steps": sum(line.get("nonfinite", 0) for line in log),
        "rollbacks": rollbacks,
    }


def _create(out: Path, resume: bool) -> None:
    try:
        out.mkdir(parents=True, exist_ok=resume)
    except FileExistsError as error:
        raise UsageError(f"{out} exists: continue it with --resume, or give --out another name") from error


def _device_name(parallel: Parallel) -> str:
    if parallel.device.type == "cuda":
        return torch.cuda.get_device_name(parallel.device)
    return f"{ON_CPU}{environment.cores()} cores"


def _flat(data: dict[str, Any]) -> dict[str, Any]:
    inner = data.get("augmentation", {})
    return {name: value for name, value in {**data, **inner}.items() if name != "augmentation"}


def closing(job: Job, summary: dict[str, Any], start: int) -> Iterator[str]:
    """The last lines of a run that began, or was resumed, after step `start`, from its summary."""
    steps, paused, out = summary["steps"], job.last < job.total, job.out
    lines = [f"{'' if paused else 'done: '}{steps} steps in {summary['seconds']:.0f} s"]
    if start == steps:
        lines = [f"nothing was left to train: {'' if paused else 'all '}{steps} steps were done before"]
    if summary["loss"] is not None:
        lines.append(f"loss {summary['loss']:.3f} (chance {summary['chance_loss']:.3f})")
        lines.append(f"{summary['pairs_per_s']:.1f} pairs/s")
    if summary["knn_after"] is not None:
        before = f" (before: {summary['knn_before']:.1f}%)" if summary["knn_before"] is not None else ""
        lines.append(f"kNN top-1 {summary['knn_after']:.1f}%{before}")
    yield f"{', '.join(lines)}; see {out}/summary.json and {out}/curves.png"
    if paused:
        yield f"stopped after step {steps} of {job.total} (--stop-after): go on with {go_on(out)}"
