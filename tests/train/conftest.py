"""A handful of small JPEG files and a recipe that trains on them in a second."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastmoco.recipe import PRESETS, Recipe


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """40 training and 12 validation images of two classes: stripes that run down, stripes that run across."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.RandomState(0)
    for split, count in (("train", 20), ("val", 6)):
        for label in ("across", "down"):
            (root / split / label).mkdir(parents=True)
            for number in range(count):
                height, width = random.randint(20, 40, 2)
                stripes = np.sin(np.arange(width) * random.uniform(0.5, 1.5)) * 80 + 128
                pixels = np.broadcast_to(stripes, (height, width)) + random.randn(height, width) * 10
                pixels = pixels.T if label == "across" else pixels
                image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert("RGB")
                image.save(root / split / label / f"{number}.jpg")
    return root


@pytest.fixture(scope="session")
def recipe() -> Recipe:
    """Five steps an epoch, six epochs, a queue whose length is no multiple of the batch."""
    return replace(
        PRESETS["demo"][1], width=0.125, crop_size=16, batch_size=8, bn_group=4, queue_size=20, epochs=6, lr=0.05,
        knn_k=5,
    )  # fmt: skip
