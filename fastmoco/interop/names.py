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

# nn.Sequential(*list(resnet.children())[:-1])
LISTED = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
AVERAGES = ("momentum", "teacher", "target", "ema", "average", "key")
BODY = ("conv1.", "bn1.", "layer1.", "layer2.", "layer3.", "layer4.")

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


def inner_network(names: Iterable[str]) -> dict[str, str]:
    """Names in a larger model of the weights of the residual network in it, by torchvision's names; empty without one.

    Other programs put `backbone.` or the like before them, and lightly numbers the children of torchvision's network.
    Of several networks the one that is trained is taken, before a teacher or an average.
    """
    present = list(names)
    layouts: tuple[tuple[str, str, Mapping[str, str]], ...] = (
        ("conv1.weight", "layer1.0.conv1.weight", {}),
        ("0.weight", "4.0.conv1.weight", LISTED),
    )
    for first, second, stages in layouts:
        starts = [name.removesuffix(first) for name in present if name.endswith(first)]
        starts = [start for start in starts if start + second in present and (not start or start.endswith("."))]
        if starts:
            prefix = min(starts, key=lambda start: (any(word in start for word in AVERAGES), starts.index(start)))
            rest = {name: name.removeprefix(prefix) for name in present if name.startswith(prefix)}
            return {_torchvision_name(inner, stages): name for name, inner in rest.items()}
    return {}


def _torchvision_name(name: str, stages: Mapping[str, str]) -> str:
    stage, dot, rest = name.partition(".")
    return stages.get(stage, stage) + dot + rest


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
