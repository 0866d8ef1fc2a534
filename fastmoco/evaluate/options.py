"""Options of the commands that look at images through a trained encoder. Only the standard library is imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastmoco.options import Device, UsageError, require


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
