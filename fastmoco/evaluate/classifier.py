"""A linear classifier and how it is trained: SGD whose rate drops twice, on batches or on features kept in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmoco.data.plan import Plan
from fastmoco.evaluate.scores import Scores, score

REFERENCE_BATCH = 256
DROPS = (0.6, 0.8)  # shares of the epochs after which the rate is divided by ten: 60 and 80 of 100
CLASSIFIER_STD = 0.01

Batches = Iterator[tuple[Tensor, Tensor]]


class Protocol(NamedTuple):
    """How the classifier is trained; the defaults are the published linear probe's."""

    lr: float = 30.0
    """For batches of 256."""
    momentum: float = 0.9
    weight_decay: float = 0.0
    epochs: int = 100
    batch_size: int = 256
    seed: int = 0

    def rate(self, epoch: int) -> float:
        """Learning rate in `epoch`, counted from 0."""
        drops = sum(epoch >= round(share * self.epochs) for share in DROPS)
        return self.lr * self.batch_size / REFERENCE_BATCH * 0.1**drops


class Probe(NamedTuple):
    """A trained classifier and how it came about."""

    classifier: nn.Linear
    curve: list[dict[str, float]]
    """For each epoch: epoch, lr, loss of training, top1 and top5 of validation."""
    scores: Scores
    """Of the last epoch."""


def new_classifier(features: int, classes: int, seed: int, device: torch.device) -> nn.Linear:
    """Weights from N(0, 0.01), bias 0: a pure function of the seed."""
    classifier = nn.Linear(features, classes)
    generator = torch.Generator().manual_seed(seed)
    nn.init.normal_(classifier.weight, std=CLASSIFIER_STD, generator=generator)
    nn.init.zeros_(classifier.bias)
    return classifier.to(device)


def descend(
    batches: Batches,
    classifier: nn.Linear,
    parameters: list[nn.Parameter],
    protocol: Protocol,
    steps_per_epoch: int,
) -> Iterator[float]:
    """Train `classifier`, and whatever else is among `parameters`, on (features [N, F], labels [N]).

    Yields the mean loss of every epoch, in nats, when the epoch ends.
    """
    optimizer = torch.optim.SGD(
        parameters, protocol.rate(0), momentum=protocol.momentum, weight_decay=protocol.weight_decay
    )
    total = torch.zeros((), device=classifier.weight.device)
    for step, (features, labels) in enumerate(batches):
        optimizer.param_groups[0]["lr"] = protocol.rate(step // steps_per_epoch)
        loss = F.cross_entropy(classifier(features), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.detach()
        if (step + 1) % steps_per_epoch == 0:
            yield total.item() / steps_per_epoch
            total.zero_()


def fit(
    batches: Batches,
    classifier: nn.Linear,
    parameters: list[nn.Parameter],
    protocol: Protocol,
    steps_per_epoch: int,
    validate: Callable[[], Scores],
    report: Callable[[dict[str, float]], Any] = lambda line: None,
) -> Probe:
    """Train as `descend` does, and validate after every epoch; `report` is called with each line of the curve."""
    curve: list[dict[str, float]] = []
    scores = validate()
    for epoch, loss in enumerate(descend(batches, classifier, parameters, protocol, steps_per_epoch)):
        scores = validate()
        figures = {"loss": loss, "top1": scores.top1, "top5": scores.top5}
        curve.append({"epoch": epoch + 1, "lr": protocol.rate(epoch), **figures})
        report(curve[-1])
    return Probe(classifier, curve, scores)


def cached_batches(features: Tensor, labels: Tensor, plan: Plan, epochs: int) -> Batches:
    """Rows of features [n, F] and labels [n] in the plan's order."""
    for step in range(epochs * plan.steps_per_epoch):
        rows = torch.from_numpy(plan.samples(step)).to(features.device)
        yield features[rows], labels[rows]


def fit_cached(
    train: tuple[Tensor, Tensor],
    val: tuple[Tensor, Tensor],
    classes: int,
    plan: Plan,
    protocol: Protocol,
    report: Callable[[dict[str, float]], Any] = lambda line: None,
) -> Probe:
    """Train a classifier on (features [n, F], labels [n]) in the plan's order; the features stay as they are."""
    features, labels = train
    classifier = new_classifier(features.shape[1], classes, protocol.seed, features.device)

    def validate() -> Scores:
        with torch.no_grad():
            return score(classifier(val[0]), val[1])

    batches = cached_batches(features, labels, plan, protocol.epochs)
    return fit(batches, classifier, list(classifier.parameters()), protocol, plan.steps_per_epoch, validate, report)
