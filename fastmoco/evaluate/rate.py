"""The learning rate of a probe, chosen on training images that are held out. Validation images have no part in it.

The published rate of 30 suits the features of a ResNet-50 trained on ImageNet. Which rate suits depends on the length
of the features, which differs from network to network by orders of magnitude. So each of a few rates trains a
classifier on four fifths of the training images, and the one with the best top-1 on the last fifth is taken. All are
trained on features of centre crops, whose length is that of the crops that the probe will see.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmoco.data.plan import Plan, hash_words
from fastmoco.evaluate.classifier import Protocol, cached_batches, descend, new_classifier
from fastmoco.evaluate.scores import score
from fastmoco.recipe import Recipe

RATES = (30.0, 10.0, 3.0, 1.0, 0.3, 0.1, 0.03)  # for batches of 256; the first one is the published one
FOLDS = 5  # parts of each class, one of which is held out at a time
ENOUGH = 10_000  # held-out images: top-1 on them has a standard error of at most half a point
MOST_IMAGES = 50_000  # more would choose no better, and take longer


class Tried(NamedTuple):
    """What a rate came to on the held-out images."""

    lr: float
    top1: float
    """Percent."""
    loss: float | None
    """Mean cross-entropy in nats; None where training diverged."""


class Choice(NamedTuple):
    """The rate that was chosen, and on what grounds."""

    lr: float
    fitted: int = 0
    """Images that each rate trained on, at a time."""
    held_out: int = 0
    """Images that it was judged by, over all folds."""
    folds: int = 1
    """Parts that were held out in turn."""
    tried: Sequence[Tried] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {**self._asdict(), "tried": [each._asdict() for each in self.tried]}

    def __str__(self) -> str:
        if not self.tried:
            return f"lr {self.lr:g}, as published: no class has two images, of which one could be held out to choose by"
        best = next(each for each in self.tried if each.lr == self.lr)
        first = self.tried[0]
        other = f" ({first.top1:.1f}% at {first.lr:g}, as published)" if first != best else ""
        rates = " ".join(f"{each.lr:g}" for each in self.tried)
        turns = f" in {self.folds} turns" if self.folds > 1 else ""
        return (
            f"lr {self.lr:g} chosen among {rates}: top-1 {best.top1:.1f}% on {self.held_out} training images that were "
            f"held out{turns}{other}"
        )


def looked_at(labels: np.ndarray) -> np.ndarray:
    """Indices, int64 and ascending, of the images of `labels` int64 [n] to choose by: all, or MOST_IMAGES of them."""
    return np.sort(_shuffled(labels))


def held_out_split(labels: np.ndarray, fold: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Indices, int64, of the images to fit and of those to judge by, of `labels` int64 [n].

    A pure function of the arguments: a fifth of each class, another one for each `fold` from 0 to 4. Of a class of two
    to four images one is held out, in as many folds as it has images, and of a class of one none. At most MOST_IMAGES
    are looked at.
    """
    drawn = _shuffled(labels)
    by_class = drawn[np.argsort(labels[drawn], kind="stable")]
    _, first, row, counts = np.unique(labels[by_class], return_index=True, return_inverse=True, return_counts=True)
    shares = np.where(counts > 1, np.maximum(counts // FOLDS, 1), 0)[row]
    place = np.arange(len(by_class)) - first[row]
    held = (place >= fold * shares) & (place < (fold + 1) * shares)
    return np.sort(by_class[~held]), np.sort(by_class[held])


def _shuffled(labels: np.ndarray) -> np.ndarray:
    return np.argsort(hash_words(np.arange(len(labels))), kind="stable")[:MOST_IMAGES]


def folds(labels: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """The splits of `held_out_split` in turn: all five, or as many as hold out ENOUGH images together.

    Empty where no class has two images.
    """
    splits: list[tuple[np.ndarray, np.ndarray]] = []
    while len(splits) < FOLDS and sum(len(held) for _, held in splits) < ENOUGH:
        fitted, held = held_out_split(labels, len(splits))
        if not len(held):
            break
        splits.append((fitted, held))
    return splits


def choose(features: Tensor, labels: Tensor, classes: int, recipe: Recipe, protocol: Protocol) -> Choice:
    """The best of RATES for the probe of `protocol` on features [n, F] with labels int64 [n].

    `recipe` is what `linear.training_recipe` returned: the order follows from it. Of rates with equal top-1 on what is
    held out, the one with the lower loss on it is taken. Where nothing can be held out it is the protocol's own rate.
    """
    splits = folds(labels.cpu().numpy())
    if not splits:
        return Choice(protocol.lr)
    tried = [_try(features, labels, splits, classes, recipe, protocol._replace(lr=rate)) for rate in RATES]
    best = max(tried, key=lambda each: (each.top1, -math.inf if each.loss is None else -each.loss))
    return Choice(best.lr, len(splits[0][0]), sum(len(held) for _, held in splits), len(splits), tried)


def _try(
    features: Tensor,
    labels: Tensor,
    splits: list[tuple[np.ndarray, np.ndarray]],
    classes: int,
    recipe: Recipe,
    protocol: Protocol,
) -> Tried:
    logits, answers = [], []
    for split in splits:
        fitted, held = (torch.from_numpy(rows).to(features.device) for rows in split)
        classifier = _train(features[fitted], labels[fitted], classes, recipe, protocol)
        with torch.no_grad():
            logits.append(classifier(features[held]))
        answers.append(labels[held])
    said, answer = torch.cat(logits), torch.cat(answers)
    loss = F.cross_entropy(said, answer).item()
    if not math.isfinite(loss):
        return Tried(protocol.lr, 0.0, None)
    return Tried(protocol.lr, score(said, answer).top1, loss)


def _train(features: Tensor, labels: Tensor, classes: int, recipe: Recipe, protocol: Protocol) -> nn.Linear:
    batch = min(protocol.batch_size, len(features))
    plan = Plan(dataclasses.replace(recipe, batch_size=batch), np.ones((len(features), 2), np.int32))
    classifier = new_classifier(features.shape[1], classes, protocol.seed, features.device)
    batches = cached_batches(features, labels, plan, protocol.epochs)
    protocol = protocol._replace(batch_size=batch)
    for _ in descend(batches, classifier, list(classifier.parameters()), protocol, plan.steps_per_epoch):
        pass
    return classifier
