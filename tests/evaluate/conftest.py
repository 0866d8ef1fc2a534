"""A handful of labelled images that a probe can tell apart."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def stripes(tmp_path_factory) -> Path:
    """40 training and 12 validation images of two classes: stripes that run down, stripes that run across."""
    root = tmp_path_factory.mktemp("stripes")
    random = np.random.RandomState(0)
    for split, count in (("train", 20), ("val", 6)):
        for name in ("across", "down"):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                height, width = random.randint(20, 40, 2)
                wave = np.sin(np.arange(max(height, width)) * random.uniform(0.5, 1.5)) * 80 + 128
                pixels = np.broadcast_to(wave[:width], (height, width))
                pixels = np.broadcast_to(wave[:height, None], (height, width)) if name == "across" else pixels
                noisy = (pixels + random.randn(height, width) * 10).clip(0, 255).astype(np.uint8)
                Image.fromarray(noisy).convert("RGB").save(root / split / name / f"{number}.jpg")
    return root
