"""What is settled before a run's first step, and what is said of it."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from fastmoco.kernels.convolution import Instructions
from fastmoco.parallel import Parallel
from fastmoco.presets import PRESETS
from fastmoco.train import job

DEMO = PRESETS["demo"][1]
FASTER = "auto precision is fp32 on a CPU; --precision bf16 would be faster on this one"


@pytest.mark.parametrize("by", ["amx", "bf16 at full rate", "bf16 at half rate", "none"])
def test_bf16_is_advised_where_the_processor_is_fast_at_it_and_nobody_chose(by: Instructions, monkeypatch) -> None:
    monkeypatch.setattr(job, "instructions", lambda: by)
    recipes = {name: replace(DEMO, precision=name) for name in ("auto", "fp32", "bf16")}
    images = SimpleNamespace(sizes=np.full((4, 2), 64))
    notes = {name: job._settings_notes(recipe, images, Parallel()) for name, recipe in recipes.items()}
    assert (FASTER in notes["auto"]) == (by in ("amx", "bf16 at full rate"))
    assert FASTER not in notes["fp32"] + notes["bf16"]


@pytest.mark.parametrize(("images", "keys", "said"), [(48, 100, True), (48, 48, False), (48, 30, False)])
def test_a_bank_that_is_its_own_negatives_says_so(images: int, keys: int, said: bool) -> None:
    asked = replace(PRESETS["bank"][1], queue_size=keys)
    notes = job._queue_notes(asked, asked.for_images(images), images)
    assert notes == (
        ["the bank's 48 entries, one for each image, are all negatives: there are no more to draw"] if said else []
    )
