"""Options of the commands that look at images through a trained encoder. Only the standard library is imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastmoco.options import Device, UsageError, require, require_seconds


@dataclass(frozen=True)
class Search:
    """The images of a set that look most like given ones to a run's encoder: a contact sheet and JSON."""

    run: Path
    """Folder of the run."""
    images: tuple[Path, ...]
    """Images to look for: files, or folders of them."""
    data: Path | None = None
    """Images to search among: a folder, a tar or a text file of paths; left out, those that the run was trained on."""
    k: int = 8
    """Neighbours of each image."""
    features: Literal["backbone", "projection"] = "backbone"
    """Features to compare: before or after the projection head."""
    out: Path | None = None
    """Folder for search.png and search.json, which are replaced there; left out, RUN."""
    untrained: bool = False
    """Search with the network before training instead: what the neighbours are to be compared with."""
    device: Device = "auto"
    """Where to compute; auto is the GPU where there is one."""
    threads: int = 0
    """Threads that decode images; 0 is all cores."""

    def __post_init__(self) -> None:
        if not self.images:
            raise UsageError("search needs at least one image to look for: fastmoco search RUN IMAGE ...")
        require(self.k >= 1, "k", self.k, "use a number of at least 1")


@dataclass(frozen=True)
class Duplicates:
    """Groups of images that are nearly the same to a run's encoder: a contact sheet, JSON, and a list without them."""

    run: Path
    """Folder of the run."""
    data: Path | None = None
    """Images: a folder, a tar or a text file of paths; left out, those that the run was trained on."""
    threshold: float | None = None
    """Cosine similarity from which two images count as the same; left out, it is measured: nine of ten images are at
    least that similar to themselves cut by a tenth, made smaller and compressed."""
    features: Literal["backbone", "projection"] = "backbone"
    """Features to compare: before or after the projection head."""
    out: Path | None = None
    """Folder for duplicates.png and duplicates.json, which are replaced there; left out, RUN."""
    keep: Path | None = None
    """Also write a list of the images with one of each group, its largest: a text file that --data takes."""
    device: Device = "auto"
    """Where to compute; auto is the GPU where there is one."""
    threads: int = 0
    """Threads that decode images; 0 is all cores."""

    def __post_init__(self) -> None:
        good = self.threshold is None or -1 < self.threshold <= 1
        require(good, "threshold", self.threshold, "use a similarity above -1 and up to 1")


@dataclass(frozen=True)
class EvaluateFinetune:
    """Train a run's backbone and a classifier on labelled images, or on a share of them, by SimCLR's protocol."""

    run: Path
    """Folder of the run."""
    data: Path | None = None
    """Labelled images to train on; left out, those that the run was trained on."""
    val: Path | None = None
    """Labelled images to classify; left out, the val/ beside train/, or a fifth of each class, which does not train."""
    labels: Path | None = None
    """CSV file of path,class for images that stand in no class folders."""
    fraction: float = 1.0
    """Share of the labelled images of each class, 0.01 or 0.1 as a rule: the same ones each time."""
    subset: Path | None = None
    """Take the images that a text file lists instead, one file name a line, as SimCLR's published lists do."""
    untrained: bool = False
    """Start from the run's first weights instead: what the figures are to be compared with."""
    epochs: int | None = None
    """Epochs; left out, 30, or 60 on a hundredth of the labels, but at least 300 steps."""
    batch_size: int = 256
    """Images in a batch, over all ranks; the learning rate is scaled linearly with it."""
    lr: float | Literal["auto"] = "auto"
    """Learning rate for batches of 256. auto tries five from 0.5 to 0.005 for a third of the epochs each, and takes the
    one that does best on a fifth of the training images, which is held out meanwhile; where these are few, the best
    rates are tried again with other fifths. 0.05 is the published one."""
    lr_head: float | None = None
    """That of the classifier; left out, the same."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Numbers of the convolutions; auto is bf16 on a GPU that has it, else fp32."""
    seed: int = 0
    """Of the classifier's start, the order and the crops."""
    device: Device = "auto"
    """Where to compute; auto is the GPU where there is one."""
    threads: int = 0
    """Threads that decode images; 0 is all cores."""
    timeout_seconds: float = 600.0
    """Seconds that ranks wait for each other before the command fails."""

    def __post_init__(self) -> None:
        require(0 < self.fraction <= 1, "fraction", self.fraction, "use a share above 0 and up to 1")
        require(self.epochs is None or self.epochs >= 1, "epochs", self.epochs, "use a number of at least 1")
        require(self.batch_size >= 2, "batch_size", self.batch_size, "use a number of at least 2")
        require(self.lr == "auto" or self.lr > 0, "lr", self.lr, "use auto or more than 0")
        require(self.lr_head is None or self.lr_head > 0, "lr_head", self.lr_head, "use more than 0")
        require_seconds("timeout_seconds", self.timeout_seconds, 1)
        if self.subset is not None and self.fraction != 1:
            raise UsageError("--subset does not go with --fraction: the list says which images: leave one out")


@dataclass(frozen=True)
class EvaluateDetection:
    """Fine-tune a detector (Faster R-CNN, R50-C4 or the run's own network) from a run and judge it as VOC does.

    Needs torchvision: pip install -c constraints.txt -e '.[detection]'. Published numbers are made with
    detectron2: docs/detection.md.
    """

    run: Path
    """Folder of the run."""
    data: Path | None = None
    """Images with boxes, a folder in the layout of VOCdevkit: VOC2007/{Annotations, ImageSets/Main, JPEGImages}."""
    out: Path | None = None
    """Folder to write, which must not exist yet unless --resume is given; left out, RUN/detection."""
    resume: bool = False
    """Continue the detector in --out from its newest good checkpoint, with the settings it was started with."""
    untrained: bool = False
    """Start from the run's first weights instead: what the figures are to be compared with."""
    iterations: int = 24000
    """Steps. 24,000 suit the 16,551 images of VOC 2007 and 2012; a small set of your own is done in hundreds."""
    batch_size: int = 16
    """Images of a step, over all ranks."""
    lr: float | None = None
    """Learning rate after the warm-up; left out, 0.02 x batch size / 16."""
    size: int = 800
    """Shorter side of test images in pixels; training draws from 60 % to all of it."""
    regions: int = 512
    """Regions of an image that the box head is trained on."""
    seed: int = 0
    """Of new layers, the order, the flips and the sampling of regions."""
    on_training: bool = False
    """Also judge the detector on the images it was trained on: whether it can learn them at all."""
    save_every: int = 1000
    """Steps between two checkpoints."""
    log_every: int = 20
    """Steps between two lines of log.jsonl."""
    device: Device = "auto"
    """Where to compute; auto is the GPU where there is one."""
    threads: int = 2
    """Processes that decode images, for each rank; 0 decodes in the training process."""
    timeout_seconds: float = 600.0
    """Seconds that ranks wait for each other before the command fails."""

    def __post_init__(self) -> None:
        require(self.data is not None, "data", self.data, "name a folder in the layout of VOCdevkit")
        for name in ("iterations", "batch_size", "regions", "save_every", "log_every"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "use a number of at least 1")
        require_seconds("timeout_seconds", self.timeout_seconds, 1)
        require(self.size >= 32, "size", self.size, "use at least 32 pixels")
        require(self.lr is None or self.lr > 0, "lr", self.lr, "use more than 0")
        require(self.threads >= 0, "threads", self.threads, "use 0 or more")
