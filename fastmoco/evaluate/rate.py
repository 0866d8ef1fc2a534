"""The learning rate of a probe, chosen on training images that are held out. Validation images have no part in it.

The published rate of 30 suits the features of a ResNet-50 trained on ImageNet. Which rate suits depends on the length
of the features, which differs from network to network by orders of magnitude, and on the crops: what a rate comes to
on centre crops says little of what it comes to on random ones. So all rates are trained side by side on the very
batches of the probe (`classifier.Candidates`), for its whole length, and each training image is judged, by its centre
crop, by a classifier that was not trained on it.

Rates whose top-1 differs by less than its standard error are not told apart by the images that are held out. Of those
the lowest is taken: its classifier has the shortest weights. (The rule of one standard error: Breiman, Friedman, Olshen
and Stone, Classification and Regression Trees, 1984, section 3.4.3.)
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
from fastmoco.evaluate.classifier import NOT_HELD_OUT, Candidates, Protocol, cached_batches
from fastmoco.recipe import Recipe

RATES = (30.0, 10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003)  # for batches of 256; the first one is the published one
FOLDS = 5  # parts of each class, one of which is held out at a time
ENOUGH = 10_000  # held-out images: top-1 on them has a standard error of at most half a point
MOST_IMAGES = 50_000  # more would choose no better where a trial takes time of its own


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
        taken = next(each for each in self.tried if each.lr == self.lr)
        best, first = max(self.tried, key=lambda each: each.top1), self.tried[0]
        others = [f"{best.top1:.1f}% at {best.lr:g}, no clear difference"] if best.top1 > taken.top1 else []
        others += [f"{first.top1:.1f}% at {first.lr:g}, as published"] if first not in (best, taken) else []
        said = f" ({'; '.join(others)})" if others else ""
        rates = " ".join(f"{each.lr:g}" for each in self.tried)
        turns = f" in {self.folds} turns" if self.folds > 1 else ""
        return (
            f"lr {self.lr:g} chosen among {rates}: top-1 {taken.top1:.1f}% on {self.held_out} training images that "
            f"were held out{turns}{said}"
        )


def looked_at(labels: np.ndarray) -> np.ndarray:
    """Indices, int64 and ascending, of the images of `labels` int64 [n] to choose by: all, or MOST_IMAGES of them."""
    return np.sort(_shuffled(len(labels))[:MOST_IMAGES])


def fold_of(labels: np.ndarray) -> np.ndarray:
    """The fold, int64 [n], that holds each image of `labels` int64 [n] out, or NOT_HELD_OUT. A pure function of both.

    A fold is a fifth of each class; of more than 50,000 images it is a smaller share, about ENOUGH images. Of a class
    of two to four images a fold holds out one, in as many folds as it has images, and of a class of one none. There are
    five folds, or as many as hold out ENOUGH images together.
    """
    drawn = _shuffled(len(labels))
    by_class = drawn[np.argsort(labels[drawn], kind="stable")]
    _, first, row, counts = np.unique(labels[by_class], return_index=True, return_inverse=True, return_counts=True)
    shares = np.maximum(counts // max(FOLDS, len(labels) // ENOUGH), 1)[row]
    place = (np.arange(len(by_class)) - first[row]) // shares
    folds = np.empty_like(place)
    folds[by_class] = np.where((place < FOLDS) & (counts > 1)[row], place, NOT_HELD_OUT)
    together = np.bincount(folds[folds >= 0], minlength=FOLDS).cumsum()
    folds[folds > np.searchsorted(together, ENOUGH)] = NOT_HELD_OUT
    return folds


def held_out_split(labels: np.ndarray, fold: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Indices, int64, of the images to fit and of those of `fold`, to judge by, of `labels` int64 [n].

    At most MOST_IMAGES are looked at.
    """
    rows = looked_at(labels)
    held = fold_of(labels[rows]) == fold
    return rows[~held], rows[held]


def _shuffled(count: int) -> np.ndarray:
    return np.argsort(hash_words(np.arange(count)), kind="stable")


def choose(features: Tensor, labels: Tensor, classes: int, recipe: Recipe, protocol: Protocol) -> Choice:
    """The rate of RATES for the probe of `protocol` on features [n, F] with labels int64 [n].

    `recipe` is what `linear.training_recipe` returned: the order follows from it. Where nothing can be held out, the
    rate is the protocol's own.
    """
    folds = torch.from_numpy(fold_of(labels.cpu().numpy())).to(features.device)
    held = (folds != NOT_HELD_OUT).nonzero()[:, 0]
    if not len(held):
        return Choice(protocol.lr)
    protocol = protocol._replace(batch_size=min(protocol.batch_size, len(features)))
    plan = Plan(dataclasses.replace(recipe, batch_size=protocol.batch_size), np.ones((len(features), 2), np.int32))
    candidates = Candidates(features.shape[1], classes, protocol, RATES, folds)
    for _ in candidates.descend(cached_batches(features, labels, plan, protocol.epochs), plan.steps_per_epoch):
        pass
    return judge(candidates, features[held], labels[held], held)


def judge(candidates: Candidates, features: Tensor, labels: Tensor, images: Tensor) -> Choice:
    """The rate to take by what the candidates make of features [m, F], labels int64 [m], of the `images` int64 [m].

    These are all that the folds hold out. It is the lowest of the rates whose top-1 is within one standard error of the
    best one's.
    """
    tried = []
    for number, lr in enumerate(candidates.rates):
        logits = candidates.held_out_logits(number, features, images)
        loss = F.cross_entropy(logits, labels).item()
        finite = math.isfinite(loss)
        top1 = 100 * (logits.argmax(1) == labels).double().mean().item() if finite else 0.0
        tried.append(Tried(lr, top1, loss if finite else None))
    folds = len(candidates.parts) - 1
    count = len(candidates.fold_of)
    return Choice(_lowest_of_the_best(tried, len(images)), count - len(images) // folds, len(images), folds, tried)


def _lowest_of_the_best(tried: Sequence[Tried], count: int) -> float:
    share = max(each.top1 for each in tried) / 100
    error = math.sqrt(share * (1 - share) / count)
    good = [each.lr for each in tried if each.top1 / 100 >= share - error and each.loss is not None]
    return min(good, default=min(each.lr for each in tried))
