"""`fastmoco.load`: from a run, a checkpoint and a file come the weights that training left, ready to be used."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import fastmoco
from fastmoco.cli import main
from fastmoco.contrast.step import Step
from fastmoco.interop.foreign import ForeignFileError
from fastmoco.options import UsageError
from fastmoco.parallel import Parallel
from fastmoco.presets import PRESETS
from fastmoco.runs import checkpoint
from fastmoco.runs.checkpoint import CheckpointError

RECIPE = replace(PRESETS["demo"][1], width=0.125, crop_size=16, batch_size=8, bn_group=4, queue_size=20)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints, whose weights differ from each other and from those that the seed draws."""
    out, step = tmp_path_factory.mktemp("loaded") / "run", Step(RECIPE, Parallel(), "fp32")
    for number in (3, 7):
        state = {name: value + number if name.endswith("weight") else value for name, value in step.state().items()}
        checkpoint.save(out, number, state, {"recipe": RECIPE.as_dict()})
    (out / "recipe.json").write_text(json.dumps({"recipe": RECIPE.as_dict(), "options": {}}))
    return out


def first(encoder: torch.nn.Module) -> float:
    return next(encoder.parameters()).flatten()[0].item()


def test_a_run_gives_its_newest_checkpoint_and_a_checkpoint_itself(run: Path) -> None:
    newest, untrained = fastmoco.load(run), fastmoco.load(str(run), untrained=True)
    assert fastmoco.load(run / "checkpoints/latest").step == 7
    older = fastmoco.load(run / "checkpoints/step_00000003", device="cpu")
    file = fastmoco.load(run / "checkpoints/step_00000003/model.safetensors")
    assert [encoder.step for encoder in (newest, older, file, untrained)] == [7, 3, 3, 0]
    drawn = first(untrained)
    assert first(newest) == pytest.approx(drawn + 7) and first(older) == first(file) == pytest.approx(drawn + 3)


def test_it_is_a_module_ready_to_be_used(run: Path) -> None:
    encoder = fastmoco.load(run)
    assert isinstance(encoder, torch.nn.Module) and isinstance(encoder, fastmoco.Pretrained)
    assert not encoder.training and not any(weight.requires_grad for weight in encoder.parameters())
    assert encoder.recipe == RECIPE and encoder.device == torch.device("cpu")
    picture = encoder.transform(Image.new("RGB", (40, 30), "navy"))
    images = torch.stack([picture, picture.flip(0)])
    features = encoder.features(images)
    assert features.shape == (2, encoder.feature_dim) and encoder(images).shape == (2, RECIPE.dim)
    torch.testing.assert_close(features[:1], encoder.features(images[:1]))  # evaluation mode: a row by itself
    probe = torch.nn.Sequential(encoder, torch.nn.Linear(RECIPE.dim, 3))
    assert probe(images).shape == (2, 3)


def test_it_can_be_trained_on(run: Path) -> None:
    encoder = fastmoco.load(run, untrained=True).requires_grad_(True).train()
    encoder.features(torch.randn(RECIPE.bn_group, 3, 16, 16)).sum().backward()
    assert all(weight.grad is not None for name, weight in encoder.named_parameters() if not name.startswith("fc"))


def test_plain_weights_are_read(run: Path, tmp_path: Path) -> None:
    encoder = fastmoco.load(run)
    weights = {name: value for name, value in encoder.state_dict().items() if not name.startswith("fc")}
    torch.save(weights, tmp_path / "plain.pth")
    loaded = fastmoco.load(tmp_path / "plain.pth")
    assert loaded.step == 0 and loaded.recipe.arch == "resnet18" and loaded.recipe.width == RECIPE.width
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(loaded.features(images), encoder.features(images))


@pytest.mark.parametrize("format", ["safetensors", "torchvision", "moco"])
def test_what_export_wrote_is_read(run: Path, tmp_path: Path, format: str) -> None:
    assert main(["export", str(run), "--format", format, "--out", str(tmp_path / "out.pth")]) == 0
    expected, loaded = fastmoco.load(run), fastmoco.load(tmp_path / "out.pth")
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(loaded.features(images), expected.features(images))
    assert (loaded.step, loaded.recipe) == (7, RECIPE) or format == "torchvision"
    if format == "safetensors":
        file = fastmoco.load(tmp_path / "out.pth/model.safetensors")
        assert torch.equal(file(images), expected(images)) and file.transform == expected.transform


def test_wrong_images_are_said(run: Path) -> None:
    encoder = fastmoco.load(run)
    for wrong in ([], torch.zeros(3, 16, 16), torch.zeros(2, 16, 16, 3), torch.zeros(2, 3, 16, 16, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="encoder.transform"):
            encoder.features(wrong)


def test_wrong_places_are_said(run: Path, tmp_path: Path) -> None:
    (tmp_path / "words.pth").write_text("words")
    with pytest.raises(UsageError, match="check the path"):
        fastmoco.load(tmp_path / "nothing")
    with pytest.raises(UsageError, match="is no run"):
        fastmoco.load(tmp_path)
    with pytest.raises(ForeignFileError, match="no PyTorch checkpoint"):
        fastmoco.load(tmp_path / "words.pth")
    with pytest.raises(ValueError, match="device is 'gpu'"):
        fastmoco.load(run, device="gpu")


def test_a_damaged_checkpoint_is_refused_by_name(run: Path, tmp_path: Path) -> None:
    import shutil

    copy = shutil.copytree(run / "checkpoints/step_00000003", tmp_path / "step_00000003")
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="SHA-256"):
        fastmoco.load(copy)
