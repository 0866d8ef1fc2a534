"""DALI's photometric steps compute what the kernel's twin computes, from the same parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastmoco.data.loader import Loader, Loading
from fastmoco.data.manifest import Manifest
from fastmoco.data.photometric import DaliPhotometric
from fastmoco.data.plan import BRIGHTNESS, CONTRAST, FLIP, GRAY, HUE, NO_JITTER, ORDER, SATURATION, SIGMA, Plan
from fastmoco.kernels import reference
from fastmoco.options import Options, UsageError
from fastmoco.presets import PRESETS
from fastmoco.train.loop import pretrain

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture
def crops(photos: list[np.ndarray]) -> torch.Tensor:
    """Forty pieces of photographs, and pixels at the corners and on the grey line of the colour cube."""
    generator = np.random.default_rng(0)
    corners = zip(generator.integers(0, 380, 40), generator.integers(0, 590, 40), strict=True)
    pixels = np.stack([photos[i % 2][top : top + 32, left : left + 32] for i, (top, left) in enumerate(corners)])
    pixels[0, :4] = np.array([[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 255, 255]], np.uint8)[:, None]
    pixels[0, 4:8] = np.array([[255, 255, 0], [0, 0, 255], [128, 128, 128], [1, 0, 1]], np.uint8)[:, None]
    return torch.from_numpy(pixels)


def neutral(count: int) -> torch.Tensor:
    parameters = torch.zeros(count, 8)
    parameters[:, ORDER] = NO_JITTER
    parameters[:, [BRIGHTNESS, CONTRAST, SATURATION]] = 1
    return parameters


def compare(crops: torch.Tensor, parameters: torch.Tensor) -> float:
    """Largest difference in levels of 255."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    chain = DaliPhotometric(MEAN, STD, batch_size=len(crops), device=device, threads=1)
    result = chain(crops.to(device), parameters.to(device)).cpu()
    assert result.is_contiguous(memory_format=torch.channels_last) and result.dtype == torch.float32
    exact = reference.photometric(crops, parameters, MEAN, STD, dtype=torch.float64)
    scale = torch.tensor(STD).view(3, 1, 1) * 255
    return float(((result - exact) * scale).abs().max())


STEPS = {
    "none": {},
    "flip": {FLIP: 1},
    "gray before": {GRAY: 1},
    "gray after": {GRAY: 2},
    "brightness": {ORDER: 0b11100100, BRIGHTNESS: 1.4},
    "contrast": {ORDER: 0b11100100, CONTRAST: 0.6},
    "saturation": {ORDER: 0b11100100, SATURATION: 1.4},
    "hue": {ORDER: 0b11100100, HUE: 0.1},
    "hue the other way": {ORDER: 0b11100100, HUE: -0.5},
    "blur": {SIGMA: 1.7},
}


@pytest.mark.parametrize("step", STEPS)
def test_each_step_alone(crops: torch.Tensor, step: str) -> None:
    parameters = neutral(len(crops))
    for column, value in STEPS[step].items():
        parameters[:, column] = value
    assert compare(crops, parameters) < 0.01
    if step not in ("none",):  # the control: the step does something
        plain, changed = (reference.photometric(crops, p, MEAN, STD) for p in (neutral(len(crops)), parameters))
        assert (plain - changed).abs().max() > 0.1


@pytest.mark.parametrize("preset", ["v1", "v2"])
def test_the_whole_chain_as_planned(crops: torch.Tensor, preset: str) -> None:
    plan = Plan(dataclasses.replace(PRESETS[preset][1], batch_size=32), np.full((40, 2), 32, np.int32))
    parameters = torch.from_numpy(plan.photometric(0, np.arange(40), 0))
    assert compare(crops, parameters) < 0.01


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_loader_hands_over_what_the_step_would_have_made(photo_manifest: Manifest, symmetric: bool) -> None:
    recipe = dataclasses.replace(PRESETS["v2"][1], batch_size=32, bn_group=4, crop_size=24, symmetric=symmetric)
    place = SimpleNamespace(rank=0, world=1, device=torch.device("cpu"))
    batches = []
    for photometric in ("kernel", "dali"):
        plan = Plan(recipe, photo_manifest.sizes)
        with Loader(photo_manifest, plan, place, range(4), Loading(threads=1, photometric=photometric)) as loader:
            batches.append(list(loader))
    scale = torch.tensor(STD).view(3, 1, 1) * 255
    for raw, finished in zip(*batches, strict=True):
        for side, rows in (("query", None), ("key", raw.key_rows)):
            crops, parameters = getattr(raw, f"{side}_crops"), getattr(raw, f"{side}_parameters")
            exact = reference.photometric(crops, parameters, MEAN, STD, rows=rows)
            result = getattr(finished, f"{side}_crops")
            assert ((result - exact) * scale).abs().max() < 0.01
        wrong = reference.photometric(raw.key_crops, raw.key_parameters, MEAN, STD)  # the control: without the rows
        assert ((finished.key_crops - wrong) * scale).abs().max() > 10


def test_training_goes_the_same_way(tmp_path: Path, write_set: Callable[[Path, int], dict[str, str]]) -> None:
    for name in write_set(tmp_path / "data", 200).values():
        (tmp_path / "data" / name).unlink()
    # A rate at which rounding does not grow tenfold a step.
    tiny = dict(width=0.125, crop_size=16, batch_size=40, bn_group=4, epochs=1, lr=0.01, precision="fp32")
    small = dataclasses.replace(PRESETS["demo"][1], **tiny)
    losses = {}
    for photometric in ("kernel", "dali"):
        out = tmp_path / photometric
        where = Options(data=tmp_path / "data", out=out, device="cpu", threads=1, knn=False, photometric=photometric)
        losses[photometric] = pretrain(small, where)["loss"]
    assert losses["dali"] == pytest.approx(losses["kernel"], rel=1e-3) and losses["dali"] != losses["kernel"]
    with pytest.raises(UsageError, match="does not go with --graph on"):
        Options(photometric="dali", graph="on")
