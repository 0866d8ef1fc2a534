"""A handful of small JPEG files and a recipe that trains on them in a second."""

import multiprocessing
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
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
        PRESETS["demo"][1],
        width=0.125,
        crop_size=16,
        batch_size=8,
        bn_group=4,
        queue_size=20,
        epochs=6,
        lr=0.05,
        knn_k=5,
    )


@pytest.fixture(scope="session")
def flags(recipe) -> list[str]:
    """The command line's way from the demo preset to `recipe`."""
    names = ("width", "crop_size", "batch_size", "bn_group", "queue_size", "epochs", "lr", "knn_k")
    return [f"--{name.replace('_', '-')}={getattr(recipe, name)}" for name in names]


@pytest.fixture
def in_fork(tmp_path: Path) -> Callable[..., int]:
    """in_fork(body, *args): exit code of body(*args) in a forked process, minus the signal where it was killed.

    What it says on stderr goes to tmp_path/said.
    """

    def run(body: Callable, *args: object) -> int:
        process = multiprocessing.get_context("fork").Process(target=_speaking_to, args=(tmp_path / "said", body, args))
        process.start()
        process.join(240)
        alive = process.is_alive()
        process.kill()
        assert not alive
        return process.exitcode

    return run


def _speaking_to(said: Path, body: Callable, args: tuple) -> None:
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    sys.stderr = open(2, "w", closefd=False)
    torch.set_num_threads(1)
    sys.exit(body(*args))
