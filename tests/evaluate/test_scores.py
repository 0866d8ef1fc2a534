"""Scores against scikit-learn's."""

import pytest
import torch
from sklearn.metrics import confusion_matrix, recall_score, top_k_accuracy_score

from fastmoco.evaluate.scores import score

CLASSES = 9


@pytest.fixture
def outcome():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, CLASSES, (500,), generator=generator)
    logits = torch.randn(500, CLASSES, generator=generator, dtype=torch.float64)
    logits[torch.arange(500), labels] += 1
    return logits, labels


def test_equals_scikit_learn(outcome):
    logits, labels = outcome
    actual, best = score(logits, labels), logits.argmax(1)
    assert actual.top1 == pytest.approx(100 * top_k_accuracy_score(labels, logits, k=1))
    assert actual.top5 == pytest.approx(100 * top_k_accuracy_score(labels, logits, k=5))
    assert actual.confusion.tolist() == confusion_matrix(labels, best).tolist()
    assert actual.per_class == pytest.approx((100 * recall_score(labels, best, average=None)).tolist())


def test_perfect_and_hopeless(outcome):
    _, labels = outcome
    right = torch.nn.functional.one_hot(labels, CLASSES).float()
    assert score(right, labels)[:2] == (100, 100) and score(right, labels).per_class == [100] * CLASSES
    wrong = torch.nn.functional.one_hot((labels + 1) % CLASSES, CLASSES).float()
    assert score(wrong, labels).top1 == 0


def test_classes_without_images_and_without_votes():
    votes = torch.tensor([[3.0, -torch.inf, 1.0], [2.0, -torch.inf, 1.0]])
    actual = score(votes, torch.tensor([0, 1]))
    assert (actual.top1, actual.top5) == (50, 50) and actual.per_class == [100, 0, None]
    assert actual.as_dict("abc")["per_class"] == {"a": 100, "b": 0, "c": None}
