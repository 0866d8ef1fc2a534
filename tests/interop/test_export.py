"""Exports: every tensor of the run, by the names and in the types that the target reads."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fastmoco.cli import main
from fastmoco.encoder import build_encoder
from fastmoco.interop.export import WRITERS, export
from fastmoco.interop.names import to_detectron2
from fastmoco.options import UsageError
from fastmoco.parallel import Parallel
from fastmoco.recipe import Recipe
from fastmoco.runs import run_folder
from fastmoco.runs.run_folder import SavedRun


@pytest.fixture
def folder(make_run, make_recipe, tmp_path):
    make_run(tmp_path / "run", make_recipe())
    return tmp_path / "run"


def images(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, 24, 24, generator=torch.Generator().manual_seed(1))


def query_of(folder) -> dict[str, torch.Tensor]:
    state = run_folder.load(folder).state
    return {name.removeprefix("encoder_q."): value for name, value in state.items() if name.startswith("encoder_q.")}


def forward(recipe, weights) -> torch.Tensor:
    """Features of a network that takes the weights strictly, its head aside."""
    encoder = build_encoder(recipe).eval()
    encoder.fc = torch.nn.Identity()
    encoder.load_state_dict(weights, strict=True)
    with torch.no_grad():
        return encoder(images())


def test_torchvision_holds_the_backbone_alone(folder, tmp_path, make_recipe):
    weights = torch.load(export(folder, "torchvision", tmp_path / "a.pth"), weights_only=True)
    expected = {name: value for name, value in query_of(folder).items() if not name.startswith("fc.")}
    assert weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in weights)
    assert all(value.dtype in (torch.float32, torch.int64) and value.is_contiguous() for value in weights.values())
    ours, _, _ = run_folder.load_encoder(folder, Parallel())
    with torch.no_grad():
        features = ours.features(images())
    assert torch.equal(forward(make_recipe(), weights), features)
    weights["layer4.1.bn2.weight"] = weights["layer4.1.bn2.weight"] + 1e-3  # the control
    assert not torch.equal(forward(make_recipe(), weights), features)


def test_it_is_the_query_encoder_that_is_exported(folder, tmp_path):
    weights = torch.load(export(folder, "torchvision", tmp_path / "a.pth"), weights_only=True)
    assert not torch.equal(weights["conv1.weight"], run_folder.load(folder).state["encoder_k.conv1.weight"])


def test_detectron2_holds_renamed_arrays(folder, tmp_path):
    content = pickle.loads(export(folder, "detectron2", tmp_path / "a.pkl").read_bytes())
    assert content["matching_heuristics"] is True and content["__author__"] == "fastmoco"
    query = {to_detectron2(name): value for name, value in query_of(folder).items() if not name.startswith("fc.")}
    assert content["model"].keys() == query.keys()
    assert all((content["model"][name] == value.numpy()).all() for name, value in query.items())


def test_safetensors_come_with_a_card_that_says_what_is_known(folder, tmp_path):
    (folder / "knn.json").write_text(json.dumps({"step": 7, "top1": 61.25, "top5": 90.5, "classes": 10}))
    out = export(folder, "safetensors", tmp_path / "a")
    weights, query = load_file(out / "model.safetensors"), query_of(folder)
    assert weights.keys() == query.keys() and all(torch.equal(weights[name], query[name]) for name in query)
    with safe_open(out / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["recipe"])["queue_size"] == 20 and file.metadata()["step"] == "7"
    card = (out / "README.md").read_text()
    for fact in ("after step 7", "| images | 43 |", "top-1 61.25%", "| queue_size | 20 |", "| jitter_p | 0.8 |"):
        assert fact in card, fact
    assert "/data/" not in card, "a folder of this machine concerns nobody"


def test_the_card_claims_no_accuracy_that_nobody_measured(folder, tmp_path):
    card = (export(folder, "safetensors", tmp_path / "a") / "README.md").read_text()
    assert "not measured" in card and "top-1" not in card


def test_timm_gets_a_config_and_refuses_networks_it_does_not_have(make_run, make_recipe, folder, tmp_path):
    with pytest.raises(UsageError, match="timm has no resnet18 of width 0.125 with the cifar stem"):
        export(folder, "timm", tmp_path / "a")
    assert not (tmp_path / "a").exists()
    make_run(tmp_path / "standard", make_recipe("linear", width=1.0, stem="imagenet"))
    out = export(tmp_path / "standard", "timm", tmp_path / "a")
    config = json.loads((out / "config.json").read_text())
    assert config["architecture"] == "resnet18" and config["num_features"] == 512 and config["num_classes"] == 0
    weights = load_file(out / "model.safetensors")
    assert not any(name.startswith("fc.") for name in weights) and len(weights) == 120


@pytest.mark.parametrize(
    ("form", "says"),
    [("torchvision", 'torch.load("{out}", weights_only=True)'), ("timm", '"local-dir:{out}"')]
    + [("detectron2", "MODEL.WEIGHTS {out}"), ("moco", "main_lincls.py"), ("safetensors", "model card")],
)
def test_the_command_says_how_to_load_what_it_wrote(make_run, make_recipe, tmp_path, capsys, form, says):
    network = {"width": 1.0, "stem": "imagenet"} if form == "timm" else {}
    make_run(tmp_path / "run", make_recipe("linear", **network))
    out = tmp_path / "it {0}"
    assert main(["export", str(tmp_path / "run"), "--format", form, "--out", str(out)]) == 0
    assert says.format(out=out) in capsys.readouterr().out


def test_mistakes_are_one_line(folder, tmp_path, capsys):
    assert main(["export", str(folder)]) == 2 and "--out" in capsys.readouterr().err
    assert main(["export", str(tmp_path), "--out", str(tmp_path / "a.pth")]) == 2
    assert "is no run" in capsys.readouterr().err
    taken = tmp_path / "taken.pth"
    taken.write_text("mine")
    assert main(["export", str(folder), "--out", str(taken)]) == 2 and taken.read_text() == "mine"
    (folder / "checkpoints/step_00000007/model.safetensors").write_bytes(b"x")
    assert main(["export", str(folder), "--out", str(tmp_path / "b.pth")]) == 3
    assert "no good checkpoint" in capsys.readouterr().err


def test_upstreams_file_of_a_lars_run_says_what_it_cannot_hold(make_run, make_recipe, tmp_path, capsys):
    for optimizer in ("sgd", "lars"):
        make_run(tmp_path / optimizer, make_recipe(optimizer=optimizer))
        main(["export", str(tmp_path / optimizer), "--format", "moco", "--out", str(tmp_path / f"{optimizer}.pth.tar")])
        assert ("trained with LARS" in capsys.readouterr().out) == (optimizer == "lars")


@pytest.mark.parametrize("dictionary", ["batch", "bank"])
def test_what_has_no_key_encoder_is_no_moco_checkpoint(dictionary):
    recipe = Recipe(dictionary=dictionary)
    with pytest.raises(UsageError, match=f"this run has a {dictionary} in their place: use torchvision"):
        WRITERS["moco"](Path("run"), SavedRun(1, {}, recipe, "fp32", {}))
