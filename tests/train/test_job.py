"""What is settled before a run's first step, and what is said of it."""

from dataclasses import replace

import pytest

from fastmoco.presets import PRESETS
from fastmoco.train import job


@pytest.mark.parametrize(("images", "keys", "said"), [(48, 100, True), (48, 48, False), (48, 30, False)])
def test_a_bank_that_is_its_own_negatives_says_so(images: int, keys: int, said: bool) -> None:
    asked = replace(PRESETS["bank"][1], queue_size=keys)
    notes = job._queue_notes(asked, asked.for_images(images), images)
    assert notes == (
        ["the bank's 48 entries, one for each image, are all negatives: there are no more to draw"] if said else []
    )
