"""Runs with each dictionary, from images to the report: killed and resumed they end with the same bits."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastmoco.options import Options
from fastmoco.recipe import PRESETS
from fastmoco.runs import checkpoint
from fastmoco.train.loop import pretrain

SMALL = {
    "arch": "resnet18",
    "width": 0.125,
    "stem": "cifar",
    "crop_size": 16,
    "dim": 16,
    "batch_size": 16,
    "epochs": 2,
}
RECIPES = {
    "end-to-end": replace(PRESETS["end-to-end"][1], **SMALL, bn_group=8),
    "simclr": replace(PRESETS["simclr"][1], **SMALL, warmup_epochs=1.0),
    "bank": replace(PRESETS["bank"][1], **SMALL, bn_group=8, queue_size=32),
}


def trained(data: Path, out: Path, name: str, **options: object) -> dict[str, torch.Tensor]:
    given = {"data": data, "out": out, "knn": False, "threads": 1, "log_every": 1, **options}
    pretrain(RECIPES[name], Options(**given), name)
    return checkpoint.load(checkpoint.latest(out)).state


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_that_is_cut_and_resumed_ends_with_the_same_bits(name: str, images: Path, tmp_path: Path) -> None:
    whole = trained(images, tmp_path / "whole", name, stop_after=4)
    trained(images, tmp_path / "cut", name, stop_after=2)
    resumed = trained(images, tmp_path / "cut", name, stop_after=4, resume=True)
    assert whole.keys() == resumed.keys()
    assert [key for key, value in whole.items() if not torch.equal(value, resumed[key])] == []
    assert any(key == "bank" for key in whole) == (name == "bank")
