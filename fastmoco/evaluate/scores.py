"""What a classifier got right: accuracies, each class's own, and who was taken for whom."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Scores(NamedTuple):
    """Figures of a classifier on labelled images."""

    top1: float
    """Percent of images whose class scores highest."""
    top5: float
    """Percent of images whose class is among the five highest."""
    per_class: list[float | None]
    """Top-1 of each class's images, in percent; None if there are none."""
    confusion: Tensor
    """int64 [C, C]: images of class row that were taken for class column."""

    def as_dict(self, classes: Sequence[str]) -> dict[str, Any]:
        """Plain data, with the classes by name."""
        by_class = dict(zip(classes, self.per_class, strict=True))
        return {"top1": self.top1, "top5": self.top5, "per_class": by_class, "confusion": self.confusion.tolist()}


def score(logits: Tensor, labels: Tensor) -> Scores:
    """Scores of `logits` [m, C] for `labels` int64 [m]; a class at minus infinity is no candidate."""
    classes = logits.shape[1]
    values, best = logits.topk(min(5, classes), dim=1)
    right = (best == labels[:, None]) & (values > -torch.inf)
    confusion = torch.bincount(labels * classes + best[:, 0], minlength=classes * classes).reshape(classes, classes)
    confusion = confusion.cpu()
    counts, hits = confusion.sum(1).tolist(), confusion.diagonal().tolist()
    per_class = [100 * hit / count if count else None for hit, count in zip(hits, counts, strict=True)]
    top1, top5 = (100 * share.double().mean().item() for share in (right[:, 0], right.any(1)))
    return Scores(top1, top5, per_class, confusion)
