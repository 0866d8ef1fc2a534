"""Runs with each dictionary, from images to the report: killed and resumed they end with the same bits.

What comes after a run, evaluation, features, exports and going back, works with each, and with each head.
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fastmoco.cli import main
from fastmoco.contrast.step import Step
from fastmoco.encoder import build_encoder
from fastmoco.options import Options
from fastmoco.presets import PRESETS
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


def train(data: Path, out: Path, name: str, **options: object) -> dict[str, torch.Tensor]:
    settings = {"data": data, "out": out, "knn": False, "threads": 1, "log_every": 1, **options}
    pretrain(RECIPES[name], Options(**settings), name)
    return checkpoint.load(checkpoint.latest(out)).state


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_that_is_cut_and_resumed_ends_with_the_same_bits(name: str, images: Path, tmp_path: Path) -> None:
    whole = train(images, tmp_path / "whole", name, stop_after=4)
    train(images, tmp_path / "cut", name, stop_after=2)
    resumed = train(images, tmp_path / "cut", name, stop_after=4, resume=True)
    assert whole.keys() == resumed.keys()
    assert [key for key, value in whole.items() if not torch.equal(value, resumed[key])] == []
    assert any(key == "bank" for key in whole) == (name == "bank")


def queries(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = {name.removeprefix("encoder_q."): value for name, value in state.items() if name.startswith("encoder_q.")}
    return {name: value for name, value in found.items() if name.split(".")[0] != "fc"}


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_evaluation_features_and_exports(name: str, images: Path, tmp_path: Path, capsys) -> None:
    """Of "simclr" also with batch norm in the head, of which the projection is made."""
    run = tmp_path / "run"
    state = train(images, run, name, stop_after=3)
    common = ["--device", "cpu", "--threads", "1"]
    assert main(["evaluate", "knn", str(run), "--k", "3", *common]) == 0
    for way in (["linear", "--fast"], ["linear"], ["finetune"]):
        assert main(["evaluate", *way, str(run), "--epochs", "1", *common]) == 0
    assert json.loads((run / "linear.json").read_text())["backbone"] == "bit-equal after the probe"
    width = 64  # 512 channels of a ResNet-18, an eighth of them
    for features, size in (("backbone", width), ("projection", 16)):
        out = tmp_path / f"{features}.npz"
        assert main(["embed", str(run), "--data", str(images), "--out", str(out), "--features", features, *common]) == 0
        with np.load(out) as found:
            assert found["features"].shape[1] == size and np.isfinite(found["features"]).all()
    expected = queries(state)
    for form, out in (("torchvision", "a.pth"), ("safetensors", "folder"), ("detectron2", "a.pkl")):
        assert main(["export", str(run), "--format", form, "--out", str(tmp_path / out)]) == 0
    weights = torch.load(tmp_path / "a.pth", weights_only=True)
    assert weights.keys() == expected.keys() and all(torch.equal(weights[key], expected[key]) for key in weights)
    whole = load_file(tmp_path / "folder/model.safetensors")
    build_encoder(RECIPES[name]).load_state_dict(whole, strict=False)
    assert expected.keys() <= whole.keys()
    capsys.readouterr()
    assert main(["export", str(run), "--format", "moco", "--out", str(tmp_path / "a.pth.tar")]) == 2
    assert "use torchvision" in capsys.readouterr().err
    assert main(["report", str(run)]) == 0


@pytest.mark.parametrize("name", RECIPES)
def test_going_back_from_a_step_that_is_not_finite(name: str, images: Path, tmp_path: Path, monkeypatch) -> None:
    """The run goes on from its checkpoint with the batch after the bad one, as one that was given that batch there."""

    def spoiled(self: Step, batch: object, lr: float) -> object:
        return step(self, batch, math.nan if batch.step == 2 else lr)  # weights that show it a step later

    step = Step.step
    monkeypatch.setattr(Step, "step", spoiled)
    monkeypatch.setitem(RECIPES, name, replace(RECIPES[name], epochs=4))
    options = {"save_every": 2, "save_minutes": 0, "on_nonfinite": "rollback", "stop_after": 5}
    state = train(images, tmp_path / "run", name, **options)
    assert json.loads((tmp_path / "run/summary.json").read_text())["rollbacks"] == 1
    assert all(value.isfinite().all() for value in state.values() if value.is_floating_point())
    if name == "bank":
        assert int(state["bank_steps"]) == 3  # two before, one after
        norms = state["bank"].norm(dim=1)
        torch.testing.assert_close(norms, torch.ones_like(norms))
