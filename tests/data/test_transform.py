"""A picture by itself is what the loader makes of it in a set, in every format and mode that both read."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastmoco.data import manifest
from fastmoco.data.errors import DataError
from fastmoco.data.loader import EvaluationLoader, Loading
from fastmoco.data.transform import Transform
from fastmoco.presets import PRESETS

RECIPE = replace(PRESETS["demo"][1], crop_size=16)
LEVEL = 1 / 255 / min(RECIPE.augmentation.std)  # of a channel, after it was normalised


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One lossless picture of each mode that files come in."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.RandomState(0)
    levels = random.randint(0, 256, (31, 40, 4)).astype(np.uint8)
    Image.fromarray(levels[..., :3]).save(folder / "rgb.png")
    Image.fromarray(levels).save(folder / "rgba.png")
    Image.fromarray(levels[..., 0]).save(folder / "grey.png")
    Image.fromarray(levels[..., :3]).quantize(16).save(folder / "palette.png")
    Image.fromarray(random.randint(0, 65536, (40, 33)).astype(np.uint16)).save(folder / "deep.png")
    Image.fromarray(random.uniform(-0.1, 1.1, (40, 33)).astype(np.float32)).save(folder / "float.tif")
    Image.fromarray(levels[..., :3]).save(folder / "rgb.bmp")
    Image.fromarray(levels[..., :3]).save(folder / "lossless.webp", lossless=True)
    return folder


def of_loader(folder: Path, recipe=RECIPE) -> dict[str, torch.Tensor]:
    images = manifest.scan(folder)
    with EvaluationLoader(images, recipe, torch.device("cpu"), loading=Loading(threads=1)) as loader:
        crops = next(loader)[0]
    return dict(zip(images.paths, crops, strict=True))


def levels(normalised: torch.Tensor, recipe=RECIPE) -> torch.Tensor:
    mean, std = (torch.tensor(row)[:, None, None] for row in (recipe.augmentation.mean, recipe.augmentation.std))
    return ((normalised * std + mean) * 255).permute(1, 2, 0)


def test_floats_that_pillow_made_span_255_levels_and_those_of_a_file_span_1(pictures: Path) -> None:
    transform = Transform.of(RECIPE)
    with Image.open(pictures / "grey.png") as grey, Image.open(pictures / "float.tif") as floats:
        torch.testing.assert_close(transform(grey.convert("F")), transform(grey))
        torch.testing.assert_close(transform(floats), transform(pictures / "float.tif"))


@pytest.mark.parametrize("size", [16, 80])  # all of the shorter side, and seven eighths of it
@pytest.mark.parametrize("background", ["white", "#ff0000", "ignore"])
def test_a_lossless_picture_is_the_loaders_crop(pictures: Path, size: int, background: str) -> None:
    recipe = replace(RECIPE, crop_size=size, background=background)
    transform = Transform.of(recipe)
    for name, crop in of_loader(pictures, recipe).items():
        made = levels(transform(pictures / name), recipe)
        torch.testing.assert_close(made, crop.float(), rtol=0, atol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


def test_path_image_and_array_are_one_picture(pictures: Path) -> None:
    transform = Transform.of(RECIPE)
    expected = transform(pictures / "rgb.png")
    image = Image.open(pictures / "rgb.png")
    assert expected.shape == (3, 16, 16) and expected.dtype == torch.float32
    for same in (str(pictures / "rgb.png"), image, np.asarray(image)):
        assert torch.equal(transform(same), expected)
    assert torch.equal(transform(Image.open(pictures / "rgba.png")), transform(pictures / "rgba.png"))
    assert torch.equal(transform(np.asarray(Image.open(pictures / "grey.png"))), transform(pictures / "grey.png"))


def test_control_the_background_and_the_numbers_of_a_picture_matter(pictures: Path) -> None:
    recipes = (replace(RECIPE, background=name) for name in ("white", "black"))
    white, black = (Transform.of(recipe)(pictures / "rgba.png") for recipe in recipes)
    assert (white - black).abs().max() > 10 * LEVEL


def test_a_worker_of_a_data_loader_can_be_sent_it() -> None:
    transform = Transform.of(RECIPE)
    assert pickle.loads(pickle.dumps(transform)) == transform


def test_what_is_no_picture_is_said(pictures: Path, tmp_path: Path) -> None:
    transform = Transform.of(RECIPE)
    (tmp_path / "a.png").write_bytes((pictures / "rgba.png").read_bytes()[:200])
    (tmp_path / "b.txt").write_text("words")
    for name in ("a.png", "b.txt"):
        with pytest.raises(DataError, match=name):
            transform(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        transform(tmp_path / "c.png")
    for wrong in (np.zeros((8, 8, 3), np.float32), np.zeros((3, 8, 8), np.uint8), np.zeros((0, 8, 3), np.uint8)):
        with pytest.raises(ValueError, match="a picture is a Pillow image, a path, uint8"):
            transform(wrong)
