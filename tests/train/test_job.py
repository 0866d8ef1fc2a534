"""What is settled before a run's first step, and what is said of it."""

from dataclasses import replace
from pathlib import Path

import pytest

from fastmoco import recipe_file
from fastmoco.options import Options
from fastmoco.parallel import Parallel
from fastmoco.presets import PRESETS
from fastmoco.train import job, record
from fastmoco.train.record import announcement


@pytest.mark.parametrize(("images", "keys", "said"), [(48, 100, True), (48, 48, False), (48, 30, False)])
def test_a_bank_that_is_its_own_negatives_says_so(images: int, keys: int, said: bool) -> None:
    asked = replace(PRESETS["bank"][1], queue_size=keys)
    notes = job._queue_notes(asked, asked.for_images(images), images)
    assert notes == (
        ["the bank's 48 entries, one for each image, are all negatives: there are no more to draw"] if said else []
    )


@pytest.mark.parametrize(("cache", "said"), [(None, True), (0.0, False)])
def test_a_run_says_what_memory_it_keeps_images_in(
    images: Path, recipe, tmp_path: Path, cache: float | None, said: bool
) -> None:
    options = Options(data=images, out=tmp_path / "run", device="cpu", decoded_cache=cache)
    settled = job.prepare(recipe, options, "demo", Parallel())
    lines = [line for line in announcement(settled, "fp32", 0) if "--decoded-cache" in line]
    assert lines == (
        [f"{sum(settled.kept_bytes) / 1e9:.2g} GB of each rank's memory keep decoded images (--decoded-cache)"]
        if said
        else []
    )


def test_the_recipe_of_a_run_leaves_open_to_other_images_what_its_own_settled(
    images: Path, recipe, tmp_path: Path
) -> None:
    asked = replace(recipe, epochs=0, queue_size="auto", order="auto", batch_size=8)
    settled = job.prepare(asked, Options(data=images, out=tmp_path / "run", device="cpu"), "demo", Parallel())
    assert settled.recipe.epochs > 0 and settled.recipe.queue_size != "auto"
    record.write(settled, "fp32", 0)
    base = PRESETS["demo"][1]
    assert recipe_file.read(tmp_path / "run").values == recipe_file.differences(base, asked)
    facts = tmp_path / "run" / "recipe.json"
    facts.write_text(facts.read_text().replace('"left_open"', '"of_older_runs_there_is_none"'))
    assert recipe_file.read(tmp_path / "run").values == recipe_file.differences(base, settled.recipe)
