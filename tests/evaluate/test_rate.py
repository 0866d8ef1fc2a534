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
from fastmoco.evaluate.rate import HELD_OUT, RATES, Choice, choose, held_out_split
from fastmoco.presets import PRESETS

CLASSES, DIM, COUNT = 4, 8, 400
PROTOCOL = Protocol(epochs=10, batch_size=64)
RECIPE = training_recipe(replace(PRESETS["demo"][1], batch_size=8, bn_group=4, queue_size=16), PROTOCOL)
Part = tuple[torch.Tensor, torch.Tensor]


def parts(scale: float) -> tuple[Part, Part]:
    """Two parts of noisy points about the centres of four classes, `scale` times as long."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(CLASSES, DIM, generator=generator)
    labels = torch.arange(COUNT) % CLASSES
    points = (centres[labels] + torch.randn(COUNT, DIM, generator=generator)) * scale
    fitted, held = map(torch.from_numpy, held_out_split(labels.numpy()))
    return (points[fitted], labels[fitted]), (points[held], labels[held])


@pytest.mark.parametrize("counts", [[50, 50], [1, 2, 3, 4, 5, 6], [1000, 1, 7], [1, 1, 1]])
def test_a_fifth_of_each_class_is_held_out(counts):
    labels = np.random.RandomState(0).permutation(np.repeat(np.arange(len(counts)), counts))
    fitted, held = held_out_split(labels)
    np.testing.assert_array_equal(np.sort(np.concatenate([fitted, held])), np.arange(len(labels)))
    for number, count in enumerate(counts):
        expected = max(count // HELD_OUT, 1) if count > 1 else 0
        assert (labels[held] == number).sum() == expected
    again = held_out_split(labels.copy())
    np.testing.assert_array_equal(held, again[1])
    if len(held) > 20:  # all over the set, not its end
        assert held.min() < len(labels) / 5 and held.max() > 4 * len(labels) / 5


def test_of_a_large_set_only_a_part_is_looked_at(monkeypatch):
    monkeypatch.setattr("fastmoco.evaluate.rate.MOST_IMAGES", 100)
    labels = np.arange(10_000) % 3
    fitted, held = held_out_split(labels)
    assert len(fitted) + len(held) == 100 and len(np.intersect1d(fitted, held)) == 0 and 17 <= len(held) <= 20


def test_each_rate_is_judged_by_the_training_that_the_probe_does():
    fitted, held = parts(1.0)
    choice = choose(fitted, held, CLASSES, RECIPE, PROTOCOL)
    plan = Plan(RECIPE, np.ones((len(fitted[0]), 2), np.int32))
    for tried in choice.tried:
        probe = fit_cached(fitted, held, CLASSES, plan, PROTOCOL._replace(lr=tried.lr))
        assert probe.scores.top1 == tried.top1, tried
    assert [each.lr for each in choice.tried] == list(RATES)
    best = max(each.top1 for each in choice.tried)
    assert next(each.top1 for each in choice.tried if each.lr == choice.lr) == best
    assert (choice.fitted, choice.held_out) == (len(fitted[0]), len(held[0])) == (320, 80)


def test_features_ten_times_as_long_want_a_rate_a_hundred_times_as_low():
    """Of softmax regression whose weights start near 0, the loss at rate r on s x equals that at r s^2 on x."""
    chosen = {scale: choose(*parts(scale), CLASSES, RECIPE, PROTOCOL) for scale in (0.3, 3.0)}
    assert chosen[0.3].lr >= 10 * chosen[3.0].lr
    published = chosen[3.0].tried[0]
    taken = next(each for each in chosen[3.0].tried if each.lr == chosen[3.0].lr)
    assert taken.top1 > published.top1 + 2, "the published rate does as well: nothing had to be chosen"


def test_equal_accuracies_leave_it_to_the_loss():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 2
    points = torch.where(labels[:, None] == 0, 3.0, -3.0) + 0.01 * torch.randn(200, 4, generator=generator)
    choice = choose((points[:160], labels[:160]), (points[160:], labels[160:]), 2, RECIPE, PROTOCOL)
    assert {each.top1 for each in choice.tried} == {100.0}
    assert choice.lr == min(choice.tried, key=lambda each: each.loss).lr


def test_a_rate_that_diverges_is_the_worst_and_its_loss_is_no_number():
    fitted, held = parts(1e19)  # squares beyond float32
    choice = choose(fitted, held, CLASSES, RECIPE, PROTOCOL)
    assert any(each.loss is None for each in choice.tried)
    assert all(each.top1 == 0 for each in choice.tried if each.loss is None)
    text = json.dumps(choice.as_dict(), allow_nan=False)
    assert json.loads(text)["tried"][0]["lr"] == 30
    assert all(each.loss is None or math.isfinite(each.loss) for each in choice.tried)


def test_the_choice_is_one_line():
    said = str(choose(*parts(3.0), CLASSES, RECIPE, PROTOCOL))
    assert "\n" not in said and "80 training images that were held out" in said and "at 30, as published" in said
    assert "no class has two images" in str(Choice(30.0))
