"""Options: where and how a command runs. What decides a run's numbers stands in `recipe.py`.

Each command takes one frozen dataclass from here, those that measure one from `bench/options.py`. Fields without a
default are positional arguments, the others are flags; the string under a field is its help. Only the standard library
is imported, so that `--help` is instant.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from fastmoco.recipe import MOST_PIXELS, Recipe

Device = Literal["auto", "cpu", "cuda"]
LONGEST = 10**9  # seconds: no clock counts to infinity


class UsageError(ValueError):
    """The command was used wrongly; the message says what, where and what to do."""

    exit_code = 2


@dataclass(frozen=True)
class Options:
    """Where a pretraining run reads and writes, and how it works.

    What is learnt does not depend on these, up to rounding and but for `data` and `start_from`: the implementations
    behind `encoder`, `update` and `photometric` round differently.
    """

    data: Path | None = None
    """Images: a folder of class folders, a flat folder, a parent of train/ and val/, or a text file of
    paths; or tar archives in place of files, on a disk or behind a URL (s3, gs, https, hf)."""
    out: Path | None = None
    """Folder of the run, which must not exist yet unless --resume is given."""
    recipe: Path | None = None
    """Recipe file to start from: a run's recipe.json, or a TOML file of what differs from a preset. Flags win."""
    dry_run: bool = False
    """Only tell what the run would take: images, steps, memory and time, tried with a few small batches."""
    resume: bool = False
    """Continue the run in --out from its newest good checkpoint, with the recipe it was started with."""
    start_from: Path | None = None
    """Weights that the backbone starts from, in place of random ones: a run, what export wrote, a MoCo checkpoint, or a
    torchvision network of the same --arch. The projection head is new."""
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
    hw_decoder_load: float | None = None
    """Share of the JPEGs for a GPU's decoding engine, 0 to 1; left out, by the number of threads."""
    cache_gb: float = 50.0
    """GB of a local disk that shards of a remote --data may take, for all runs of this machine; 0 keeps none."""
    cache_dir: Path | None = None
    """Where these shards are kept; left out, ~/.cache/fastmoco/shards."""
    retry_seconds: float = 300.0
    """Seconds that a remote --data may not answer, or answer wrongly, before the run stops."""
    decoded_cache: float | None = None
    """GB of decoded images that each rank keeps in memory, its GPU's where it has one, so as to decode them once; inf
    is all. Left out, all on a CPU where they take at most 0.256 GB, else none."""
    quarantine: bool = True
    """Replace images that turn out to be bad, and list them in RUN/quarantine.jsonl; without it the first one stops
    the run."""
    photometric: Literal["kernel", "dali"] = "kernel"
    """What computes flip, colours, blur and normalisation: our kernel in the step, or DALI's operators before it."""
    graph: Literal["auto", "on", "off"] = "auto"
    """Replay the step as one CUDA graph; auto does on a GPU."""
    encoder: Literal["fused", "eager", "compile"] = "fused"
    """Batch norm by our kernels, in plain torch, or in plain torch through torch.compile."""
    update: Literal["fused", "torch", "apex"] = "fused"
    """Update by our kernel, by torch's fused SGD, or by NVIDIA's apex where it is installed."""
    key_stream: bool = False
    """Encode keys on a CUDA stream of their own, beside the queries."""
    deterministic: Literal["on", "off"] = "off"
    """On a GPU: take only algorithms that give the same bits each time, so that a resumed run equals an undisturbed one
    bit for bit, as it always does on a CPU; off lets cuDNN time its algorithms in every process."""
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
    """What to do when loss or gradients become NaN or infinite; that update is always skipped. stop ends the run;
    rollback returns to the last checkpoint and skips the batch; skip goes on."""
    watchdog_seconds: float = 600.0
    """Seconds without a step after which the process shows the stacks of its threads and ends with code 124, three
    times as many before the first step; 0 is never."""
    tensorboard: bool = False
    """Also write RUN/tensorboard (needs the extra: pip install -c constraints.txt -e '.[tensorboard]')."""
    track: Literal["none", "wandb", "trackio"] = "none"
    """Also send the figures to Weights & Biases or Trackio (needs the package of that name)."""

    def __post_init__(self) -> None:
        at_least = {"log_every": 1, "prefetch": 1, "keep": 2, "knn_every": 0, "threads": 0}
        at_least |= {"save_every": 0, "save_minutes": 0, "cache_gb": 0, "retry_seconds": 0}
        at_least |= {"keep_every": 0, "decoded_cache": 0}
        for name, low in at_least.items():
            value = getattr(self, name)
            require(value is None or value >= low, name, value, f"use a number of at least {low}")
        for name in ("timeout_seconds", "watchdog_seconds"):
            require_seconds(name, getattr(self, name))
        if self.stop_after is not None:
            require(self.stop_after >= 1, "stop_after", self.stop_after, "use a number of at least 1")
        load = self.hw_decoder_load
        require(load is None or 0 <= load <= 1, "hw_decoder_load", load, "use a share from 0 to 1")
        if self.deterministic == "on" and load not in (None, 0, 1):
            # Which images the engine gets depends on the batch, and its pixels are not those of the multiprocessors.
            raise UsageError(f"--hw-decoder-load is {load}, which is not deterministic: use 0 or 1, or leave it out")
        if self.photometric == "dali" and self.graph == "on":
            raise UsageError(
                "--photometric dali does not go with --graph on, whose graph holds the kernel: use --graph off"
            )
        if self.resume and self.out is None:
            raise UsageError("--resume needs the run to continue: add --out RUN")

    @property
    def decoder_load(self) -> float | None:
        """Share of the JPEGs for a GPU's decoding engine: as given, or all where runs are to be deterministic."""
        return 1.0 if self.deterministic == "on" and self.hw_decoder_load is None else self.hw_decoder_load


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
    """Labelled images to classify; left out, the val/ beside train/, or a fifth of each class, which does not train."""
    labels: Path | None = None
    """CSV file of path,class for images that stand in no class folders."""
    k: int | None = None
    """Neighbours that vote; left out, the recipe's."""
    temperature: float | None = None
    """Temperature of the votes exp(similarity / T); left out, the recipe's."""
    features: Literal["backbone", "projection"] | None = None
    """Features to compare: before or after the projection head; left out, the recipe's."""
    untrained: bool = False
    """Judge the network before training instead, with its first weights: what the figures are to be compared with."""
    device: Device = "auto"
    """Where to compute; auto is the GPU where there is one."""
    threads: int = 0
    """Threads that decode images; 0 is all cores."""

    def __post_init__(self) -> None:
        require(self.k is None or self.k >= 1, "k", self.k, "use a number of at least 1")
        require(self.temperature is None or self.temperature > 0, "temperature", self.temperature, "use more than 0")


@dataclass(frozen=True)
class EvaluateLinear:
    """Linear probe of a run's frozen backbone, as published; or a fast one."""

    run: Path
    """Folder of the run."""
    data: Path | None = None
    """Labelled images to train the classifier on; left out, those that the run was trained on."""
    val: Path | None = None
    """Labelled images to classify; left out, the val/ beside train/, or a fifth of each class, which does not train."""
    labels: Path | None = None
    """CSV file of path,class for images that stand in no class folders."""
    fast: bool = False
    """Train on features of centre crops that are computed once: minutes instead of hours."""
    untrained: bool = False
    """Judge the network before training instead, with its first weights: what the figures are to be compared with."""
    epochs: int = 100
    """Epochs; the rate is divided by ten after 60 % and 80 % of them."""
    batch_size: int = 256
    """Images in a batch; the learning rate is scaled linearly with it."""
    lr: float | Literal["auto"] = "auto"
    """Learning rate for batches of 256. auto takes, of nine from 30 to 0.003, the one that does best on training images
    that are held out, each fifth in turn; 30 is the published one."""
    seed: int = 0
    """Of the classifier's start, the order and the crops."""
    device: Device = "auto"
    """Where to compute; auto is the GPU where there is one."""
    threads: int = 0
    """Threads that decode images; 0 is all cores."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "use a number of at least 1")
        require(self.lr == "auto" or self.lr > 0, "lr", self.lr, "use auto or more than 0")


@dataclass(frozen=True)
class Embed:
    """Write the features of images, one row each, with their file names."""

    run: Path
    """Folder of the run."""
    data: Path | None = None
    """Images: a folder or a text file of paths."""
    out: Path | None = None
    """File to write: .npz, or .parquet where pyarrow is installed."""
    untrained: bool = False
    """Take the network before training instead, with its first weights: what the features are to be compared with."""
    features: Literal["backbone", "projection"] = "backbone"
    """Features before or after the projection head."""
    normalise: bool = False
    """Scale every row to length 1."""
    device: Device = "auto"
    """Where to compute; auto is the GPU where there is one."""
    threads: int = 0
    """Threads that decode images; 0 is all cores."""

    def __post_init__(self) -> None:
        require(self.data is not None, "data", self.data, "name the images")
        require(self.out is not None, "out", self.out, "name the file to write")
        if self.out is not None:
            require(self.out.suffix in (".npz", ".parquet"), "out", str(self.out), "end it in .npz or .parquet")


@dataclass(frozen=True)
class Report:
    """Write one HTML page about a run: recipe, curves, throughput, views, checkpoints, evaluation."""

    run: Path
    """Folder of the run."""
    out: Path | None = None
    """File to write; left out, RUN/report.html."""
    views: bool = True
    """Show the first batch's augmented views, where the images are still there."""
    map: bool = False
    """First draw a map of the features of up to 2,000 images: RUN/map.png."""


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
        require(self.out is not None, "out", self.out, "name the file to write")


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
        require(self.out is not None, "out", self.out, "name the folder of the run to write")


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
    """Folder, tar, text file of paths, or URL of tar shards."""
    full: bool = False
    """Also decode every image, which finds damage that headers do not show."""
    max_pixels: int = Recipe.max_pixels
    """Images of more pixels are left out, as pretrain --max-pixels does."""
    value_range: tuple[float, float] | Literal["header", "container"] = "header"
    """Numbers that are black and white, as pretrain --value-range says."""
    shards: tuple[int, int] | None = None
    """Of a set of shards: look at those from the first number on, which counts from 0, to before the second. So
    machines share the work."""
    sample: int = 0
    """Of a set of shards: look at so many alone, evenly spread; 0 looks at all."""
    index: Path | None = None
    """Of a set of shards: folder that keeps what is found of each. When all are there it becomes the index, which opens
    the set unread where it is copied beside the shards."""
    cache_gb: float = 50.0
    """GB of a local disk that shards of a remote set may take; 0 keeps none."""
    cache_dir: Path | None = None
    """Where these shards are kept; left out, ~/.cache/fastmoco/shards."""
    retry_seconds: float = 300.0
    """Seconds that a remote set may not answer, or answer wrongly, before the scan stops."""
    json: Path | None = None
    """File for the same facts as JSON, with every file that was left out."""

    def __post_init__(self) -> None:
        remedy = f"use a whole number from 1 to {MOST_PIXELS}"
        require(1 <= self.max_pixels <= MOST_PIXELS, "max_pixels", self.max_pixels, remedy)
        for name in ("sample", "cache_gb", "retry_seconds"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "use a number of at least 0")


@dataclass(frozen=True)
class DataPack:
    """Write images as tar shards in WebDataset's layout, with an index: what disks and networks serve fast.

    Started again after it was ended, it goes on where it was.
    """

    path: Path
    """Images: a folder, a parent of train/ and val/, or a text file of paths."""
    out: Path | None = None
    """Folder of the shards."""
    shard_mb: int = 256
    """MB of a shard at most, but for a single larger image."""
    shorter_side: int | None = None
    """Shrink images to so many pixels of the shorter side, as JPEGs; left out, files stay as they are. Transparent
    images, and those of more than 8 bits, always do."""
    quality: int = 90
    """JPEG quality of images that were shrunk."""
    shuffle: bool = False
    """Mix the images over all shards, always in the same way, so that each holds some of every class, as windows of few
    shards want; left out, they stand in the order of paths."""
    max_pixels: int = Recipe.max_pixels
    """Images of more pixels are left out, as pretrain --max-pixels does."""

    def __post_init__(self) -> None:
        require(self.out is not None, "out", self.out, "name the folder to write")
        require(self.shard_mb >= 1, "shard_mb", self.shard_mb, "use a number of at least 1")
        require(self.shorter_side is None or self.shorter_side >= 1, "shorter_side", self.shorter_side, "use pixels")
        require(1 <= self.quality <= 100, "quality", self.quality, "use a number from 1 to 100")


@dataclass(frozen=True)
class DataSynth:
    """Write the embedded set of labelled JPEG images, train/CLASS/*.jpg and val/CLASS/*.jpg."""

    path: Path
    """Folder to write."""


@dataclass(frozen=True)
class Presets:
    """List the recipes that have names."""

    toml: str | None = None
    """Print this preset as a recipe file, every field of it."""


@dataclass(frozen=True)
class Completion:
    """Print a script that lets a shell complete commands, flags and values: source <(fastmoco completion bash)."""

    shell: Literal["bash", "zsh", "fish"]
    """The shell."""


@dataclass(frozen=True)
class Env:
    """Versions, devices and cores, for bug reports and beside every published figure."""

    json: bool = False
    """Print JSON."""


def is_restart() -> bool:
    """Whether torchrun started this process in place of one that failed (--max-restarts)."""
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0:
        return True
    # Where a rank of another machine failed torchrun counts nothing here: launch.py gives a folder for marks.
    folder = os.environ.get("FASTMOCO_LAUNCH")
    if folder is None:
        return False
    mark, mine = Path(folder, os.environ.get("LOCAL_RANK", "0")), str(os.getpid())
    if not mark.exists():
        mark.write_text(mine)
    return mark.read_text() != mine


def check_places(preset: str, options: Options, is_main: bool = True) -> None:
    """Raise UsageError if --data or --out is missing (only demo has defaults), or --out exists already."""
    for name in ("data", "out"):
        if getattr(options, name) is None and preset != "demo" and not (name == "out" and options.dry_run):
            raise UsageError(f"pretrain {preset} needs --{name} PATH: only pretrain demo brings its own")
    if options.resume and options.out is not None and not options.out.is_dir():
        raise UsageError(f"{options.out} does not exist: check --out, or leave --resume out")
    if is_main and not options.resume and options.out is not None and options.out.exists():
        raise UsageError(f"{options.out} exists: continue it with --resume, or give --out another name")


def require_new(path: Path) -> None:
    """Raise UsageError if there is something at the place that a command is to write; its folder is made."""
    if path.exists():
        raise UsageError(f"{path} exists: give --out another name, or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)


def require_file(path: Path, name: str) -> None:
    """Raise UsageError if a file cannot be written there because it is a folder; the folder of the file is made."""
    require(not path.is_dir(), name, str(path), "name a file, not a folder")
    path.parent.mkdir(parents=True, exist_ok=True)


def require_seconds(name: str, value: float, least: int = 0) -> None:
    """Raise UsageError unless clocks can wait for so many seconds, up to some thirty years."""
    require(least <= value <= LONGEST, name, value, f"use a number from {least} to {LONGEST}")


def require(ok: bool, name: str, value: object, remedy: str) -> None:
    """Raise UsageError, naming the flag and its remedy, unless `ok`."""
    if not ok:
        text = "missing" if value is None else repr(value)
        raise UsageError(f"--{name.replace('_', '-')} is {text}: {remedy}")
