"""Names and shapes of weights in other projects: pure mappings, no files.

Our encoders carry torchvision's names, which timm shares. Upstream MoCo (facebookresearch/moco) puts prefixes before
them; detectron2 renames them (its converter `convert-pretrain-to-detectron2.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from fastmoco.encoder.resnet import ARCHITECTURES, STAGE_CHANNELS

MODULE = "module."  # what DistributedDataParallel puts before every name
HEAD = "fc."
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
DETECTRON2 = (
    *((f"layer{stage}", f"res{stage + 1}") for stage in (1, 2, 3, 4)),
    *((f"bn{number}", f"conv{number}.norm") for number in (1, 2, 3)),
    ("downsample.0", "shortcut"),
    ("downsample.1", "shortcut.norm"),
)

Shape = tuple[int, ...]


class Network(NamedTuple):
    """What the shapes of a residual network's weights tell."""

    arch: str
    width: float
    stem: str


def to_detectron2(name: str) -> str:
    """detectron2's name of a backbone weight: `layer1.0.bn1.weight` is `res2.0.conv1.norm.weight`."""
    if not name.startswith("layer"):
        name = f"stem.{name}"
    for ours, theirs in DETECTRON2:
        name = name.replace(ours, theirs)
    return name


def backbone(names: Iterable[str]) -> list[str]:
    """Names without those of the head."""
    return [name for name in names if not name.startswith(HEAD)]


def is_parameter(name: str) -> bool:
    """Whether a weight is trained, rather than a statistic of batch norm."""
    return not name.endswith(STATISTICS)


def recognise(shapes: Mapping[str, Shape]) -> Network | None:
    """Which of our networks has weights of these shapes, or None; the head plays no part."""
    stem = shapes.get("conv1.weight", ())
    first = shapes.get("layer1.0.conv1.weight", ())
    if len(stem) != 4 or len(first) != 4:
        return None
    blocks = tuple(len({name.split(".")[1] for name in shapes if name.startswith(f"layer{n}.")}) for n in (1, 2, 3, 4))
    deep = "layer1.0.conv3.weight" in shapes
    width = stem[0] / STAGE_CHANNELS[0]
    for arch, shape in ARCHITECTURES.items():
        inner = shape.inner if deep else 1
        if shape.blocks == blocks and (shape.expansion > 1) == deep and first[0] == stem[0] * inner:
            return Network(arch, width, "imagenet" if stem[-1] == 7 else "cifar")
    return None
