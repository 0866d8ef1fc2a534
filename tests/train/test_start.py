"""`--start-from`: a run begins with the backbone that it is given, or says which flags fit it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fastmoco.cli import main
from fastmoco.contrast.step import Step
from fastmoco.encoder import build_encoder
from fastmoco.options import Options, UsageError
from fastmoco.parallel import Parallel
from fastmoco.presets import PRESETS
from fastmoco.recipe import Recipe
from fastmoco.runs import checkpoint, run_folder
from fastmoco.train.loop import pretrain
from fastmoco.train.start import start_from


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(checkpoint.latest(run)).state


@pytest.fixture(scope="module")
def before(tmp_path_factory, recipe) -> Path:
    """A run with weights that no other seed draws, and statistics that are no standard normal's."""
    out = tmp_path_factory.mktemp("before") / "run"
    state = Step(replace(recipe, seed=77), Parallel(), "fp32").state()
    for name, value in state.items():
        if name.endswith("running_mean"):
            value.fill_(0.25)
    checkpoint.save(out, 5, state, {"recipe": recipe.as_dict(), "precision": "fp32"})
    (out / "recipe.json").write_text(json.dumps({"recipe": recipe.as_dict(), "options": {}}))
    return out


@pytest.mark.parametrize("dictionary", ["queue", "batch", "bank"])
def test_both_encoders_begin_with_the_backbone_and_a_head_of_their_own(before, recipe, dictionary):
    keys = Recipe.queue_size if dictionary == "batch" else 20
    plain = replace(recipe, dictionary=dictionary, ema_momentum=Recipe.ema_momentum, queue_size=keys)
    step = Step(plain, Parallel(), "fp32", images=40)
    fresh = {name: value.clone() for name, value in step.state().items()}
    start_from(step, before)
    given, state = weights_of(before), step.state()
    sides = ["encoder_q.", "encoder_k."] if dictionary == "queue" else ["encoder_q."]
    for side in sides:
        names = [name for name in state if name.startswith(side)]
        heads = [name for name in names if name.startswith(f"{side}fc.")]
        assert heads and all(torch.equal(state[name], fresh[name]) for name in heads)
        for name in set(names) - set(heads):
            assert torch.equal(state[name], given["encoder_q." + name.removeprefix(side)]), name
    assert not torch.equal(state["encoder_q.conv1.weight"], fresh["encoder_q.conv1.weight"]), "the control"
    rest = [name for name in state if not name.startswith("encoder_")]
    assert all(torch.equal(state[name], fresh[name]) for name in rest)


def test_a_plain_file_of_another_network_says_which_flags_fit(tmp_path, recipe):
    other = build_encoder(replace(PRESETS["v2"][1], arch="resnet18"))
    weights = {name: value.contiguous() for name, value in other.state_dict().items() if not name.startswith("fc.")}
    save_file(weights, tmp_path / "resnet18.safetensors")
    with pytest.raises(UsageError, match="--arch resnet18 --width 1 --stem imagenet"):
        start_from(Step(recipe, Parallel(), "fp32"), tmp_path / "resnet18.safetensors")


def test_a_run_says_where_it_began_and_resumes_without_being_told(before, images, recipe, tmp_path):
    recipe, out = replace(recipe, epochs=2, lr=1e-9, weight_decay=0.0), tmp_path / "run"
    options = Options(data=images / "train", out=out, knn=False, start_from=before, stop_after=2, threads=1)
    pretrain(recipe, options, "demo")
    first, given = weights_of(out), weights_of(before)
    torch.testing.assert_close(first["encoder_q.conv1.weight"], given["encoder_q.conv1.weight"], rtol=0, atol=1e-6)
    assert run_folder.read_facts(out)["options"]["start_from"] == str(before)
    assert main(["pretrain", "demo", "--out", str(out), "--resume", "--device", "cpu"]) == 0
    assert checkpoint.load(checkpoint.latest(out)).step == 10


def test_epochs_follow_the_images():
    small = PRESETS["small"][1]
    found = {count: small.for_images(count).epochs for count in (500, 1000, 3714, 10_000, 45_000, 100_000)}
    assert found == {500: 400, 1000: 400, 3714: 243, 10_000: 90, 45_000: 20, 100_000: 20}
    assert small.for_images(3714).base_lr == pytest.approx(0.08) and replace(small, epochs=7).for_images(9).epochs == 7
    assert replace(small, batch_size=256).base_lr == pytest.approx(0.16)


def notes_of(recipe: Recipe, side: int) -> str:
    from fastmoco.data.manifest import Manifest
    from fastmoco.train.job import _settings_notes

    images = Manifest("/", ["a"] * 3, np.full((3, 2), side, np.int32))
    return " ".join(_settings_notes(recipe, images, Parallel()))


def test_crops_that_cannot_work_are_warned_of(recipe):
    assert notes_of(replace(recipe, crop_size=32, precision="fp32"), 64) == ""
    assert "show 4 pixels: raise" in notes_of(Recipe(crop_size=32), 10)
    assert "enlarge images whose shorter side is 64: a --crop-size of 64" in notes_of(Recipe(crop_size=224), 64)
