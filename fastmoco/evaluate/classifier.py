"""Linear classifiers and how they are trained: by SGD whose rate drops twice, several rates side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmoco.data.plan import Plan
from fastmoco.evaluate.scores import Scores, score

REFERENCE_BATCH = 256
DROPS = (0.6, 0.8)  # shares of the epochs after which the rate is divided by ten: 60 and 80 of 100
CLASSIFIER_STD = 0.01
NOT_HELD_OUT, EVERY_IMAGE = -1, -2  # an image that no fold holds out; the part that is trained on every image

Batches = Iterator[tuple[Tensor, Tensor, Tensor]]  # features [N, F], labels [N], indices of the images [N]
Report = Callable[[list[dict[str, float]]], Any]


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


class Candidates:
    """Linear classifiers of R learning rates, which are trained side by side on the same features.

    Each rate has one classifier that is trained on every image and, for each fold, one that is not trained on the
    images of that fold, so that these can judge it. Features cost far more than classifiers do, so a grid of rates
    takes little longer than one rate. (DINOv2, Oquab et al., 2023, trains the grid of its linear probe so, too.)
    """

    def __init__(
        self, features: int, classes: int, protocol: Protocol, rates: Sequence[float], fold_of: Tensor
    ) -> None:
        """`fold_of` int64 [n], on the device: the fold, from 0, that holds an image out, or NOT_HELD_OUT."""
        self.rates, self.protocol, self.classes, self.fold_of = tuple(rates), protocol, classes, fold_of
        folds = int(fold_of.max()) + 1
        self.parts = torch.tensor([EVERY_IMAGE, *range(folds)], device=fold_of.device)
        first = new_classifier(features, classes, protocol.seed, fold_of.device)
        self.linears = [_copies(first, len(self.parts)) for _ in self.rates]
        groups = [{"params": list(linear.parameters())} for linear in self.linears]
        decay = protocol.weight_decay
        self.optimizer = torch.optim.SGD(groups, lr=0.0, momentum=protocol.momentum, weight_decay=decay)

    def descend(self, batches: Batches, steps_per_epoch: int) -> Iterator[list[float]]:
        """Train. Yields the mean losses [R] of every epoch, in nats, of the classifiers trained on every image."""
        total = torch.zeros(len(self.rates), device=self.fold_of.device)
        for step, batch in enumerate(batches):
            total += self.step(*batch, step // steps_per_epoch)
            if (step + 1) % steps_per_epoch == 0:
                yield (total / steps_per_epoch).tolist()
                total.zero_()

    def step(self, features: Tensor, labels: Tensor, images: Tensor, epoch: int) -> Tensor:
        """One step on features [N, F] with labels int64 [N] of the images with these indices, int64 [N].

        Returns the losses [R] of the classifiers that are trained on every image.
        """
        for group, lr in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = self.protocol._replace(lr=lr).rate(epoch)
        fitted = self.parts != self.fold_of[images, None]
        weights = fitted / fitted.sum(0).clamp(min=1)  # [N, parts]: the mean over the images that a part is trained on
        losses = torch.stack([self._losses(linear, features, labels, weights) for linear in self.linears])
        self.optimizer.zero_grad()
        losses.sum().backward()  # each classifier has its own term
        self.optimizer.step()
        return losses.detach()[:, 0]

    def _losses(self, linear: nn.Linear, features: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        logits = linear(features).reshape(-1, self.classes)
        each = F.cross_entropy(logits, labels.repeat_interleave(len(self.parts)), reduction="none")
        return (each.reshape(weights.shape) * weights).sum(0)

    def classifier(self, number: int) -> nn.Linear:
        """The one of rate `number` that is trained on every image."""
        own = nn.Linear(self.linears[number].in_features, self.classes).to(self.fold_of.device)
        with torch.no_grad():
            own.weight.copy_(self.linears[number].weight[: self.classes])
            own.bias.copy_(self.linears[number].bias[: self.classes])
        return own

    @torch.no_grad()
    def held_out_logits(self, number: int, features: Tensor, images: Tensor) -> Tensor:
        """Logits [m, C] of rate `number` for features [m, F] of `images` int64 [m], which folds hold out.

        Those of an image come from the classifier of its fold, which was not trained on it.
        """
        logits = self.linears[number](features).reshape(len(features), len(self.parts), self.classes)
        return logits[torch.arange(len(features), device=images.device), 1 + self.fold_of[images]]


def _copies(first: nn.Linear, count: int) -> nn.Linear:
    several = nn.Linear(first.in_features, count * first.out_features).to(first.weight.device)
    with torch.no_grad():
        several.weight.copy_(first.weight.repeat(count, 1))
        several.bias.copy_(first.bias.repeat(count))
    return several


def fit(
    batches: Batches,
    candidates: Candidates,
    steps_per_epoch: int,
    val: tuple[Tensor, Tensor],
    report: Report = lambda lines: None,
) -> list[Probe]:
    """Train the candidates, and judge by `val`, (features [m, F], labels [m]), after every epoch.

    Returns a probe for each rate, trained on every image. `report` is called with the last line of each one's curve.
    """
    curves: list[list[dict[str, float]]] = [[] for _ in candidates.rates]
    scores: list[Scores] = []
    for epoch, losses in enumerate(candidates.descend(batches, steps_per_epoch)):
        scores = [_score(candidates.classifier(number), *val) for number in range(len(curves))]
        for curve, lr, loss, found in zip(curves, candidates.rates, losses, scores, strict=True):
            rate = candidates.protocol._replace(lr=lr).rate(epoch)
            curve.append({"epoch": epoch + 1, "lr": rate, "loss": loss, "top1": found.top1, "top5": found.top5})
        report([curve[-1] for curve in curves])
    classifiers = [candidates.classifier(number) for number in range(len(curves))]
    return [Probe(*each) for each in zip(classifiers, curves, scores, strict=True)]


@torch.no_grad()
def _score(classifier: nn.Linear, features: Tensor, labels: Tensor) -> Scores:
    return score(classifier(features), labels)


def cached_batches(features: Tensor, labels: Tensor, plan: Plan, epochs: int) -> Batches:
    """Rows of features [n, F] and labels [n] in the plan's order, and which rows they are."""
    for step in range(epochs * plan.steps_per_epoch):
        rows = torch.from_numpy(plan.samples(step)).to(features.device)
        yield features[rows], labels[rows], rows


def nothing_held_out(count: int, device: torch.device) -> Tensor:
    """The folds of `count` images of which none is held out."""
    return torch.full((count,), NOT_HELD_OUT, device=device)


def fit_cached(
    train: tuple[Tensor, Tensor],
    val: tuple[Tensor, Tensor],
    classes: int,
    plan: Plan,
    protocol: Protocol,
    report: Report = lambda lines: None,
) -> Probe:
    """Train a classifier on (features [n, F], labels [n]) in the plan's order; the features stay as they are."""
    features, labels = train
    alone = nothing_held_out(len(features), features.device)
    candidates = Candidates(features.shape[1], classes, protocol, [protocol.lr], alone)
    batches = cached_batches(features, labels, plan, protocol.epochs)
    return fit(batches, candidates, plan.steps_per_epoch, val, report)[0]
