"""The rate of a probe: chosen on held-out training images, by the same training that the probe does."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from fastmoco.data.plan import Plan
from fastmoco.evaluate.classifier import Protocol, fit_cached
from fastmoco.evaluate.linear import training_recipe
from fastmoco.evaluate.rate import ENOUGH, FOLDS, RATES, Choice, choose, folds, held_out_split, looked_at
from fastmoco.presets import PRESETS

CLASSES, DIM, COUNT = 4, 8, 400
PROTOCOL = Protocol(epochs=10, batch_size=64)
RECIPE = training_recipe(replace(PRESETS["demo"][1], batch_size=8, bn_group=4, queue_size=16), PROTOCOL)


def points(scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy points about the centres of four classes, `scale` times as long, and their classes."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(CLASSES, DIM, generator=generator)
    labels = torch.arange(COUNT) % CLASSES
    return (centres[labels] + torch.randn(COUNT, DIM, generator=generator)) * scale, labels


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
    splits = folds(labels)
    assert len(splits) == FOLDS
    held = np.concatenate([held for _, held in splits])
    assert len(np.unique(held)) == len(held)
    expected = [count // FOLDS * FOLDS if count >= FOLDS else count if count > 1 else 0 for count in counts]
    np.testing.assert_array_equal(np.bincount(labels[held], minlength=len(counts)), expected)
    for fitted, held in splits:
        np.testing.assert_array_equal(np.sort(np.concatenate([fitted, held])), np.arange(len(labels)))
        assert set(labels[held]) <= set(labels[fitted]), "a class is judged that was not trained on"


@pytest.mark.parametrize(("count", "turns"), [(ENOUGH // 2, 5), (2 * ENOUGH, 3), (5 * ENOUGH, 1)])
def test_no_more_folds_than_it_takes_to_judge_by_enough_images(count, turns):
    splits = folds(np.arange(count) % 2)
    assert len(splits) == turns
    assert sum(len(held) for _, held in splits) >= min(ENOUGH, count)


def test_of_a_large_set_only_a_part_is_looked_at(monkeypatch):
    monkeypatch.setattr("fastmoco.evaluate.rate.MOST_IMAGES", 100)
    labels = np.arange(10_000) % 3
    fitted, held = held_out_split(labels)
    assert len(fitted) + len(held) == 100 and len(np.intersect1d(fitted, held)) == 0 and 17 <= len(held) <= 20
    np.testing.assert_array_equal(looked_at(labels), np.sort(np.concatenate([fitted, held])))


def test_each_rate_is_judged_by_the_training_that_the_probe_does():
    features, labels = points(1.0)
    choice = choose(features, labels, CLASSES, RECIPE, PROTOCOL)
    plan = Plan(RECIPE, np.ones((320, 2), np.int32))
    for tried in choice.tried:
        protocol, right = PROTOCOL._replace(lr=tried.lr), []
        for fitted, held in folds(labels.numpy()):
            parts = [(features[rows], labels[rows]) for rows in (fitted, held)]
            right.append(fit_cached(*parts, CLASSES, plan, protocol).scores.top1)
        assert np.mean(right) == pytest.approx(tried.top1, abs=1e-9), tried
    assert [each.lr for each in choice.tried] == list(RATES)
    best = max(each.top1 for each in choice.tried)
    assert next(each.top1 for each in choice.tried if each.lr == choice.lr) == best
    assert (choice.fitted, choice.held_out, choice.folds) == (320, 400, 5)


def test_features_ten_times_as_long_want_a_rate_a_hundred_times_as_low():
    """Of softmax regression whose weights start near 0, the loss at rate r on s x equals that at r s^2 on x."""
    chosen = {scale: choose(*points(scale), CLASSES, RECIPE, PROTOCOL) for scale in (0.3, 3.0)}
    assert chosen[0.3].lr >= 10 * chosen[3.0].lr
    published = chosen[3.0].tried[0]
    taken = next(each for each in chosen[3.0].tried if each.lr == chosen[3.0].lr)
    assert published.loss > 10 * taken.loss, "the published rate does as well: nothing had to be chosen"


def test_equal_accuracies_leave_it_to_the_loss():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 2
    features = torch.where(labels[:, None] == 0, 3.0, -3.0) + 0.01 * torch.randn(200, 4, generator=generator)
    choice = choose(features, labels, 2, RECIPE, PROTOCOL)
    assert {each.top1 for each in choice.tried} == {100.0}
    assert choice.lr == min(choice.tried, key=lambda each: each.loss).lr


def test_a_rate_that_diverges_is_the_worst_and_its_loss_is_no_number():
    choice = choose(*points(1e19), CLASSES, RECIPE, PROTOCOL)  # squares beyond float32
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
