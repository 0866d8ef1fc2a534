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
from torch import Tensor

from fastmoco.data.plan import Plan, hash_words
from fastmoco.evaluate.classifier import Protocol, cached_batches, descend, new_classifier
from fastmoco.evaluate.scores import score
from fastmoco.recipe import Recipe

RATES = (30.0, 10.0, 3.0, 1.0, 0.3, 0.1, 0.03)  # for batches of 256; the first one is the published one
HELD_OUT = 5  # one of so many images of a class
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
    """Images that each rate trained on."""
    held_out: int = 0
    """Images that it was judged by."""
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
        return (
            f"lr {self.lr:g} chosen among {rates}: top-1 {best.top1:.1f}% on {self.held_out} training images that were "
            f"held out{other}"
        )


def held_out_split(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices, int64, of the images to fit and of those to judge by, of `labels` int64 [n].

    A pure function of the labels: a fifth of each class, and at least one image of a class that has two or more. At
    most MOST_IMAGES are looked at.
    """
    drawn = np.argsort(hash_words(np.arange(len(labels))), kind="stable")[:MOST_IMAGES]
    by_class = drawn[np.argsort(labels[drawn], kind="stable")]
    _, first, row, counts = np.unique(labels[by_class], return_index=True, return_inverse=True, return_counts=True)
    shares = np.where(counts > 1, np.maximum(counts // HELD_OUT, 1), 0)
    held = np.arange(len(by_class)) - first[row] < shares[row]
    return np.sort(by_class[~held]), np.sort(by_class[held])


def choose(
    fitted: tuple[Tensor, Tensor], held: tuple[Tensor, Tensor], classes: int, recipe: Recipe, protocol: Protocol
) -> Choice:
    """The best of RATES for the probe of `protocol` on (features [n, F], labels [n]) of the two parts.

    `recipe` is what `linear.training_recipe` returned: the order follows from it. Of rates with equal
    top-1 on the second part, the one with the lower loss on it is taken.
    """
    batch = min(protocol.batch_size, len(fitted[0]))
    plan = Plan(dataclasses.replace(recipe, batch_size=batch), np.ones((len(fitted[0]), 2), np.int32))
    tried = [_try(fitted, held, classes, plan, protocol._replace(lr=rate, batch_size=batch)) for rate in RATES]
    best = max(tried, key=lambda each: (each.top1, -math.inf if each.loss is None else -each.loss))
    return Choice(best.lr, len(fitted[0]), len(held[0]), tried)


def _try(
    fitted: tuple[Tensor, Tensor], held: tuple[Tensor, Tensor], classes: int, plan: Plan, protocol: Protocol
) -> Tried:
    features, labels = fitted
    classifier = new_classifier(features.shape[1], classes, protocol.seed, features.device)
    batches = cached_batches(features, labels, plan, protocol.epochs)
    for _ in descend(batches, classifier, list(classifier.parameters()), protocol, plan.steps_per_epoch):
        pass
    with torch.no_grad():
        logits = classifier(held[0])
        loss = F.cross_entropy(logits, held[1]).item()
    if not math.isfinite(loss):
        return Tried(protocol.lr, 0.0, None)
    return Tried(protocol.lr, score(logits, held[1]).top1, loss)
