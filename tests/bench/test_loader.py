"""The loaders that are compared do the same work; and all of them, timed by pytest-benchmark (--benchmark-enable)."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from fastmoco.bench import loader
from fastmoco.data.manifest import Manifest, scan
from fastmoco.recipe import PRESETS

CPU = torch.device("cpu")
RECIPE = dataclasses.replace(PRESETS["v2"][1], batch_size=32, crop_size=40)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return scan(loader.photographs(tmp_path_factory.mktemp("images"), 32), cache=False)


def test_the_images_are_like_photographs_in_size(images: Manifest) -> None:
    assert (images.sizes == loader.IMAGE_SIZE).all() and not images.rejected
    sizes = [Path(images.path(i)).stat().st_size for i in range(len(images))]
    assert 60_000 < np.mean(sizes) < 200_000  # ImageNet's mean is 110 KB


def test_ours_and_pillows_pairs_are_the_same_pictures(images: Manifest) -> None:
    """Two libraries resize within two grey levels of each other; another image differs by far more."""
    found = loader.sources(RECIPE, images, CPU)
    with found["fastmoco"]() as draw:
        batch = draw()
    ours = torch.stack([batch.query_crops, batch.key_crops], 1).float()
    with loader.pillow(RECIPE, images) as draw:
        theirs = torch.from_numpy(draw()).float()
    assert (ours - theirs).abs().mean() < 2
    assert (ours - theirs.roll(1, 0)).abs().mean() > 20


def test_dali_alone_gives_crops_and_decoded_images(images: Manifest) -> None:
    found = loader.sources(RECIPE, images, CPU)
    with found["DALI, file reader"]() as draw:
        assert [np.asarray(view[0]).shape for view in draw()] == [(40, 40, 3)] * 2
    with found[loader.DECODE]() as draw:
        assert np.asarray(draw()[0][0]).shape == (375, 500, 3)


@pytest.mark.parametrize("who", ["fastmoco", loader.PILLOW, "DALI, file reader", loader.DECODE])
def test_benchmark(images: Manifest, benchmark: object, who: str) -> None:
    with loader.sources(RECIPE, images, CPU)[who]() as draw:
        for _ in range(loader.PREFETCH + 1):
            draw()
        benchmark.pedantic(draw, rounds=5)
