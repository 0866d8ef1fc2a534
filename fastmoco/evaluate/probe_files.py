"""Files of a trained classifier in a run's folder: NAME.json, NAME.png and NAME.safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from fastmoco import atomic
from fastmoco.data.manifest import Manifest
from fastmoco.evaluate.classifier import Probe
from fastmoco.evaluate.pictures import draw_probe
from fastmoco.runs.run_folder import keep_earlier


def figures_of(probe: Probe, train: Manifest, val: Manifest, **facts: Any) -> dict[str, Any]:
    """What NAME.json holds: `facts`, the sizes and places of both sets, the best top-1, the last scores, the curve."""
    return {
        **facts,
        "classes": len(train.classes),
        "train": len(train),
        "queries": len(val),
        "data": train.root,
        "val": val.root,
        "best_top1": max(line["top1"] for line in probe.curve),
        **probe.scores.as_dict(train.classes),
        "curve": probe.curve,
    }


def write_probe(
    run: Path,
    name: str,
    probe: Probe,
    figures: dict[str, Any],
    classes: list[str],
    backbone: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the three files; those of an earlier evaluation with other figures are kept under another name.

    The weights are the classifier's, named `fc`, and those of `backbone` if it was trained too.
    """
    keep_earlier(run, figures, name)
    atomic.write_json(run / f"{name}.json", figures)
    draw_probe(run / f"{name}.png", probe.curve, probe.scores.confusion, classes)
    weights = {f"fc.{key}": value.detach().cpu() for key, value in probe.classifier.named_parameters()}
    with atomic.replacing(run / f"{name}.safetensors") as draft:
        save_file({**(backbone or {}), **weights}, draft, metadata={"format": "pt", "step": str(figures["step"])})
