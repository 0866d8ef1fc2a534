"""The linear probe: against plain float64, scikit-learn, separable and meaningless labels; the backbone stays put."""

import json
import math
import shutil
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression

from fastmoco.cli import main
from fastmoco.data import manifest
from fastmoco.data.loader import Loading
from fastmoco.data.plan import Plan
from fastmoco.data.request import DecodeError
from fastmoco.encoder import build_encoder
from fastmoco.evaluate import classifier, linear
from fastmoco.evaluate.classifier import Protocol, fit_cached, new_classifier
from fastmoco.evaluate.linear import Evaluation, changes, snapshot, training_recipe
from fastmoco.interop import card
from fastmoco.parallel import Parallel
from fastmoco.presets import PRESETS
from fastmoco.runs import checkpoint, run_folder

CLASSES, DIM, COUNT = 5, 8, 500
RECIPE = replace(PRESETS["demo"][1], width=0.125, crop_size=16, batch_size=8, bn_group=4, queue_size=20)


def points(seed: int, spread: float) -> tuple[torch.Tensor, torch.Tensor]:
    centres = torch.randn(CLASSES, DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(COUNT) % CLASSES
    return centres[labels] + spread * torch.randn(COUNT, DIM, generator=generator, dtype=torch.float64), labels


def plan_of(protocol: Protocol) -> Plan:
    return Plan(training_recipe(RECIPE, protocol), np.full((COUNT, 2), 64, np.int32))


def by_hand(features, labels, plan, protocol) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """SGD on softmax regression in NumPy, with the gradient written out."""
    first = new_classifier(DIM, CLASSES, protocol.seed, torch.device("cpu"))
    w, b = (value.detach().double().numpy().copy() for value in (first.weight, first.bias))
    v_w, v_b, losses = np.zeros_like(w), np.zeros_like(b), []
    for step in range(protocol.epochs * plan.steps_per_epoch):
        epoch = step // plan.steps_per_epoch
        rate = protocol.lr * protocol.batch_size / 256
        rate *= 0.1 ** ((epoch >= 0.6 * protocol.epochs) + (epoch >= 0.8 * protocol.epochs))
        rows = plan.samples(step)
        x, y = features[rows], labels[rows]
        z = x @ w.T + b
        p = np.exp(z - z.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        losses.append(-np.log(p[np.arange(len(y)), y]).mean())
        p[np.arange(len(y)), y] -= 1
        p /= len(y)
        v_w, v_b = protocol.momentum * v_w + p.T @ x, protocol.momentum * v_b + p.sum(0)
        w, b = w - rate * v_w, b - rate * v_b
    return w, b, losses


def test_equals_float64_by_hand_on_500_points():
    protocol = Protocol(lr=1.0, epochs=10, batch_size=64)
    (features, labels), val = points(1, 1.5), points(2, 1.5)
    plan = plan_of(protocol)
    w, b, losses = by_hand(features.numpy(), labels.numpy(), plan, protocol)
    probe = fit_cached((features.float(), labels), (val[0].float(), val[1]), CLASSES, plan, protocol)
    torch.testing.assert_close(probe.classifier.weight.detach().double(), torch.from_numpy(w), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(probe.classifier.bias.detach().double(), torch.from_numpy(b), rtol=1e-4, atol=1e-5)
    per_epoch = np.reshape(losses, (protocol.epochs, -1)).mean(1)
    np.testing.assert_allclose([line["loss"] for line in probe.curve], per_epoch, rtol=1e-5)
    expected = 100 * float((np.argmax(val[0].numpy() @ w.T + b, 1) == val[1].numpy()).mean())
    assert probe.scores.top1 == pytest.approx(expected)


def test_as_accurate_as_scikit_learns_logistic_regression():
    protocol = Protocol(lr=1.0, epochs=60, batch_size=100)
    (features, labels), val = points(3, 1.5), points(4, 1.5)
    probe = fit_cached((features.float(), labels), (val[0].float(), val[1]), CLASSES, plan_of(protocol), protocol)
    oracle = LogisticRegression(C=1e6, max_iter=2000).fit(features.numpy(), labels.numpy())
    expected = 100 * oracle.score(val[0].numpy(), val[1].numpy())
    assert 40 < expected < 97, "the points decide nothing"
    assert abs(probe.scores.top1 - expected) < 2
    predicted = (val[0].float() @ probe.classifier.weight.T + probe.classifier.bias).argmax(1)
    assert (predicted.numpy() == oracle.predict(val[0].numpy())).mean() > 0.95


def test_separable_is_perfect_and_shuffled_labels_are_chance():
    protocol = Protocol(epochs=20)
    (features, labels), val = points(5, 0.05), points(6, 0.05)
    plan = plan_of(protocol)
    sure = fit_cached((features.float(), labels), (val[0].float(), val[1]), CLASSES, plan, protocol)
    assert sure.scores.top1 == 100 and sure.scores.per_class == [100] * CLASSES
    features, val = points(5, 3.0)[0], points(6, 3.0)
    shuffled = labels[torch.randperm(COUNT, generator=torch.Generator().manual_seed(7))]
    lost = fit_cached((features.float(), shuffled), (val[0].float(), val[1]), CLASSES, plan, protocol)
    chance = 1 / CLASSES
    assert abs(lost.scores.top1 - 100 * chance) < 500 * math.sqrt(chance * (1 - chance) / COUNT)


def test_a_rate_that_is_too_high_is_told():
    (features, labels), val = points(5, 3.0), points(6, 3.0)
    hints = {}
    for lr in (30.0, 0.1):
        protocol = Protocol(lr=lr, epochs=5)
        probe = fit_cached((features.float(), labels), (val[0].float(), val[1]), CLASSES, plan_of(protocol), protocol)
        hints[lr] = linear.rate_hint(probe, protocol, CLASSES)
    assert "above ln(classes) = 1.61" in hints[30.0] and hints[30.0].endswith("try --lr 3") and hints[0.1] == ""


@pytest.mark.parametrize(
    ("batch", "epochs", "rates"),
    [(256, 100, {0: 30, 59: 30, 60: 3, 79: 3, 80: 0.3, 99: 0.3}), (64, 10, {0: 7.5, 5: 7.5, 6: 0.75, 8: 0.075})],
)
def test_the_published_schedule(batch, epochs, rates):
    protocol = Protocol(epochs=epochs, batch_size=batch)
    assert {epoch: pytest.approx(protocol.rate(epoch)) for epoch in rates} == rates
    assert (protocol.momentum, protocol.weight_decay) == (0.9, 0)


def test_the_classifier_starts_as_published():
    first = new_classifier(2048, 1000, 0, torch.device("cpu"))
    assert first.bias.abs().max() == 0 and first.weight.std().item() == pytest.approx(0.01, rel=0.01)
    assert torch.equal(first.weight, new_classifier(2048, 1000, 0, torch.device("cpu")).weight)


def test_crops_and_flips_are_the_only_augmentation():
    plan = Plan(training_recipe(RECIPE, Protocol()), np.full((3000, 2), 300, np.int32))
    samples = np.arange(3000)
    parameters, boxes = plan.photometric(0, samples, 0), plan.boxes(0, samples, 0)
    assert 0.45 < parameters[:, 0].mean() < 0.55
    still = np.broadcast_to(np.array([0, -1, 1, 1, 1, 0, 0], np.float32), (3000, 7))
    np.testing.assert_array_equal(parameters[:, 1:], still)
    shares = boxes[:, 2] * boxes[:, 3] / 90000
    assert 0.07 < shares.min() < 0.1 and shares.max() > 0.9


@pytest.fixture(scope="module")
def sides(stripes):
    train = manifest.scan(stripes / "train")
    return train, manifest.scan(stripes / "val", classes=train.classes)


def evaluation(sides, **protocol) -> Evaluation:
    encoder = build_encoder(RECIPE).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # statistics that a training step would move
        for name, buffer in encoder.named_buffers():
            if "running" in name:
                buffer.uniform_(0.8, 1.2, generator=generator).sub_(1.0 if name.endswith("mean") else 0.0)
    protocol_ = Protocol(**{"epochs": 3, "batch_size": 16, **protocol})
    return Evaluation(encoder, RECIPE, *sides, protocol_, Parallel(), threads=1)


def test_the_backbone_is_bit_equal_after_the_probe(sides):
    probe_of = evaluation(sides)
    before = snapshot(probe_of.encoder)
    probe = probe_of.exact()
    assert changes(before, probe_of.encoder) == [] and len(probe.curve) == 3
    start = new_classifier(probe_of.encoder.feature_dim, 2, 0, torch.device("cpu"))
    assert not torch.equal(probe.classifier.weight, start.weight), "nothing was trained"


def test_a_backbone_in_training_mode_is_noticed(sides, monkeypatch):
    """The control: in training mode batch norm moves its statistics, and the check says so."""
    probe_of = evaluation(sides)
    monkeypatch.setattr(probe_of.encoder, "eval", lambda: probe_of.encoder.train())
    with pytest.raises(AssertionError, match="the probe changed the backbone.*running_mean"):
        probe_of.exact()


def test_exact_and_fast_agree_where_there_is_nothing_to_augment(sides, monkeypatch):
    """With centre crops in place of random ones, the exact probe sees the features that the fast one caches."""
    from fastmoco.data.plan import centre_boxes

    monkeypatch.setattr(Plan, "boxes", lambda plan, epoch, samples, view: centre_boxes(plan.sizes[samples], 16))
    real = Plan.photometric

    def unflipped(plan, epoch, samples, view):
        parameters = real(plan, epoch, samples, view)
        parameters[:, 0] = 0
        return parameters

    monkeypatch.setattr(Plan, "photometric", unflipped)
    exact = evaluation(sides, lr=1.0).exact()
    fast = evaluation(sides, lr=1.0).fast()
    torch.testing.assert_close(exact.classifier.weight, fast.classifier.weight, rtol=1e-4, atol=1e-5)


def test_the_rate_that_was_chosen_gives_the_probe_of_that_rate(sides):
    """The published probe trains all rates in one pass; what it keeps is what `--lr` of that rate gives."""
    probe_of = evaluation(sides)
    probe, choice = probe_of.exact_of_best()
    assert probe_of.protocol.lr == choice.lr and len(choice.tried) == 9
    again = evaluation(sides, lr=choice.lr).exact()
    torch.testing.assert_close(probe.classifier.weight, again.classifier.weight, rtol=1e-4, atol=1e-6)
    assert [line["lr"] for line in probe.curve] == [line["lr"] for line in again.curve]
    other = evaluation(sides, lr=10 * choice.lr).exact()
    assert not torch.allclose(probe.classifier.weight, other.classifier.weight, rtol=1e-2)  # the control


@pytest.fixture
def with_a_bad_file(stripes, tmp_path):
    """The sides, with a training file that is cut short after the scan, at the end of its class."""
    folder = shutil.copytree(stripes, tmp_path / "images")
    train = manifest.scan(folder / "train", cache=False)
    victim = folder / "train/across/9.jpg"
    victim.write_bytes(victim.read_bytes()[:-200])
    return train, manifest.scan(folder / "val", classes=train.classes, cache=False)


def test_one_bad_file_is_named_and_replaced(with_a_bad_file, monkeypatch):
    train, _ = with_a_bad_file
    bad = train.find("across/9.jpg")
    assert (train.paths[bad + 1], train.labels[bad + 1]) == ("down/0.jpg", 1 - train.labels[bad])
    labels = []
    real = F.cross_entropy
    monkeypatch.setattr(classifier.F, "cross_entropy", lambda x, y, **how: labels.append(y) or real(x, y, **how))
    probe_of = evaluation(with_a_bad_file, lr=1.0, batch_size=40, epochs=2)
    with pytest.warns(UserWarning, match="across/9.jpg: .*; training on down/0.jpg in its place") as warned:
        probe = probe_of.exact()
    assert len(probe.curve) == 2 and len([each for each in warned if "training on" in str(each.message)]) == 1
    # The substitute's pixels come with the substitute's label: 19 of one class and 21 of the other.
    assert [int(each.sum()) for each in labels] == [21 if train.labels[bad] == 0 else 19] * 2


def test_without_a_quarantine_one_bad_file_ends_the_probe(with_a_bad_file, monkeypatch):
    """The control."""
    monkeypatch.setattr(linear, "Quarantine", lambda manifest, max_share: None)
    with pytest.raises(DecodeError, match="across/9.jpg"):
        evaluation(with_a_bad_file, batch_size=40).exact()


def test_good_files_make_no_warning(sides):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluation(sides, epochs=1).exact()


@pytest.fixture(scope="module")
def pretrained_run(stripes, tmp_path_factory):
    """A run at step 0: the commands need no more."""
    from fastmoco.contrast.step import Step

    out = tmp_path_factory.mktemp("trained") / "run"
    state = Step(RECIPE, Parallel(), "fp32").state()
    checkpoint.save(out, 0, state, {"recipe": RECIPE.as_dict(), "precision": "fp32"})
    (out / "recipe.json").write_text(json.dumps({"recipe": RECIPE.as_dict(), "options": {"data": str(stripes)}}))
    return out


def test_the_commands_write_figures_pictures_and_weights(pretrained_run, capsys):
    argv = [
        "evaluate",
        "linear",
        str(pretrained_run),
        "--epochs",
        "4",
        "--lr",
        "3",
        "--threads",
        "1",
        "--device",
        "cpu",
    ]
    assert main(argv) == 0
    assert main([*argv, "--fast"]) == 0
    assert "fast and exact agree on" in capsys.readouterr().out
    elsewhere = shutil.copytree(pretrained_run, pretrained_run.parent / "elsewhere", symlinks=True)
    others = json.loads((pretrained_run / "recipe.json").read_text())["options"]["data"] + "/train"
    assert main([*argv[:2], str(elsewhere), *argv[3:], "--fast", "--data", others]) == 0
    assert "agree on" not in capsys.readouterr().out  # two probes of different images have nothing to agree on
    assert main(["evaluate", "knn", str(pretrained_run), "--k", "3", "--threads", "1", "--device", "cpu"]) == 0
    figures = json.loads((pretrained_run / "linear.json").read_text())
    assert figures["backbone"] == "bit-equal after the probe" and len(figures["curve"]) == 4
    assert set(figures["per_class"]) == {"across", "down"} and figures["protocol"]["batch_size"] == 40
    assert np.sum(figures["confusion"]) == 12 and figures["top1"] == figures["curve"][-1]["top1"]
    for name in ("linear", "linear-fast", "knn", "neighbours"):
        assert (pretrained_run / f"{name}.png").stat().st_size > 2000, name
    from safetensors.torch import load_file

    weights = load_file(pretrained_run / "linear.safetensors")
    encoder, _, _ = run_folder.load_encoder(pretrained_run, Parallel())
    val = manifest.scan(json.loads((pretrained_run / "recipe.json").read_text())["options"]["data"] + "/val")
    features, labels = linear.extract(encoder, val, RECIPE, Parallel(), loading=Loading(threads=1), normalise=False)
    top1 = (F.linear(features, weights["fc.weight"], weights["fc.bias"]).argmax(1) == labels).double().mean() * 100
    assert figures["top1"] == pytest.approx(top1.item())


def test_untrained_weights_stand_beside_the_others(pretrained_run, capsys):
    """At step 0 both are the same weights; after training they are not, and no checkpoint is asked for."""
    fast = ["evaluate", "linear", str(pretrained_run), "--fast", "--epochs", "2", "--threads", "1", "--device", "cpu"]
    assert main(fast) == 0 and main([*fast, "--untrained"]) == 0
    one, other = (json.loads((pretrained_run / f"linear-fast{end}.json").read_text()) for end in ("", "-untrained"))
    assert one["curve"] == other["curve"] and other["step"] == 0
    moved = shutil.copytree(pretrained_run, pretrained_run.parent / "moved", symlinks=True)
    state = checkpoint.load(checkpoint.latest(pretrained_run)).state
    for name, value in state.items():
        if name.startswith("encoder_q.layer4") and name.endswith("conv2.weight"):
            value.neg_()
    checkpoint.save(moved, 3, state, {"recipe": RECIPE.as_dict(), "precision": "fp32"})
    fast[2] = str(moved)
    assert main(fast) == 0
    assert json.loads((moved / "linear-fast.json").read_text())["curve"] != other["curve"]  # the control
    shutil.rmtree(moved / "checkpoints")
    knn = ["evaluate", "knn", str(moved), "--k", "3", "--threads", "1", "--device", "cpu", "--untrained"]
    assert main([*fast, "--untrained"]) == 0 and main(knn) == 0
    assert json.loads((moved / "linear-fast-untrained.json").read_text())["curve"] == other["curve"]
    assert {path.name for path in moved.glob("*-untrained.*")} == {
        "linear-fast-untrained.json",
        "linear-fast-untrained.png",
        "linear-fast-untrained.safetensors",
        "knn-untrained.json",
        "knn-untrained.png",
        "neighbours-untrained.png",
    }
    assert not any("untrained" in str(file) for file in card.FIGURES), "a model card tells of trained weights"


def test_the_rate_is_chosen_and_an_earlier_probe_is_kept(pretrained_run, capsys):
    run = shutil.copytree(pretrained_run, pretrained_run.parent / "twice", symlinks=True)
    for old in run.glob("linear*"):
        old.unlink()
    argv = ["evaluate", "linear", str(run), "--epochs", "2", "--threads", "1", "--device", "cpu"]
    assert main([*argv, "--fast"]) == 0 and main(argv) == 0
    said = capsys.readouterr().out
    fast, exact = (json.loads((run / f"{name}.json").read_text()) for name in ("linear-fast", "linear"))
    for figures in (fast, exact):
        assert figures["rate"]["lr"] == figures["protocol"]["lr"] == pytest.approx(figures["curve"][0]["lr"] * 256 / 40)
        assert (figures["rate"]["fitted"], figures["rate"]["held_out"], figures["train"]) == (32, 40, 40)
        assert f"lr {figures['rate']['lr']:g} chosen among 30 10 3 1 0.3 0.1 0.03 0.01 0.003: top-1" in said
    assert fast["rate"]["tried"] != exact["rate"]["tried"], "the published probe was judged by centre crops alone"
    assert main([*argv, "--fast"]) == 0 and "earlier" not in capsys.readouterr().out  # the same figures again
    assert main([*argv, "--fast", "--lr", "30"]) == 0 and main([*argv, "--fast", "--lr", "3"]) == 0
    assert "earlier evaluation are kept as" in capsys.readouterr().out
    found = {name: json.loads((run / f"{name}.json").read_text()) for name in ("linear-fast.1", "linear-fast.2")}
    assert found["linear-fast.1"] == fast | {"seconds": found["linear-fast.1"]["seconds"]}
    assert (found["linear-fast.2"]["protocol"]["lr"], found["linear-fast.2"]["rate"]) == (30, None)
    assert all((run / f"linear-fast.{number}{end}").is_file() for number in (1, 2) for end in (".png", ".safetensors"))
    knn = ["evaluate", "knn", str(run), "--threads", "1", "--device", "cpu", "--k"]
    assert main([*knn, "3"]) == 0 and main([*knn, "4"]) == 0
    assert json.loads((run / "knn.1.json").read_text())["k"] == 3 and (run / "neighbours.1.png").is_file()


def test_classes_of_one_image_leave_the_published_rate(pretrained_run, stripes, tmp_path, capsys):
    """Nothing can be held out; the probe works all the same."""
    for side, number in (("train", 0), ("val", 1)):
        for name in ("across", "down"):
            (tmp_path / side / name).mkdir(parents=True)
            shutil.copy(stripes / "train" / name / f"{number}.jpg", tmp_path / side / name)
    argv = [
        "evaluate",
        "linear",
        str(pretrained_run),
        "--data",
        str(tmp_path / "train"),
        "--val",
        str(tmp_path / "val"),
    ]
    assert main([*argv, "--epochs", "1", "--fast", "--threads", "1", "--device", "cpu"]) == 0
    assert "lr 30, as published: no class has two images" in capsys.readouterr().out


def test_mistakes_are_one_line(pretrained_run, capsys):
    assert main(["evaluate", "linear", str(pretrained_run), "--epochs", "0"]) == 2
    assert "use a number of at least 1" in capsys.readouterr().err
