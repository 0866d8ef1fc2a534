"""Options: where and how a command runs. What decides a run's numbers stands in `recipe.py`.

Each command takes one frozen dataclass from here. Fields without a default are positional arguments, the others are
flags; the string under a field is its help. Only the standard library is imported, so that `--help` is instant.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from fastmoco.recipe import MOST_PIXELS, Recipe

Device = Literal["auto", "cpu", "cuda"]


class UsageError(ValueError):
    """The command was used wrongly; the message says what, where and what to do."""

    exit_code = 2


@dataclass(frozen=True)
class Options:
    """Where a pretraining run reads and writes, and how it works.

    What is learnt does not depend on these, up to rounding: the implementations behind `encoder`, `update` and
    `photometric` round differently.
    """

    data: Path | None = None
    """Images: a folder of class folders, a flat folder, a parent of train/ and val/, or a text file of
    paths; or tar archives in place of files."""
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
    hw_decoder_load: float | None = None
    """Share of the JPEGs for a GPU's decoding engine, 0 to 1; left out, by the number of threads."""
    decoded_cache: float = 0.0
    """GB of decoded images that each rank keeps in memory, its GPU's where it has one, so as to decode them once."""
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
    """Also write RUN/tensorboard (needs the extra: pip install 'fastmoco[tensorboard]')."""
    track: Literal["none", "wandb", "trackio"] = "none"
    """Also send the figures to Weights & Biases or Trackio (needs the package of that name)."""

    def __post_init__(self) -> None:
        at_least = {"log_every": 1, "prefetch": 1, "keep": 2, "knn_every": 0, "threads": 0}
        at_least |= {"save_every": 0, "save_minutes": 0, "timeout_seconds": 0}
        at_least |= {"keep_every": 0, "watchdog_seconds": 0, "decoded_cache": 0}
        for name, low in at_least.items():
            _require(getattr(self, name) >= low, name, getattr(self, name), f"use a number of at least {low}")
        if self.stop_after is not None:
            _require(self.stop_after >= 1, "stop_after", self.stop_after, "use a number of at least 1")
        load = self.hw_decoder_load
        _require(load is None or 0 <= load <= 1, "hw_decoder_load", load, "use a share from 0 to 1")
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
    """Labelled images to classify; left out, the val/ beside train/."""
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
        _require(self.k is None or self.k >= 1, "k", self.k, "use a number of at least 1")
        _require(self.temperature is None or self.temperature > 0, "temperature", self.temperature, "use more than 0")


@dataclass(frozen=True)
class EvaluateLinear:
    """Linear probe of a run's frozen backbone, as published; or a fast one, or fine-tuning."""

    run: Path
    """Folder of the run."""
    data: Path | None = None
    """Labelled images to train the classifier on; left out, those that the run was trained on."""
    val: Path | None = None
    """Labelled images to classify; left out, the val/ beside train/."""
    labels: Path | None = None
    """CSV file of path,class for images that stand in no class folders."""
    fast: bool = False
    """Train on features of centre crops that are computed once: minutes instead of hours."""
    finetune: bool = False
    """Train the backbone too."""
    untrained: bool = False
    """Judge the network before training instead, with its first weights: what the figures are to be compared with."""
    epochs: int = 100
    """Epochs; the rate is divided by ten after 60 % and 80 % of them."""
    batch_size: int = 256
    """Images in a batch; the learning rate is scaled linearly with it."""
    lr: float | None = None
    """Learning rate for batches of 256; left out 30, as published, and 0.03 to fine-tune."""
    seed: int = 0
    """Of the classifier's start, the order and the crops."""
    device: Device = "auto"
    """Where to compute; auto is the GPU where there is one."""
    threads: int = 0
    """Threads that decode images; 0 is all cores."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "use a number of at least 1")
        _require(self.lr is None or self.lr > 0, "lr", self.lr, "use more than 0")
        if self.fast and self.finetune:
            raise UsageError("--finetune does not go with --fast, which computes the features once: leave one out")


@dataclass(frozen=True)
class Embed:
    """Write the features of images, one row each, with their file names."""

    run: Path
    """Folder of the run."""
    data: Path | None = None
    """Images: a folder or a text file of paths."""
    out: Path | None = None
    """File to write: .npz, or .parquet where pyarrow is installed."""
    features: Literal["backbone", "projection"] = "backbone"
    """Features before or after the projection head."""
    normalise: bool = False
    """Scale every row to length 1."""
    device: Device = "auto"
    """Where to compute; auto is the GPU where there is one."""
    threads: int = 0
    """Threads that decode images; 0 is all cores."""

    def __post_init__(self) -> None:
        _require(self.data is not None, "data", self.data, "name the images")
        _require(self.out is not None, "out", self.out, "name the file to write")
        if self.out is not None:
            _require(self.out.suffix in (".npz", ".parquet"), "out", str(self.out), "end it in .npz or .parquet")


@dataclass(frozen=True)
class Report:
    """Write one HTML page about a run: recipe, curves, throughput, views, checkpoints, evaluation."""

    run: Path
    """Folder of the run."""
    out: Path | None = None
    """File to write; left out, RUN/report.html."""
    views: bool = True
    """Show the first batch's augmented views, where the images are still there."""


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
    """Folder, tar or text file of paths."""
    full: bool = False
    """Also decode every image, which finds damage that headers do not show."""
    max_pixels: int = Recipe.max_pixels
    """Images of more pixels are left out, as pretrain --max-pixels does."""
    value_range: tuple[float, float] | Literal["header", "container"] = "header"
    """Numbers that are black and white, as pretrain --value-range says."""
    json: Path | None = None
    """File for the same facts as JSON, with every file that was left out."""

    def __post_init__(self) -> None:
        remedy = f"use a whole number from 1 to {MOST_PIXELS}"
        _require(1 <= self.max_pixels <= MOST_PIXELS, "max_pixels", self.max_pixels, remedy)


@dataclass(frozen=True)
class DataSynth:
    """Write the embedded set of labelled JPEG images, train/CLASS/*.jpg and val/CLASS/*.jpg."""

    path: Path
    """Folder to write."""


@dataclass(frozen=True)
class Bench:
    """Measure subjects, each beside its baselines and its bound. Without one, all but proof, decode and resume.

    A GPU is measured at the published size, a CPU at a smaller one. The README says how long each subject takes.
    """

    subjects: tuple[
        Literal["kernels", "step", "loader", "train", "scaling", "memory", "proof", "decode", "resume"], ...
    ]
    """What to measure: kernels, step, loader, train (loader and step together), scaling over ranks, memory; or, only
    where asked for, what measures nothing but tries what is promised: proof, that a replayed step equals an eager one,
    and on a GPU that the host waits for nothing; decode, that a GPU decodes what a CPU does; resume, that a run that
    was killed and resumed equals one that was not."""

    json: Path | None = None
    """Record to write, with every sample: what bench compare and bench report read."""
    csv: Path | None = None
    """Table to write, a line for each row."""
    svg: Path | None = None
    """Bar chart to write."""
    device: Device = "auto"
    """Where to measure; auto is the GPU where there is one."""
    rounds: int = 0
    """Samples of each provider, taken in turn; 0 is 5 on a CPU and of loader, train and scaling, else 20. Of proof:
    steps that are compared; five times as many are watched for waits."""
    providers: Literal["all", "core", "more", "compiled"] = "all"
    """Providers of the step: core is what the targets are about, compiled what torch.compile takes minutes to build,
    more the rest; the published baseline is in each. On a CPU all are core."""
    only: str = ""
    """Measure only providers (of kernels: kernels) whose name contains this, or one of these words, separated by
    commas."""
    skip: str = ""
    """Leave out providers of step and loader whose name contains this, or one of these words, separated by commas."""

    preset: Literal["v1", "v2", "cifar", "demo"] = "v2"
    """Recipe to measure."""
    arch: str | None = None
    """Encoder; left out, the preset's on a GPU and resnet18 on a CPU."""
    batch_size: int | None = None
    """Pairs in a batch; scaling: on each rank."""
    crop_size: int | None = None
    """Side of the views, in pixels."""
    queue_size: int | None = None
    """Keys in the queue."""
    precision: Literal["fp32", "tf32", "bf16", "fp16"] | None = None
    """Measure this precision only."""
    data: Path | None = None
    """Images for loader and train; left out, made for the occasion."""
    model: bool = False
    """With scaling: instead of measuring, count what a step sends between 8, 64 and 512 GPUs."""

    def __post_init__(self) -> None:
        _require(self.rounds >= 0, "rounds", self.rounds, "use a number of at least 0")
        if self.model and self.subjects != ("scaling",):
            raise UsageError("--model belongs to one subject: bench scaling --model")


@dataclass(frozen=True)
class BenchCompare:
    """Say of every row that two records share whether B is slower or faster than A, with 95 % bootstrap intervals."""

    a: Path
    """Record before."""
    b: Path
    """Record after."""


@dataclass(frozen=True)
class BenchReport:
    """Write the page of all committed records, and the first rows of the README from the newest of them."""

    readme: Path = Path("README.md")
    """Text whose rows between the benchmark markers are written anew."""
    page: Path = Path("docs/records.md")
    """Page of all tables."""
    records: Path = Path("bench/records")
    """Folder of records."""


@dataclass(frozen=True)
class BenchTune:
    """Time tile candidates of every kernel on this GPU and print rows for kernels/tiles.py."""

    only: str = ""
    """Tune only entries of the table whose name contains this."""
    out: Path | None = None
    """File to write the rows to."""
    rounds: int = 20
    """Samples of each candidate."""
    together: int = 2
    """Numbers of a row that a move may change at once, where changing fewer gains nothing; 3 tries some 200 rows."""

    def __post_init__(self) -> None:
        for name in ("rounds", "together"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "use a number of at least 1")


@dataclass(frozen=True)
class BenchGpuCheck:
    """Everything that needs a GPU, in one command and a given time: a gate of tests, the step, its proof, the rest.

    The rest are decoding, training with kill and resume, loader and step together, kernels, memory checkers. It ends
    with tables of all records, of the targets and of how each part ended, and packs everything into one archive.
    """

    minutes: float = 9.0
    """Time for all of it: the parts are chosen, in order, so that their limits fit."""
    parts: str = ""
    """Run only these parts, by their names, separated by commas; --dry-run shows the names."""
    skip: str = ""
    """Leave these parts out."""
    dry_run: bool = False
    """Print which parts would be run, in which order and for how long, and run nothing."""
    rehearse: bool = False
    """Run every part at a toy size on a CPU: to see that its command works; what it measures counts for nothing."""
    records: Path = Path("bench/records")
    """Folder for the records, DATE-GPU-PART.json, and the picture of a step."""
    archive: Path | None = None
    """Archive of all results; left out, DATE-GPU.tar.gz among the records."""

    def __post_init__(self) -> None:
        _require(self.minutes > 0, "minutes", self.minutes, "use more than 0")
        fits = self.archive is None or self.archive.name.endswith(".tar.gz")
        _require(fits, "archive", str(self.archive), "end it in .tar.gz")


@dataclass(frozen=True)
class Profile:
    """Where the time of a step goes: a trace of a few steps and a table of the kernels that take most of it."""

    data: str = "synthetic"
    """Images to train on, or synthetic for random crops that are already on the device."""
    tool: Literal["torch", "proton", "nsys", "ncu"] = "torch"
    """torch.profiler, or on a GPU Triton's proton, here and now; or the command line for Nsight, which is run where it
    is installed."""
    out: Path = Path("profile")
    """Folder to write."""
    steps: int = 3
    """Steps to record, after the warm-up."""
    rows: int = 20
    """Kernels in the table."""
    device: Device = "auto"
    """Where to compute; auto is the GPU where there is one."""
    graph: Literal["auto", "on", "off"] = "off"
    """Profile the CUDA graph; its kernels cannot be told apart by part of the step."""
    encoder: Literal["fused", "eager", "compile"] = "fused"
    """Batch norm by our kernels, in plain torch, or in plain torch through torch.compile."""
    update: Literal["fused", "torch", "apex"] = "fused"
    """Update by our kernel, by torch's fused SGD, or by NVIDIA's apex where it is installed."""
    key_stream: bool = False
    """Encode keys on a CUDA stream of their own, beside the queries."""
    arch: str | None = None
    """Encoder; left out, the preset's on a GPU and resnet18 on a CPU."""
    batch_size: int | None = None
    """Pairs in a batch; left out, the preset's on a GPU and 32 on a CPU."""
    crop_size: int | None = None
    """Side of the views, in pixels; left out, the preset's, but at most 112 on a CPU."""
    queue_size: int | None = None
    """Keys in the queue; left out, the preset's, but at most 4096 on a CPU."""
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    """Numbers of the encoders; auto is the recipe's."""

    def __post_init__(self) -> None:
        for name in ("steps", "rows"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "use a number of at least 1")


@dataclass(frozen=True)
class Env:
    """Versions, devices and cores, for bug reports and beside every published figure."""

    json: bool = False
    """Print JSON."""


def restarted() -> bool:
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
        if getattr(options, name) is None and preset != "demo":
            raise UsageError(f"pretrain {preset} needs --{name} PATH: only pretrain demo brings its own")
    if options.resume and options.out is not None and not options.out.is_dir():
        raise UsageError(f"{options.out} does not exist: check --out, or leave --resume out")
    if is_main and not options.resume and options.out is not None and options.out.exists():
        raise UsageError(f"{options.out} exists: continue it with --resume, or give --out another name")


def require_new(path: Path) -> None:
    """UsageError if there is something at the place that a command is to write; its folder is made."""
    if path.exists():
        raise UsageError(f"{path} exists: give --out another name, or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)


def _require(ok: bool, name: str, value: object, remedy: str) -> None:
    if not ok:
        said = "missing" if value is None else repr(value)
        raise UsageError(f"--{name.replace('_', '-')} is {said}: {remedy}")
