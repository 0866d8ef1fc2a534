"""The rate of a probe: chosen on held-out training images, by the same training that the probe does."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from fastmoco.data.plan import Plan
from fastmoco.evaluate.classifier import NOT_HELD_OUT, Candidates, Protocol, cached_batches, fit
from fastmoco.evaluate.linear import training_recipe
from fastmoco.evaluate.rate import ENOUGH, FOLDS, RATES, Choice, choose, fold_of, held_out_split, judge, looked_at
from fastmoco.presets import PRESETS

CLASSES, DIM, COUNT = 4, 8, 400
PROTOCOL = Protocol(epochs=20, batch_size=64)
RECIPE = training_recipe(replace(PRESETS["demo"][1], batch_size=8, bn_group=4, queue_size=16), PROTOCOL)


def points(scale: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Points of four classes, which four short coordinates tell apart and four long ones do not; all `scale` as long.

    A rate that is too low learns the long coordinates alone, one that is too high diverges along them.
    """
    centres = torch.randn(CLASSES, DIM // 2, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed + 1)
    labels = torch.arange(COUNT) % CLASSES
    short = 0.1 * (centres[labels] + 0.4 * torch.randn(COUNT, DIM // 2, generator=generator))
    return torch.cat([short, torch.randn(COUNT, DIM // 2, generator=generator)], 1) * scale, labels


@pytest.mark.parametrize("counts", [[50, 50], [1, 2, 3, 4, 5, 6], [1000, 1, 7], [1, 1, 1]])
def test_a_fifth_of_each_class_is_held_out(counts):
    labels = np.random.RandomState(0).permutation(np.repeat(np.arange(len(counts)), counts))
    fitted, held = held_out_split(labels)
    np.testing.assert_array_equal(np.sort(np.concatenate([fitted, held])), np.arange(len(labels)))
    for number, count in enumerate(counts):
        expected = max(count // FOLDS, 1) if count > 1 else 0
        assert (labels[held] == number).sum() == expected
    again = held_out_split(labels.copy())
    np.testing.assert_array_equal(held, again[1])
    if len(held) > 20:  # all over the set, not its end
        assert held.min() < len(labels) / 5 and held.max() > 4 * len(labels) / 5


@pytest.mark.parametrize("counts", [[50, 53], [1, 2, 3, 4, 5, 6], [1000, 1, 7]])
def test_the_folds_hold_out_every_image_once(counts):
    """But for what is left where a class is no multiple of five, which is always fitted."""
    labels = np.random.RandomState(0).permutation(np.repeat(np.arange(len(counts)), counts))
    folds = fold_of(labels)
    expected = [count // FOLDS * FOLDS if count >= FOLDS else count if count > 1 else 0 for count in counts]
    np.testing.assert_array_equal(np.bincount(labels[folds != NOT_HELD_OUT], minlength=len(counts)), expected)
    for fold in range(FOLDS):
        fitted, held = held_out_split(labels, fold)
        np.testing.assert_array_equal(held, np.flatnonzero(folds == fold))
        np.testing.assert_array_equal(np.sort(np.concatenate([fitted, held])), np.arange(len(labels)))
        assert set(labels[held]) <= set(labels[fitted]), "a class is judged that was not trained on"


@pytest.mark.parametrize(
    ("count", "turns", "held"),
    [(ENOUGH // 2, 5, ENOUGH // 2), (2 * ENOUGH, 3, 12_000), (5 * ENOUGH, 1, ENOUGH), (20 * ENOUGH, 1, ENOUGH)],
)
def test_no_more_is_held_out_than_it_takes_to_judge_by_enough_images(count, turns, held):
    folds = fold_of(np.arange(count) % 2)
    assert folds.max() + 1 == turns and (folds != NOT_HELD_OUT).sum() == held


def test_of_a_large_set_only_a_part_is_looked_at(monkeypatch):
    monkeypatch.setattr("fastmoco.evaluate.rate.MOST_IMAGES", 100)
    labels = np.arange(10_000) % 3
    fitted, held = held_out_split(labels)
    assert len(fitted) + len(held) == 100 and len(np.intersect1d(fitted, held)) == 0 and 17 <= len(held) <= 20
    np.testing.assert_array_equal(looked_at(labels), np.sort(np.concatenate([fitted, held])))


def alone(features, labels, batches, rate, left_out) -> tuple[np.ndarray, np.ndarray]:
    """SGD on softmax regression in float64, the gradient written out, on all rows that are not left out."""
    first = Candidates(DIM, CLASSES, PROTOCOL, [rate], torch.full((len(labels),), NOT_HELD_OUT)).classifier(0)
    w, b = (value.detach().double().numpy().copy() for value in (first.weight, first.bias))
    v_w, v_b = np.zeros_like(w), np.zeros_like(b)
    for step, rows in enumerate(batches):
        rows = rows[~np.isin(rows, left_out)]
        p = np.exp(features[rows] @ w.T + b)
        p /= p.sum(1, keepdims=True)
        p[np.arange(len(rows)), labels[rows]] -= 1
        p /= len(rows)
        lr = PROTOCOL._replace(lr=rate).rate(step // (COUNT // PROTOCOL.batch_size))
        v_w, v_b = 0.9 * v_w + p.T @ features[rows], 0.9 * v_b + p.sum(0)
        w, b = w - lr * v_w, b - lr * v_b
    return w, b


def test_side_by_side_each_classifier_is_what_it_is_alone():
    """Against float64 by hand: each rate on all images, and on those that a fold leaves."""
    (features, labels), rates = points(0.5), (1.0, 0.1)
    folds = fold_of(labels.numpy())
    candidates = Candidates(DIM, CLASSES, PROTOCOL, rates, torch.from_numpy(folds))
    plan = Plan(RECIPE, np.ones((COUNT, 2), np.int32))
    list(candidates.descend(cached_batches(features, labels, plan, PROTOCOL.epochs), plan.steps_per_epoch))
    batches = [plan.samples(step) for step in range(PROTOCOL.epochs * plan.steps_per_epoch)]
    for number, rate in enumerate(rates):
        for fold in (NOT_HELD_OUT, *range(FOLDS)):
            left_out = np.flatnonzero(folds == fold) if fold != NOT_HELD_OUT else []
            w, b = alone(features.double().numpy(), labels.numpy(), batches, rate, left_out)
            if fold == NOT_HELD_OUT:
                whole = candidates.classifier(number)
                np.testing.assert_allclose(whole.weight.detach().numpy(), w, rtol=1e-4, atol=1e-5)
                continue
            rows = torch.from_numpy(left_out)
            said = candidates.held_out_logits(number, features[rows], rows)
            expected = features[rows].double().numpy() @ w.T + b
            np.testing.assert_allclose(said.numpy(), expected, rtol=1e-4, atol=1e-4)
            # The control: a classifier that was trained on them says something else.
            assert np.abs(whole(features[rows]).detach().numpy() - expected).max() > 0.01


def test_a_rate_that_diverges_leaves_the_others_as_they_are():
    features, labels = points(30.0)
    folds, plan = torch.from_numpy(fold_of(labels.numpy())), Plan(RECIPE, np.ones((COUNT, 2), np.int32))
    ends = []
    for rates in ((1e38, 1e-3), (1e-3,)):
        candidates = Candidates(DIM, CLASSES, PROTOCOL, rates, folds)
        list(candidates.descend(cached_batches(features, labels, plan, 2), plan.steps_per_epoch))
        ends.append(candidates.classifier(len(rates) - 1).weight)
        broken = candidates.classifier(0).weight
        assert torch.isfinite(broken).all() == (len(rates) == 1)
    assert torch.isfinite(ends[0]).all() and torch.equal(*ends)


def test_the_lowest_rate_within_a_standard_error_of_the_best_is_taken():
    choice = choose(*points(1.0), CLASSES, RECIPE, PROTOCOL)
    assert [each.lr for each in choice.tried] == list(RATES)
    best = max(each.top1 for each in choice.tried) / 100
    error = math.sqrt(best * (1 - best) / COUNT)
    near = [each.lr for each in choice.tried if each.top1 / 100 >= best - error]
    assert 1 < len(near) < len(RATES), "the rule decides nothing here"
    assert choice.lr == min(near)
    assert (choice.fitted, choice.held_out, choice.folds) == (320, 400, 5)


def test_the_choice_is_made_under_the_crops_that_the_probe_trains_on():
    """Features of random crops are ten times as long here as those of centre crops, which want a higher rate."""
    (train, labels), (val, _) = points(1.0), points(1.0, seed=1)
    plan = Plan(RECIPE, np.ones((COUNT, 2), np.int32))
    batches = [
        (10 * features, answer, images)
        for features, answer, images in cached_batches(train, labels, plan, PROTOCOL.epochs)
    ]
    candidates = Candidates(DIM, CLASSES, PROTOCOL, RATES, torch.from_numpy(fold_of(labels.numpy())))
    probes = fit(iter(batches), candidates, plan.steps_per_epoch, (val, labels))
    found = dict(zip(RATES, [probe.scores.top1 for probe in probes], strict=True))
    chosen = judge(candidates, train, labels, torch.arange(COUNT)).lr
    assert found[chosen] >= max(found.values()) - 2
    misled = choose(train, labels, CLASSES, RECIPE, PROTOCOL).lr
    assert misled > chosen and found[misled] < max(found.values()) - 10, "the control: centre crops choose as well"


def test_features_ten_times_as_long_want_a_rate_a_hundred_times_as_low():
    """Of softmax regression whose weights start near 0, the loss at rate r on s x equals that at r s^2 on x."""
    chosen = {scale: choose(*points(scale), CLASSES, RECIPE, PROTOCOL) for scale in (1.0, 10.0)}
    assert chosen[1.0].lr >= 10 * chosen[10.0].lr
    published = chosen[10.0].tried[0]
    taken = next(each for each in chosen[10.0].tried if each.lr == chosen[10.0].lr)
    assert published.loss > 5 * taken.loss, "the published rate does as well: nothing had to be chosen"


def test_of_rates_that_are_equally_good_the_lowest_is_taken():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 2
    features = torch.where(labels[:, None] == 0, 3.0, -3.0) + 0.01 * torch.randn(200, 4, generator=generator)
    choice = choose(features, labels, 2, RECIPE, PROTOCOL)
    assert {each.top1 for each in choice.tried} == {100.0}
    assert choice.lr == min(RATES)


def test_a_rate_that_diverges_is_the_worst_and_its_loss_is_no_number():
    choice = choose(*points(1e20), CLASSES, RECIPE, PROTOCOL)  # squares beyond float32
    assert any(each.loss is None for each in choice.tried)
    assert all(each.top1 == 0 for each in choice.tried if each.loss is None)
    text = json.dumps(choice.as_dict(), allow_nan=False)
    assert json.loads(text)["tried"][0]["lr"] == 30
    assert all(each.loss is None or math.isfinite(each.loss) for each in choice.tried)


def test_the_choice_is_one_line():
    said = str(choose(*points(3.0), CLASSES, RECIPE, PROTOCOL))
    assert "\n" not in said and "at 30, as published" in said
    assert "400 training images that were held out in 5 turns" in said
    assert "no class has two images" in str(Choice(30.0))
