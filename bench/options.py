"""Options of the commands that measure. As those in `fastmoco/options.py`: fields are flags, strings are their help."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastmoco.options import Device, UsageError, require


@dataclass(frozen=True)
class Bench:
    """Measure subjects, each beside its baselines and its bound. Without one, all that need not be asked for.

    A GPU is measured at the published size, a CPU at a smaller one. The README says how long each subject takes.
    """

    subjects: tuple[
        Literal[
            "kernels",
            "step",
            "loader",
            "train",
            "scaling",
            "memory",
            "dictionaries",
            "versions",
            "proof",
            "decode",
            "resume",
        ],
        ...,
    ]
    """What to measure: kernels, step, loader, train (loader and step together), scaling over ranks, memory; or, only
    where asked for: dictionaries, a step with a queue beside those with a batch and a bank; versions, the whole demo
    and the loader in turn with those of another checkout (--against); and what measures nothing but tries what is
    promised: proof, that a replayed step equals an eager one, and on a GPU that the host waits for
    nothing; decode, that a GPU decodes what a CPU does; resume, that a run that was killed and resumed equals one that
    was not."""

    json: Path | None = None
    """Record to write, with every sample: what bench compare and bench report read."""
    csv: Path | None = None
    """Table to write, a line for each row."""
    svg: Path | None = None
    """Bar chart to write."""
    device: Device = "auto"
    """Where to measure; auto is the GPU where there is one."""
    rounds: int = 0
    """Samples of each provider, taken in turn; 0 is 5 on a CPU and of loader, train, scaling and versions, else 20. Of
    proof: steps that are compared; five times as many are watched for waits."""
    providers: Literal["all", "core", "more", "compiled"] = "all"
    """Providers of the step: core is what the targets are about, compiled what torch.compile takes minutes to build,
    more the rest; the published baseline is in each. On a CPU all are core."""
    only: str = ""
    """Measure only providers (of kernels: kernels) whose name contains this, or one of these words, separated by
    commas."""
    skip: str = ""
    """Leave out providers of step and loader whose name contains this, or one of these words, separated by commas."""

    preset: Literal["v1", "v2", "cifar", "simclr", "simclr-cifar", "end-to-end", "bank", "demo"] = "v2"
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
    against: Path | None = None
    """With versions: folder of the other checkout."""
    busy: int = 0
    """Other processes that keep a core busy meanwhile, as on a machine that is shared."""
    model: bool = False
    """With scaling: instead of measuring, count what a step sends between 8, 64 and 512 GPUs."""

    def __post_init__(self) -> None:
        require(self.rounds >= 0, "rounds", self.rounds, "use a number of at least 0")
        require(self.busy >= 0, "busy", self.busy, "use a number of at least 0")
        if self.model and self.subjects != ("scaling",):
            raise UsageError("--model belongs to one subject: bench scaling --model")
        if ("versions" in self.subjects) != (self.against is not None):
            raise UsageError("versions and --against go together: bench versions --against CHECKOUT")


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
            require(getattr(self, name) >= 1, name, getattr(self, name), "use a number of at least 1")


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
        require(self.minutes > 0, "minutes", self.minutes, "use more than 0")
        fits = self.archive is None or self.archive.name.endswith(".tar.gz")
        require(fits, "archive", str(self.archive), "end it in .tar.gz")


@dataclass(frozen=True)
class Profile:
    """Where the time of a step goes: a trace of a few steps and a table of the kernels that take most of it."""

    data: str = "synthetic"
    """Images to train on, or synthetic for random crops that are already on the device."""
    tool: Literal["torch", "proton", "nsys", "ncu"] = "torch"
    """torch.profiler, or on a GPU Triton's proton, here and now; or the command line for Nsight, which is run where it
    is installed."""
    out: Path | None = None
    """Folder to write the trace and a picture to; left out, only tables are printed. nsys and ncu need it."""
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
            require(getattr(self, name) >= 1, name, getattr(self, name), "use a number of at least 1")
        needed = self.tool in ("nsys", "ncu")
        require(self.out is not None or not needed, "out", self.out, f"name the folder for what {self.tool} records")
