"""Fine-tuning: which images, how the rates fall, that it learns, and that ranks and 16 bits change nothing but bits."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from fastmoco.cli import main
from fastmoco.contrast.step import Step
from fastmoco.data import manifest
from fastmoco.data.errors import DataError
from fastmoco.data.loader import Loading
from fastmoco.encoder import build_encoder
from fastmoco.evaluate import finetune, linear
from fastmoco.evaluate.classifier import Probe
from fastmoco.evaluate.finetune import Masters, Protocol, Tuning
from fastmoco.evaluate.fraction import listed, share_of
from fastmoco.evaluate.options import EvaluateFinetune
from fastmoco.evaluate.scores import Scores
from fastmoco.options import UsageError
from fastmoco.parallel import Parallel
from fastmoco.presets import PRESETS
from fastmoco.runs import checkpoint

RECIPE = replace(PRESETS["demo"][1], width=0.125, crop_size=16, batch_size=8, bn_group=4, queue_size=20)


def sides(stripes) -> tuple:
    train = manifest.scan(stripes / "train")
    return train, manifest.scan(stripes / "val", classes=train.classes)


def tuning(work: torch.dtype = torch.float32, parallel: Parallel = Parallel()) -> Tuning:
    return Tuning(build_encoder(RECIPE), RECIPE, 2, parallel, Loading(threads=1), work)


def test_a_share_is_of_each_class_fixed_and_nested(stripes):
    train, _ = sides(stripes)
    for fraction, each in ((0.01, 1), (0.1, 2), (0.5, 10), (1.0, 20)):
        part = share_of(train, fraction)
        assert np.bincount(part.labels).tolist() == [each, each] and part.classes == train.classes
    assert set(share_of(train, 0.1).paths) < set(share_of(train, 0.5).paths)
    # Images of another class change nothing: names alone decide.
    down = train.take(np.flatnonzero(train.labels == 1))
    of_all = [path for path in share_of(train, 0.25).paths if path.startswith("down")]
    assert share_of(down, 0.25).paths == of_all and len(of_all) == 5


def test_a_published_list_names_the_images(stripes, tmp_path):
    train, _ = sides(stripes)
    (tmp_path / "list.txt").write_text("across/3.jpg\ndown/4.jpg\n")
    assert listed(train, tmp_path / "list.txt").paths == ["across/3.jpg", "down/4.jpg"]
    (tmp_path / "none.txt").write_text("n01440764_10043.JPEG\n")
    with pytest.raises(DataError, match="lists none of the 40 images"):
        listed(train, tmp_path / "none.txt")
    with pytest.raises(UsageError, match="cannot be read"):
        listed(train, tmp_path / "missing.txt")


def test_rates_fall_by_a_cosine_and_scale_with_the_batch():
    protocol = Protocol(lr=0.1, lr_head=0.4, batch_size=128)
    assert protocol.rates(0) == pytest.approx((0.05, 0.2)) and protocol.rates(0.5) == pytest.approx((0.025, 0.1))
    assert protocol.rates(1) == pytest.approx((0, 0)) and protocol._replace(lr_head=None).rates(0)[1] == 0.05


@pytest.mark.parametrize(
    ("images", "world", "fraction", "given", "expected"),
    [
        (12811, 1, 0.01, None, (256, 60)),
        (128116, 8, 0.1, None, (256, 30)),
        (1281167, 8, 1, None, (256, 30)),
        (40, 1, 1, None, (40, 300)),
        (41, 2, 1, None, (40, 300)),
        (40, 1, 1, 7, (40, 7)),
    ],
)
def test_length_and_batch_follow_the_images(images, world, fraction, given, expected):
    found = Protocol().fitting(images, world, fraction, given)
    assert (found.batch_size, found.epochs) == expected


def test_it_learns_and_begins_anew_each_time(stripes):
    train, val = sides(stripes)
    tuned = tuning()
    first = {name: value.clone() for name, value in tuned.encoder.state_dict().items()}
    protocol = Protocol(lr=0.5, epochs=25, batch_size=20)
    probe = tuned.fit(train, val, protocol)
    assert probe.scores.top1 > 90 and probe.curve[-1]["loss"] < 0.3
    moved = [name for name, value in tuned.weights().items() if not torch.equal(value, first[name])]
    assert {"conv1.weight", "bn1.running_mean", "layer4.0.conv2.weight"} <= set(moved)
    assert torch.equal(tuned.encoder.state_dict()["fc.0.weight"], first["fc.0.weight"])
    again = tuned.fit(train, val, protocol)
    assert again.curve == probe.curve and torch.equal(again.classifier.weight, probe.classifier.weight)
    # The control: labels that say nothing.
    mixed = replace(train, labels=np.random.RandomState(0).permutation(train.labels))
    assert tuned.fit(mixed, val, protocol._replace(epochs=5)).scores.top1 < 90


def test_the_chosen_rate_is_the_best_on_images_held_out(stripes, monkeypatch):
    train, _ = sides(stripes)
    monkeypatch.setattr(finetune, "RATES", (0.05, 0.5, 1e9))
    choice = tuning().choose(train, Protocol(epochs=24, batch_size=20))
    assert choice.fitted == 32 and choice.held_out == 8 * choice.folds
    assert [each.lr for each in choice.tried] == [0.05, 0.5, 1e9]
    assert choice.lr != 1e9 and max(each.top1 for each in choice.tried) == next(
        each.top1 for each in choice.tried if each.lr == choice.lr
    )
    alone = train.take([0, 39])  # of each class one: nothing can be held out
    assert tuning().choose(alone, Protocol(lr=0.07)).lr == 0.07


def test_few_held_out_images_decide_nothing_alone(stripes, monkeypatch):
    """Rates race over the fifths; the bad ones leave early. By the first fifth alone another rate would be taken."""
    train, _ = sides(stripes)
    found = {0.05: [75, 75, 75, 75, 75], 0.5: [88, 50, 50, 50, 50], 0.15: [75, 88, 88, 88, 88], 0.005: [12]}
    monkeypatch.setattr(finetune, "RATES", tuple(found))
    tried, tuned = [], tuning()

    def fit(train, held, protocol, looks):
        tried.append(protocol.lr)
        top1 = found[protocol.lr][tried.count(protocol.lr) - 1]
        return Probe(torch.nn.Linear(1, 1), [{"loss": 1.0}], Scores(top1, 100.0, [], torch.zeros(0)))

    monkeypatch.setattr(tuned, "fit", fit)
    choice = tuned.choose(train, Protocol())
    assert max(found, key=lambda lr: found[lr][0]) == 0.5 and choice.lr == 0.15  # the control: one fifth
    assert (tried.count(0.005), tried.count(0.15), choice.folds, choice.held_out) == (1, 5, 5, 40)
    by_rate = {each.lr: each.top1 for each in choice.tried}
    assert by_rate[0.15] == pytest.approx(np.mean(found[0.15])) and by_rate[0.005] == 12
    tried.clear()
    monkeypatch.setattr(finetune, "ENOUGH", 8)
    assert tuned.choose(train, Protocol()).lr == 0.5 and len(tried) == 4


def test_16_bits_have_masters_in_32():
    network = build_encoder(RECIPE).requires_grad_(True)
    before = {name: value.detach().clone() for name, value in network.named_parameters()}
    masters = Masters(network, torch.bfloat16)
    kinds = {name: value.dtype for name, value in network.named_parameters() if not name.startswith("fc.")}
    assert kinds["conv1.weight"] == torch.bfloat16 and kinds["bn1.weight"] == torch.float32
    step = 1e-4  # below what bf16 can add to a weight near 1, and so lost without a master
    for value, master in masters.pairs:
        value.grad = torch.full_like(value, -1.0)
    masters.take_gradients()
    optimizer = torch.optim.SGD(masters.parameters, lr=step)
    optimizer.step()
    masters.cast()
    for (value, master), (name, old) in zip(masters.pairs, before.items(), strict=True):
        torch.testing.assert_close(master.detach(), old + step, rtol=0, atol=1e-7, msg=name)
        assert torch.equal(value.detach(), master.detach().to(value.dtype))
    assert torch.equal(torch.ones((), dtype=torch.bfloat16) + step, torch.ones((), dtype=torch.bfloat16)), "the control"


def test_bf16_learns_too_and_its_weights_are_those_of_the_masters(stripes):
    train, val = sides(stripes)
    tuned = tuning(torch.bfloat16)
    probe = tuned.fit(train, val, Protocol(lr=0.5, epochs=25, batch_size=20))
    weights = tuned.weights()
    assert probe.scores.top1 > 80 and {value.dtype for value in weights.values()} == {torch.float32, torch.int64}
    assert torch.equal(weights["conv1.weight"].bfloat16(), tuned.encoder.conv1.weight.detach())
    assert not torch.equal(weights["conv1.weight"].bfloat16().float(), weights["conv1.weight"])


def curve_of_a_rank(parallel: Parallel, stripes) -> tuple[list[dict], torch.Tensor]:
    probe = tuning(parallel=parallel).fit(*sides(stripes), Protocol(lr=0.1, epochs=3, batch_size=20))
    return probe.curve, probe.classifier.weight.detach()


@pytest.mark.slow
def test_two_ranks_are_one_run(run_ranks, stripes):
    (curve, weight), (other, same) = run_ranks(2, curve_of_a_rank, stripes)
    alone, expected = curve_of_a_rank(Parallel(), stripes)
    assert curve == other and torch.equal(weight, same)
    for ours, theirs in zip(curve, alone, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
    torch.testing.assert_close(weight, expected, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def trained(stripes, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "run"
    checkpoint.save(out, 0, Step(RECIPE, Parallel(), "fp32").state(), {"recipe": RECIPE.as_dict()})
    (out / "recipe.json").write_text(json.dumps({"recipe": RECIPE.as_dict(), "options": {"data": str(stripes)}}))
    return out


def test_the_command_keeps_results_of_shares_side_by_side(trained, stripes, capsys):
    from safetensors.torch import load_file

    argv = ["evaluate", "finetune", str(trained), "--epochs", "2", "--threads", "1", "--device", "cpu"]
    assert main([*argv, "--lr", "0.1"]) == 0 and main([*argv, "--lr", "0.1", "--fraction", "0.1"]) == 0
    assert main([*argv, "--lr", "0.2"]) == 0 and "are kept as" in capsys.readouterr().out
    whole, tenth, first = (
        json.loads((trained / f"{name}.json").read_text()) for name in ("finetune", "finetune-0.1", "finetune.1")
    )
    assert (whole["train"], tenth["train"], tenth["fraction"]) == (40, 4, 0.1)
    assert (first["protocol"]["lr"], whole["protocol"]["lr"]) == (0.1, 0.2) and whole["backbone"] == "trained"
    weights = load_file(trained / "finetune.safetensors")
    encoder = build_encoder(RECIPE)
    encoder.load_state_dict(
        {name: value for name, value in weights.items() if not name.startswith("fc.")}, strict=False
    )
    val = manifest.scan(stripes / "val")
    features, labels = linear.extract(encoder, val, RECIPE, Parallel(), loading=Loading(threads=1), normalise=False)
    said = torch.nn.functional.linear(features, weights["fc.weight"], weights["fc.bias"]).argmax(1)
    assert whole["top1"] == pytest.approx((said == labels).double().mean().item() * 100)
    assert main([*argv[:3], "--fraction", "0.5", "--subset", "x.txt"]) == 2
    assert "leave one out" in capsys.readouterr().err


def test_options_are_checked(tmp_path):
    for wrong in (
        {"fraction": 0.0},
        {"fraction": 2.0},
        {"epochs": 0},
        {"batch_size": 1},
        {"lr": 0.0},
        {"lr_head": -1.0},
    ):
        with pytest.raises(UsageError, match="use"):
            EvaluateFinetune(tmp_path, **wrong)
