"""Average precision of detections, as PASCAL VOC defines it and detectron2 computes it (pascal_voc_evaluation.py).

Boxes are compared as whole pixels, both ends included, so a box from 10 to 20 is 11 wide. A detection is right where it
overlaps an object of its class by more than the threshold and no better-scored detection has taken that object; the
object is the one it overlaps most, taken or not. Objects marked difficult count neither way. AP of VOC 2007 is the mean
of the best precision at recalls 0, 0.1 .. 1 (Everingham et al., 2010, equation 2); later years take the area under the
curve. AP is the mean over the thresholds 0.50, 0.55 .. 0.95, AP50 and AP75 are those at 0.5 and 0.75. This is not what
pycocotools computes: it takes 101 recalls, boxes without the extra pixel, and the best object that is still free.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

THRESHOLDS = tuple(range(50, 100, 5))
RECALLS = np.arange(0.0, 1.1, 0.1)


class Objects(NamedTuple):
    """What an image shows."""

    boxes: np.ndarray
    """float [n, 4]: xmin, ymin, xmax, ymax in pixels, counted from 1 as in the files."""
    labels: np.ndarray
    """int64 [n]: classes from 0."""
    difficult: np.ndarray
    """bool [n]."""


class Detections(NamedTuple):
    """What a detector found in an image."""

    boxes: np.ndarray
    """float [n, 4], as those of objects."""
    labels: np.ndarray
    """int64 [n]."""
    scores: np.ndarray
    """float [n]."""


def evaluate(
    truth: list[Objects], detections: list[Detections], classes: int, eleven_points: bool = True
) -> dict[str, float | list[float | None]]:
    """AP, AP50 and AP75 in percent over `classes`, and AP50 of each class (None where no image shows it).

    `truth` and `detections` hold an entry for each image. Scores are taken to three decimals and corners to one, as in
    the files that the reference program reads; equal scores keep their order.
    """
    table = np.full((len(THRESHOLDS), classes), np.nan)
    for label in range(classes):
        marks, objects = _match(truth, detections, label)
        if objects:
            table[:, label] = [100 * _precision(right, wrong, objects, eleven_points) for right, wrong in marks]
    present = ~np.isnan(table).all(0)
    means = table[:, present].mean(1) if present.any() else np.zeros(len(THRESHOLDS))
    per_class = [None if np.isnan(value) else float(value) for value in table[0]]
    ap75 = float(means[THRESHOLDS.index(75)])
    return {"AP": float(means.mean()), "AP50": float(means[0]), "AP75": ap75, "AP50_per_class": per_class}


def overlaps(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Intersection over union of `box` [4] with each of `boxes` [n, 4], in whole pixels with both ends."""
    low, high = np.maximum(boxes[:, :2], box[:2]), np.minimum(boxes[:, 2:], box[2:])
    shared = np.maximum(high - low + 1, 0).prod(1)
    areas = (boxes[:, 2:] - boxes[:, :2] + 1).prod(1)
    return shared / ((box[2:] - box[:2] + 1).prod() + areas - shared)


def average_precision(recall: np.ndarray, precision: np.ndarray, eleven_points: bool = True) -> float:
    """AP, 0 to 1, of a curve: recall and precision after each detection, the best-scored first."""
    if eleven_points:
        best = [precision[recall >= at].max(initial=0) for at in RECALLS]
        return float(np.sum(best) / 11)
    recall = np.concatenate([[0.0], recall, [1.0]])
    envelope = np.maximum.accumulate(np.concatenate([[0.0], precision, [0.0]])[::-1])[::-1]
    steps = np.flatnonzero(np.diff(recall))
    return float(((recall[steps + 1] - recall[steps]) * envelope[steps + 1]).sum())


def _match(
    truth: list[Objects], detections: list[Detections], label: int
) -> tuple[list[tuple[np.ndarray, np.ndarray]], int]:
    """For each threshold whether the detections of a class, best first, are right and wrong; objects to be found."""
    of_class = [objects.labels == label for objects in truth]
    boxes = [objects.boxes[mine].astype(np.float64) for objects, mine in zip(truth, of_class, strict=True)]
    difficult = [objects.difficult[mine] for objects, mine in zip(truth, of_class, strict=True)]
    rows = [
        (round(float(score), 3), image, np.round(box.astype(np.float64), 1))
        for image, each in enumerate(detections)
        for box, score in zip(each.boxes[each.labels == label], each.scores[each.labels == label], strict=True)
    ]
    rows.sort(key=lambda row: -row[0])
    best = [_best(box, boxes[image]) for _, image, box in rows]
    marks = []
    for percent in THRESHOLDS:
        right, wrong = np.zeros(len(rows)), np.zeros(len(rows))
        claimed = [np.zeros(len(each), bool) for each in boxes]
        for row, ((_, image, _), (overlap, which)) in enumerate(zip(rows, best, strict=True)):
            if overlap <= percent / 100:
                wrong[row] = 1
            elif not difficult[image][which]:
                right[row], wrong[row] = not claimed[image][which], claimed[image][which]
                claimed[image][which] = True
        marks.append((right, wrong))
    return marks, int(sum((~each).sum() for each in difficult))


def _best(box: np.ndarray, boxes: np.ndarray) -> tuple[float, int]:
    if not len(boxes):
        return -np.inf, -1
    shared = overlaps(box, boxes)
    return float(shared.max()), int(shared.argmax())


def _precision(right: np.ndarray, wrong: np.ndarray, objects: int, eleven_points: bool) -> float:
    hits, misses = right.cumsum(), wrong.cumsum()
    precision = hits / np.maximum(hits + misses, np.finfo(np.float64).eps)
    return average_precision(hits / objects, precision, eleven_points)
