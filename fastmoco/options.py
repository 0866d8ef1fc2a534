"""Options: where and how a command runs. What decides a run's numbers stands in `recipe.py`.

Each command takes one frozen dataclass from here. Fields without a default are positional arguments, the others are
flags; the string under a field is its help. Only the standard library is imported, so that `--help` is instant.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from fastmoco.recipe import Recipe

Device = Literal["auto", "cpu", "cuda"]


class UsageError(ValueError):
    """The command was used wrongly; the message says what, where and what to do."""

    exit_code = 2


@dataclass(frozen=True)
class Options:
    """Where a pretraining run reads and writes, and how it goes about it; none of it changes the numbers."""

    data: Path | None = None
    """Images: a folder of class folders, a flat folder, a parent of train/ and val/, or a text file of paths."""
    out: Path | None = None
    """Folder of the run, which must not exist yet unless --resume is given."""
    resume: bool = False
    """Continue the run in --out from its newest good checkpoint, with the recipe it was started with."""
    val: Path | None = None
    """Labelled images whose classes kNN predicts; left out, the val/ beside train/."""
    knn: bool = True
    """Evaluate kNN before the first step and after the last, where there are labels."""
    knn_every: int = 0
    """Also evaluate kNN every so many epochs; 0 is never."""

    device: Device = "auto"
    """Where to compute; auto is the GPU where there is one."""
    threads: int = 0
    """Threads that decode images, for each rank; 0 is its share of the cores."""
    prefetch: int = 2
    """Batches that are prepared ahead of the step."""
    quarantine: bool = True
    """Replace images that turn out to be bad, and list them in RUN/quarantine.jsonl; without it the first one stops
    the run."""
    graph: Literal["auto", "on", "off"] = "auto"
    """Replay the step as one CUDA graph; auto does on a GPU."""
    encoder: Literal["fused", "eager", "compile"] = "fused"
    """Batch norm by our kernels, in plain torch, or in plain torch through torch.compile."""
    update: Literal["fused", "torch", "apex"] = "fused"
    """Update by our kernel, by torch's fused SGD, or by NVIDIA's apex where it is installed."""
    key_stream: bool = False
    """Encode keys on a CUDA stream of their own, beside the queries."""
    timeout_seconds: float = 120.0
    """Seconds that ranks wait for each other after the first step before the run fails; 0 leaves ten minutes."""

    log_every: int = 10
    """Steps between two lines of the log."""
    save_every: int = 0
    """Steps between two checkpoints; 0 leaves it to --save-minutes."""
    save_minutes: float = 15.0
    """Minutes between two checkpoints; 0 leaves it to --save-every."""
    keep: int = 2
    """Newest checkpoints that are kept, at least 2."""
    keep_every: int = 0
    """Also keep, for good, the checkpoints of steps that this divides; 0 keeps none of them."""
    stop_after: int | None = None
    """Step of the run after which to stop early, checkpoint written; the schedule stays that of all epochs."""
    on_nonfinite: Literal["stop", "rollback", "skip"] = "stop"
    """Where loss or gradients become infinite or NaN, which no update survives: stop; go back to the last checkpoint
    and on after the bad batch; or go on without that step's update."""
    watchdog_seconds: float = 600.0
    """Seconds without a step after which the process shows the stacks of its threads and ends with code 124, three
    times as many before the first step; 0 is never."""
    tensorboard: bool = False
    """Also write RUN/tensorboard (needs the extra: pip install 'fastmoco[tensorboard]')."""

    def __post_init__(self) -> None:
        at_least = {"log_every": 1, "prefetch": 1, "keep": 2, "knn_every": 0, "threads": 0}
        at_least |= {"save_every": 0, "save_minutes": 0, "timeout_seconds": 0}
        at_least |= {"keep_every": 0, "watchdog_seconds": 0}
        for name, low in at_least.items():
            _require(getattr(self, name) >= low, name, getattr(self, name), f"use a number of at least {low}")
        if self.stop_after is not None:
            _require(self.stop_after >= 1, "stop_after", self.stop_after, "use a number of at least 1")
        if self.resume and self.out is None:
            raise UsageError("--resume needs the run to continue: add --out RUN")


@dataclass(frozen=True)
class PretrainFlags:
    """A pretraining run: what decides its numbers, and where and how it runs."""

    options: Options = field(default_factory=Options)
    """Where and how."""
    recipe: Recipe = field(default_factory=Recipe)
    """What decides the result."""


class Pretrain(NamedTuple):
    """What `pretrain PRESET` was asked to do."""

    preset: str
    """Name of the preset."""
    recipe: Recipe
    """The preset with the flags that change it."""
    options: Options
    """Where and how."""


@dataclass(frozen=True)
class EvaluateKnn:
    """Weighted kNN on the frozen encoder of a run: train images vote on the class of validation images."""

    run: Path
    """Folder of the run."""
    data: Path | None = None
    """Labelled images whose classes vote; left out, those that the run was trained on."""
    val: Path | None = None
    """Labelled images to classify; left out, the val/ beside train/."""
    k: int | None = None
    """Neighbours that vote; left out, the recipe's."""
    temperature: float | None = None
    """Temperature of the votes exp(similarity / T); left out, the recipe's."""
    features: Literal["backbone", "projection"] | None = None
    """Features to compare: before or after the projection head; left out, the recipe's."""
    device: Device = "auto"
    """Where to compute; auto is the GPU where there is one."""
    threads: int = 0
    """Threads that decode images; 0 is all cores."""

    def __post_init__(self) -> None:
        _require(self.k is None or self.k >= 1, "k", self.k, "use a number of at least 1")
        _require(self.temperature is None or self.temperature > 0, "temperature", self.temperature, "use more than 0")


@dataclass(frozen=True)
class Export:
    """Write the pretrained weights of a run as other projects read them."""

    run: Path
    """Folder of the run."""
    format: Literal["moco", "torchvision", "timm", "detectron2", "safetensors"] = "torchvision"
    """Whose layout: of facebookresearch/moco, torchvision, timm, detectron2, or safetensors with a model card."""
    out: Path | None = None
    """File to write; for timm and safetensors a folder. It must not exist yet."""

    def __post_init__(self) -> None:
        _require(self.out is not None, "out", self.out, "name the file to write")


@dataclass(frozen=True)
class Import:
    """Bring a published MoCo checkpoint, or torchvision weights, as a run to evaluate, export or go on with."""

    file: Path
    """A .pth.tar of facebookresearch/moco, our export of one, or a plain network's .pth or .safetensors."""
    out: Path | None = None
    """Folder of the run to write, which must not exist yet."""
    preset: Literal["auto", "v1", "v2", "cifar"] = "auto"
    """Recipe that the run goes on with where the file does not say; auto follows the projection head."""
    data: Path | None = None
    """Images that the run goes on with; their number turns the file's epochs into steps."""
    epochs: int | None = None
    """Length of the run it becomes part of; left out, the preset's."""
    batch_size: int | None = None
    """Global batch that the run goes on with; left out, the preset's."""

    def __post_init__(self) -> None:
        _require(self.out is not None, "out", self.out, "name the folder of the run to write")


@dataclass(frozen=True)
class CheckpointVerify:
    """Check every byte of a run's checkpoints against their SHA-256; code 3 where none is good. Changes nothing."""

    run: Path
    """Folder of the run."""


@dataclass(frozen=True)
class CheckpointList:
    """List a run's checkpoints with step, time and size, without reading them."""

    run: Path
    """Folder of the run."""


@dataclass(frozen=True)
class DataScan:
    """Check a set of images: how many, which classes, which sizes, and the reason for every file left out."""

    path: Path
    """Folder or text file of image paths."""


@dataclass(frozen=True)
class DataSynth:
    """Write the embedded set of labelled JPEG images, train/CLASS/*.jpg and val/CLASS/*.jpg."""

    path: Path
    """Folder to write."""


@dataclass(frozen=True)
class Env:
    """Versions, devices and cores, for bug reports and beside every published figure."""

    json: bool = False
    """Print JSON."""


def restarted() -> bool:
    """Whether torchrun started this process in place of one that failed (--max-restarts)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def check_places(preset: str, options: Options, is_main: bool = True) -> None:
    """UsageError where a run lacks a place that its preset does not bring, or would overwrite another run."""
    for name in ("data", "out"):
        if getattr(options, name) is None and preset != "demo":
            raise UsageError(f"pretrain {preset} needs --{name} PATH: only pretrain demo brings its own")
    if options.resume and not options.out.is_dir():
        raise UsageError(f"{options.out} does not exist: check --out, or leave --resume out")
    if is_main and not options.resume and options.out is not None and options.out.exists():
        raise UsageError(f"{options.out} exists: continue it with --resume, or give --out another name")


def _require(ok: bool, name: str, value: object, remedy: str) -> None:
    if not ok:
        raise UsageError(f"--{name.replace('_', '-')} is {value!r}: {remedy}")

