"""The detector: it learns a made set and not one with shuffled labels; it resumes exactly; ranks are one batch norm."""

import json
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path

import made_set
import numpy as np
import pytest
import torch
from PIL import Image

from fastmoco.cli import main, parse
from fastmoco.contrast.step import Step
from fastmoco.detection import detector, voc
from fastmoco.detection.average_precision import evaluate
from fastmoco.detection.command import _go_on
from fastmoco.detection.training import Plan, Trainer, detect
from fastmoco.encoder import build_encoder
from fastmoco.encoder.norm_over_ranks import batch_norm_over_ranks
from fastmoco.evaluate.options import EvaluateDetection
from fastmoco.options import UsageError
from fastmoco.parallel import Parallel
from fastmoco.presets import PRESETS
from fastmoco.runs import checkpoint

RECIPE = replace(PRESETS["demo"][1], width=0.25, stem="imagenet", crop_size=64, batch_size=8, bn_group=4, queue_size=20)
SIZE = detector.Size(shorter=160, regions=8, proposals=300)
STEPS = 250  # of 8 regions: after 150 steps of 32, which take longer, AP50 has been 54 to 68
SMALL = ["--batch-size", "2", "--size", "96", "--regions", "8", "--threads", "0", "--device", "cpu"]


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    return made_set.make(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def small_kit(tmp_path_factory):
    return made_set.make(tmp_path_factory.mktemp("small"), 6, 3)


def make_run(folder: Path) -> Path:
    checkpoint.save(folder, 0, Step(RECIPE, Parallel(), "fp32").state(), {"recipe": RECIPE.as_dict()})
    (folder / "recipe.json").write_text(json.dumps({"recipe": RECIPE.as_dict(), "options": {}}))
    return folder


def without_torchvision(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)


def test_without_torchvision_the_command_says_what_to_do(tmp_path, small_kit, monkeypatch, capsys):
    without_torchvision(monkeypatch)
    run = make_run(tmp_path / "run")
    assert main(["evaluate", "detection", str(run), "--data", str(small_kit), *SMALL]) == 2
    said = capsys.readouterr().err
    assert (
        "pip install -c constraints.txt -e '.[detection]'" in said
        and "--format detectron2" in said
        and said.count("\n") == 1
    )
    assert not (run / "detection").exists()


def statistics_of_uneven_ranks(parallel: Parallel) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(parallel.rank)
    x = torch.randn(2 + 3 * parallel.rank, 4, 3, 2, dtype=torch.float64, generator=generator, requires_grad=True)
    weight, bias = torch.linspace(0.5, 2, 4).double(), torch.linspace(-1, 1, 4).double()
    running = torch.zeros(4).double(), torch.ones(4).double()
    y = batch_norm_over_ranks(x, weight.requires_grad_(), bias.requires_grad_(), running, parallel.all_gather)
    (y * torch.randn(y.shape, dtype=torch.float64, generator=generator)).sum().backward()
    return x.detach(), y.detach(), x.grad


def test_images_of_different_sizes_on_ranks_share_the_mean_of_their_statistics(run_ranks):
    """naiveSyncBN: each rank counts alike, however many rows it has; outputs and gradients by autograd in float64."""
    found = run_ranks(2, statistics_of_uneven_ranks)
    xs = [x.clone().requires_grad_() for x, _, _ in found]
    mean = sum(x.mean((0, 2, 3)) for x in xs) / 2
    square = sum(x.square().mean((0, 2, 3)) for x in xs) / 2
    scale = torch.linspace(0.5, 2, 4).double() * torch.rsqrt(square - mean**2 + 1e-5)
    shift = torch.linspace(-1, 1, 4).double()
    total = torch.zeros(())
    for rank, (x, (_, y, _)) in enumerate(zip(xs, found, strict=True)):
        expected = (x - mean[:, None, None]) * scale[:, None, None] + shift[:, None, None]
        torch.testing.assert_close(y, expected.detach(), rtol=0, atol=1e-12)
        generator = torch.Generator().manual_seed(rank)
        torch.randn(x.shape, dtype=torch.float64, generator=generator)
        total = total + (expected * torch.randn(y.shape, dtype=torch.float64, generator=generator)).sum()
    total.backward()
    for x, (_, _, grad) in zip(xs, found, strict=True):
        torch.testing.assert_close(grad, x.grad, rtol=0, atol=1e-12)


def train(kit: Path, steps: int, pictures=None, seed: int = 0) -> tuple[torch.nn.Module, list]:
    training = voc.training_set(kit)
    pictures = pictures or training.pictures
    model = detector.build(build_encoder(RECIPE), RECIPE, 20, SIZE, Parallel(), seed)
    trainer = Trainer(model, pictures, Plan(steps, 4, 0.02, seed), Parallel(), 0)
    trainer.train(steps, lambda said: False)
    trainer.settle_statistics(30)
    return model, training.pictures


def ap50(model: torch.nn.Module, pictures: list) -> float:
    found = detect(model, pictures, Parallel(), 0)
    return evaluate([picture.objects for picture in pictures], found, 20)["AP50"]


@pytest.mark.slow
def test_it_learns_the_made_set_and_nothing_from_shuffled_labels(kit):
    """From random weights; the control has the same boxes with the labels of other images."""
    pytest.importorskip("torchvision")
    train(kit, 1)  # numba compiles its loops, once on a machine
    began = time.process_time()
    model, pictures = train(kit, STEPS)
    learnt = ap50(model, pictures)
    print(f"AP50 {learnt:.1f} after {time.process_time() - began:.0f} s of processor time")
    assert learnt > 60
    random, labels = np.random.RandomState(0), np.concatenate([each.objects.labels for each in pictures])
    mixed = iter(random.permutation(labels).tolist())
    shuffled = [
        each._replace(objects=each.objects._replace(labels=np.array([next(mixed) for _ in each.objects.labels])))
        for each in pictures
    ]
    model, _ = train(kit, STEPS, shuffled)
    control = ap50(model, pictures)
    print(f"AP50 {control:.1f} from shuffled labels")
    assert control < 40


def test_the_layers_are_the_encoders_and_all_are_trained(small_kit):
    pytest.importorskip("torchvision")
    encoder = build_encoder(RECIPE)
    before = {name: value.clone() for name, value in encoder.named_parameters()}
    model = detector.build(encoder, RECIPE, 20, SIZE, Parallel(), 0)
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        encoder.eval(), model.eval()
        features = model.roi_heads.box_head.layer4((model.backbone(images),) * 2)[0].mean((2, 3))
        torch.testing.assert_close(features, encoder.features(images), rtol=1e-5, atol=1e-5)
    trainer = Trainer(model, voc.training_set(small_kit).pictures, Plan(2, 2, 0.02), Parallel(), 0)
    trainer.train(2, lambda said: False)
    same = [name for name, value in encoder.named_parameters() if torch.equal(value, before[name])]
    assert [name for name in same if not name.startswith("fc.")] == []


def test_settled_statistics_are_the_means_of_the_batches(small_kit):
    pytest.importorskip("torchvision")
    model = detector.build(build_encoder(RECIPE), RECIPE, 20, SIZE, Parallel(), 0)
    trainer = Trainer(model, voc.training_set(small_kit).pictures, Plan(4, 2, 0.02), Parallel(), 0)
    seen = []
    handle = model.backbone.bn1.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    pooled = model.backbone.bn1.pooled
    model.backbone.bn1.pooled = lambda x: seen.append(x.detach()) or pooled(x)
    trainer.settle_statistics(3)
    handle.remove()
    expected = torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0)
    torch.testing.assert_close(model.backbone.bn1.running_mean, expected, rtol=1e-5, atol=1e-6)


def test_the_line_that_a_stopped_detector_ends_with_is_a_whole_command(tmp_path):
    (tmp_path / "a detector").mkdir()
    options = EvaluateDetection(tmp_path / "run", data=tmp_path / "VOC")
    program, *words = shlex.split(_go_on(options, tmp_path / "a detector"))
    again = parse(words)[1]
    assert program == "fastmoco" and again.resume and again.out == tmp_path / "a detector"
    assert (again.run, again.data) == (options.run, options.data)


def test_stopped_and_resumed_is_undisturbed(tmp_path, small_kit):
    """The same bits after three steps and three more, in another process, as after six."""
    pytest.importorskip("torchvision")
    run = make_run(tmp_path / "run")
    ask = ["evaluate", "detection", str(run), "--data", str(small_kit), *SMALL, "--iterations", "6", "--lr", "0.02"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main([*ask, "--out", str(whole)]) == 0
    assert main([*ask, "--out", str(parts), "--save-every", "3"]) == 0
    for folder in (parts / "checkpoints").glob("step_00000006"):
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    assert main([*ask[:4], str(small_kit), *SMALL, "--out", str(parts), "--resume"]) == 0
    ends = [checkpoint.load(checkpoint.latest(out)).state for out in (whole, parts)]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    figures = [json.loads((out / "detection.json").read_text()) for out in (whole, parts)]
    assert figures[0]["AP"] == figures[1]["AP"] and figures[0]["iterations"] == figures[1]["iterations"] == 6
    assert Image.open(whole / "detections.png").width > 1000
    assert len((whole / "log.jsonl").read_text().splitlines()) == 1
    assert main([*ask, "--out", str(whole)]) == 2, "a detector is not overwritten"


def test_a_rate_that_is_too_high_is_one_line(tmp_path, small_kit, capsys):
    pytest.importorskip("torchvision")
    run = make_run(tmp_path / "run")
    ask = ["evaluate", "detection", str(run), "--data", str(small_kit), *SMALL, "--iterations", "40", "--lr", "1e12"]
    assert main(ask) == 2
    assert "give a smaller --lr" in capsys.readouterr().err


def two_ranks(parallel: Parallel, kit: str) -> tuple[dict, float, int]:
    model = detector.build(build_encoder(RECIPE), RECIPE, 20, SIZE, parallel, 0)
    pictures = voc.training_set(Path(kit)).pictures
    trainer = Trainer(model, pictures, Plan(2, 4, 0.02), parallel, 0)
    trainer.train(2, lambda said: False)
    trainer.settle_statistics(2)
    found = detect(model, pictures, parallel, 0)
    return (
        {name: value.detach() for name, value in model.state_dict().items()},
        float(found[0].scores.sum()),
        len(found),
    )


def test_ranks_hold_one_detector_and_see_all_pictures(run_ranks, small_kit):
    pytest.importorskip("torchvision")
    (one, score, count), (other, again, _) = run_ranks(2, two_ranks, str(small_kit))
    assert count == 6 and score == again
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_options_are_checked(tmp_path):
    from fastmoco.evaluate.options import EvaluateDetection

    for wrong in ({"iterations": 0}, {"size": 8}, {"lr": 0.0}, {"threads": -1}):
        with pytest.raises(UsageError, match="use"):
            EvaluateDetection(tmp_path, data=tmp_path, **wrong)
    with pytest.raises(UsageError, match="VOCdevkit"):
        EvaluateDetection(tmp_path)
