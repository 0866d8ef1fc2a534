"""Pictures of images show what evaluation sees, however the numbers in a file become colours."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastmoco.data import manifest
from fastmoco.data.loader import EvaluationLoader, Loading
from fastmoco.data.rewrite import Reading
from fastmoco.evaluate.duplicates import _write_altered
from fastmoco.evaluate.pictures import TILE, thumbnail
from fastmoco.presets import PRESETS

RAMP = np.add.outer(np.linspace(0, 0.4, 150), np.linspace(0, 0.5, 200))  # 0 to 0.9


@pytest.fixture(scope="module")
def kinds(tmp_path_factory) -> Path:
    """The same ramp in files of 8 bits, of 16 bits, of floats, and with transparency."""
    folder = tmp_path_factory.mktemp("kinds")
    eight, sixteen = (RAMP * 255).round().astype(np.uint8), (RAMP * 65535).round().astype(np.uint16)
    Image.fromarray(eight).save(folder / "8.png")
    Image.fromarray(np.stack([eight, eight, eight, 255 - eight], 2)).save(folder / "alpha.png")
    for name in ("16.png", "16.tif"):
        Image.fromarray(sixteen).save(folder / name)
    (folder / "16.pgm").write_bytes(b"P5 200 150 65535\n" + sixteen.astype(">u2").tobytes())
    Image.fromarray(RAMP.astype(np.float32)).save(folder / "float.tif")
    return folder


@pytest.mark.parametrize("reading", [Reading(), Reading("#ff0000", (0.0, 20000.0)), Reading("ignore", "container")])
def test_a_thumbnail_and_an_altered_copy_show_what_evaluation_sees(kinds, tmp_path, reading):
    images = manifest.scan(kinds)
    recipe = replace(PRESETS["demo"][1], crop_size=TILE, background=reading.background, value_range=reading.value_range)
    with EvaluationLoader(images, recipe, torch.device("cpu"), loading=Loading(threads=1)) as loader:
        crops = next(loader)[0].numpy().astype(int)
    assert len(crops) == 6
    for i, crop in enumerate(crops):
        shown = np.asarray(thumbnail(images, i, TILE, reading)).astype(int)
        assert np.abs(shown - crop)[2:-2, 2:-2].max() <= 3, images.paths[i]
        assert _write_altered(images, i, tmp_path, reading)
        copied = np.asarray(Image.open(tmp_path / f"{i}.jpg").convert("RGB").resize((60, 60))).mean((0, 1))
        whole = np.asarray(thumbnail(images, i, 60, reading)).mean((0, 1))
        assert np.abs(copied - whole).max() < 8, images.paths[i]


@pytest.mark.parametrize("name", ["16.png", "16.pgm"])
def test_pillow_alone_shows_16_bits_as_white(kinds, name):
    """The control: what thumbnails were."""
    with Image.open(kinds / name) as image:
        assert np.asarray(image.convert("RGB")).mean() > 250


def test_what_cannot_be_decoded_is_a_grey_tile(kinds, tmp_path):
    data = bytearray((kinds / "16.png").read_bytes())
    data[90:190] = bytes(100)
    (tmp_path / "damaged.png").write_bytes(data)
    shown = np.asarray(thumbnail(manifest.scan(tmp_path), 0, TILE, Reading()))
    assert shown.shape == (TILE, TILE, 3) and len(np.unique(shown.reshape(-1, 3), axis=0)) == 1
