"""Checkpoints that survive: written whole or not at all, verified before they are trusted.

    RUN/checkpoints/step_00012345/model.safetensors   the encoders, and the queue or bank
                                 /state.pt            velocities, counters, recipe (tensors and plain data only)
                                 /manifest.json       size and SHA-256 of the two, step, versions
    RUN/checkpoints/latest                            link to the newest

A checkpoint is written under a temporary name, each file is synced, the manifest comes last, and one rename makes it
appear. Neither torch nor safetensors notices a flipped byte, so nothing is loaded before its hashes are checked; a
damaged checkpoint is renamed *.damaged and the one before it is used. Nothing is ever unpickled beyond tensors and
plain data (`weights_only`).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastmoco import atomic
from fastmoco.environment import versions
from fastmoco.process import crash_points

FORMAT = 1
MODEL, STATE, MANIFEST = "model.safetensors", "state.pt", "manifest.json"
LATEST, PREFIX = "latest", "step_"
TEMPORARY, DAMAGED, OLD, COPY = ".writing", ".damaged", ".old", ".copy"
NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP)  # what file systems without links answer


class CheckpointError(ValueError):
    """No checkpoint can be used; the message names each one and what is wrong with it."""

    exit_code = 3


class Checkpoint(NamedTuple):
    """What a checkpoint holds."""

    step: int
    """Steps done."""
    state: dict[str, Tensor]
    """Tensors on the CPU, by the names of `Step.state`."""
    meta: dict[str, Any]
    """Plain data stored beside them, the recipe for one."""


def save(
    run: Path,
    step: int,
    state: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    keep: int = 2,
    keep_every: int = 0,
) -> Path:
    """Write the checkpoint of `step`, then remove all but the newest `keep` (at least 2) and multiples of `keep_every`.

    Raises OSError if the disk refuses; every earlier checkpoint is then still whole. A good checkpoint of this step
    stays: a run has one state at a step.
    """
    root = run / "checkpoints"
    root.mkdir(parents=True, exist_ok=True)
    final = root / f"{PREFIX}{step:08d}"
    if final.exists():
        if damage(final) is None:
            return final
        _set_aside(final, DAMAGED)
    draft = root / f"{final.name}{TEMPORARY}"
    shutil.rmtree(draft, ignore_errors=True)
    try:
        _write(draft, step, state, meta)
        crash_points.reach("manifest written")
        os.replace(draft, final)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    crash_points.reach("renamed")
    atomic.sync(root)
    _point(root, final.name)
    crash_points.reach("latest set")
    with contextlib.suppress(OSError):  # what should go and stays does no harm
        _prune(root, max(keep, 2), keep_every)
    return final


def latest(run: Path, report: Callable[[str], None] | None = None) -> Path | None:
    """Newest checkpoint of `run` that verifies, or None if the run has none yet.

    Damaged ones on the way are renamed *.damaged and reported, stale drafts removed. Raises CheckpointError if there
    are checkpoints and none is good.
    """
    report = report or _to_stderr
    root = run / "checkpoints"
    _sweep(root)
    reasons = []
    for path in reversed(steps(run)):
        reason = damage(path)
        if reason is None:
            return path
        aside = _set_aside(path, DAMAGED)
        reasons.append(f"{path.name} ({reason})")
        report(f"checkpoint {path} is damaged and was set aside as {aside.name}: {reason}")
    earlier = [path.name for path in root.glob(f"{PREFIX}*{DAMAGED}*")] if not reasons else []
    if reasons or earlier:
        what = ", ".join(reasons) or ", ".join(sorted(earlier))
        raise CheckpointError(f"{root} holds no good checkpoint: {what}: restore one, or start another run")
    return None


def steps(run: Path) -> list[Path]:
    """Checkpoints of `run`, oldest first, verified or not."""
    paths = (run / "checkpoints").glob(f"{PREFIX}*")
    return sorted((path for path in paths if path.name[len(PREFIX) :].isdigit()), key=_step)


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None if every byte is as it was written."""
    try:
        text = (path / MANIFEST).read_text()
        manifest = json.loads(text)
        if manifest["format"] != FORMAT:
            return f"{MANIFEST} has format {manifest['format']}, this version reads {FORMAT}"
        if manifest["step"] != _step(path):
            return f"{MANIFEST} is of step {manifest['step']}"
        if _seal(manifest) != manifest["seal"] or _render(manifest) != text:
            return f"{MANIFEST} does not match its own seal"
        if set(manifest["files"]) != {MODEL, STATE}:
            return f"{MANIFEST} does not list {MODEL} and {STATE}"
        for name, expected in manifest["files"].items():
            reason = _difference(path / name, expected)
            if reason:
                return reason
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except PermissionError:
        raise
    except OSError as error:
        return f"{Path(error.filename or path).name} cannot be read: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({error!r})"
    return None


def load(path: Path, verified: bool = False) -> Checkpoint:
    """Read a checkpoint onto the CPU, verified unless `latest` just did it. Raises CheckpointError if it is damaged."""
    reason = None if verified else damage(path)
    if reason is not None:
        raise CheckpointError(f"{path}: {reason}: use another checkpoint")
    rest = torch.load(path / STATE, map_location="cpu", weights_only=True)
    return Checkpoint(rest["meta"]["step"], load_file(path / MODEL) | rest["tensors"], rest["meta"])


def _write(draft: Path, step: int, state: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    draft.mkdir()
    tensors = _on_host(state)
    model = {name: value for name, value in tensors.items() if name.startswith("encoder_") or name in ("queue", "bank")}
    rest = {name: value for name, value in tensors.items() if name not in model}
    _write_model(model, draft / MODEL, step)
    crash_points.reach("model written")
    _write_rest({"tensors": rest, "meta": {**meta, "step": step}}, draft / STATE)
    crash_points.reach("state written")
    for name in (MODEL, STATE):
        atomic.sync(draft / name)
    manifest: dict[str, Any] = {"format": FORMAT, "step": step, "versions": versions()}
    manifest["files"] = {
        name: {"bytes": (draft / name).stat().st_size, "sha256": atomic.sha256(draft / name)} for name in (MODEL, STATE)
    }
    manifest["seal"] = _seal(manifest)
    (draft / MANIFEST).write_text(_render(manifest))
    atomic.sync(draft / MANIFEST)
    atomic.sync(draft)


def _on_host(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    places: set[int] = set()
    for name, value in state.items():
        value = value.detach().cpu().contiguous()
        # safetensors refuses two names for the same memory.
        tensors[name] = value.clone() if value.data_ptr() in places else value
        places.add(value.data_ptr())
    return tensors


def _write_model(model: dict[str, Tensor], path: Path, step: int) -> None:
    try:
        save_file(model, path, metadata={"format": "pt", "step": str(step)})
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def _write_rest(rest: dict[str, Any], path: Path) -> None:
    # Through memory, because torch's own file writer does not say what the disk answered.
    buffer = io.BytesIO()
    torch.save(rest, buffer)
    with path.open("wb", buffering=0) as file:
        left = buffer.getbuffer()
        while left:
            left = left[file.write(left) :]


def _seal(manifest: Mapping[str, Any]) -> str:
    # The manifest vouches for the files; this vouches for the manifest.
    body = {name: value for name, value in manifest.items() if name != "seal"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _render(manifest: Mapping[str, Any]) -> str:
    return json.dumps(manifest, indent=2) + "\n"


def _difference(path: Path, expected: Mapping[str, Any]) -> str | None:
    size = path.stat().st_size
    if size != expected["bytes"]:
        return f"{path.name} has {size} bytes instead of {expected['bytes']}"
    if atomic.sha256(path) != expected["sha256"]:
        return f"{path.name} does not have the SHA-256 it was written with"
    return None


def _step(path: Path) -> int:
    return int(path.name[len(PREFIX) :])


def _point(root: Path, name: str) -> None:
    latest = root / LATEST
    if latest.is_dir() and not latest.is_symlink():  # what copying a run makes of the link
        _set_aside(latest, COPY)
    link = root / f"{LATEST}{TEMPORARY}"
    link.unlink(missing_ok=True)
    try:
        link.symlink_to(name)
    except OSError as error:  # nothing but people reads this one
        if error.errno in NO_LINKS:
            return
        raise
    os.replace(link, latest)


def _prune(root: Path, keep: int, keep_every: int) -> None:
    for path in steps(root.parent)[:-keep]:
        if keep_every and _step(path) % keep_every == 0:
            continue
        # Renamed first, so that a kill halfway through leaves no half checkpoint behind under a good name.
        aside = _set_aside(path, OLD)
        crash_points.reach("pruning")
        shutil.rmtree(aside, ignore_errors=True)


def _sweep(root: Path) -> None:
    for path in [*root.glob(f"*{TEMPORARY}"), *root.glob(f"{PREFIX}*{OLD}*")]:
        if path.is_symlink():
            path.unlink(missing_ok=True)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _set_aside(path: Path, suffix: str) -> Path:
    name = f"{path.name}{suffix}"
    count = sum(other.name.startswith(name) for other in path.parent.iterdir())
    aside = path.with_name(f"{name}{count}" if count else name)
    os.replace(path, aside)
    return aside


def _to_stderr(message: str) -> None:
    print(f"fastmoco: {message}", file=sys.stderr, flush=True)
