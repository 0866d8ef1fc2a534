"""Weighted kNN against scikit-learn and a float64 loop; what it must and must not find."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.neighbors import KNeighborsClassifier

from fastmoco.evaluate import knn, neighbours
from fastmoco.evaluate.knn import kept_as, knn_accuracy, knn_votes

CLASSES = 7


def points(n: int, seed: int, spread: float = 1.0, dim: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    centres = torch.randn(CLASSES, dim, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % CLASSES
    return F.normalize(centres[labels] + spread * torch.randn(n, dim, generator=generator), dim=1), labels


def loop_votes(bank, labels, query, k, temperature) -> list[float]:
    """One query by plain float64 loops."""
    scored = sorted(
        ((math.fsum(a * b for a, b in zip(row, query)), label) for row, label in zip(bank, labels)), reverse=True
    )
    votes = [0.0] * CLASSES
    for similarity, label in scored[:k]:
        votes[label] += math.exp(similarity / temperature)
    return votes


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.1), (20, 0.1), (200, 0.1), (50, 0.02)])
def test_equals_a_float64_loop_on_500_points(k, temperature):
    (bank, bank_labels), (queries, labels) = points(400, 1, 2.0), points(100, 2, 2.0)
    rows, names = bank.double().tolist(), bank_labels.tolist()
    expected = [loop_votes(rows, names, query, k, temperature) for query in queries.double().tolist()]
    votes = knn_votes(bank.double(), bank_labels, queries.double(), k, temperature, CLASSES)
    shares = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(votes / votes.sum(1, True), shares / shares.sum(1, True), rtol=1e-10, atol=1e-12)
    order = [[c for c in sorted(range(CLASSES), key=lambda c: -row[c])[:5] if row[c] > 0] for row in expected]
    top1 = sum(best[0] == label for best, label in zip(order, labels.tolist()))
    top5 = sum(label in best for best, label in zip(order, labels.tolist()))
    assert knn_accuracy(bank, bank_labels, queries, labels, k, temperature, CLASSES) == (float(top1), float(top5))


def test_equals_scikit_learn(k=30, temperature=0.1):
    (bank, bank_labels), (queries, labels) = points(400, 3, 2.0), points(100, 4, 2.0)
    oracle = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / temperature))
    shares = torch.from_numpy(oracle.fit(bank.numpy(), bank_labels.numpy()).predict_proba(queries.numpy()))
    top1 = (shares.argmax(1) == labels).double().mean().item() * 100
    assert 20 < top1 < 95, "the points decide nothing"
    assert knn_accuracy(bank, bank_labels, queries, labels, k, temperature, CLASSES)[0] == pytest.approx(top1)


def test_separable_classes_are_found_and_shuffled_labels_are_not():
    (bank, bank_labels), (queries, labels) = points(2100, 5, 0.05), points(1400, 6, 0.05)
    assert knn_accuracy(bank, bank_labels, queries, labels, 20, 0.1, CLASSES) == (100.0, 100.0)
    (bank, _), (queries, _) = points(2100, 5, 2.0), points(1400, 6, 2.0)
    generator = torch.Generator().manual_seed(7)
    shuffled = bank_labels[torch.randperm(len(bank), generator=generator)]
    top1, top5 = knn_accuracy(bank, shuffled, queries, labels, 20, 0.1, CLASSES)
    chance, error = 100 / CLASSES, 100 * math.sqrt((1 / CLASSES) * (1 - 1 / CLASSES) / 1400)
    assert abs(top1 - chance) < 5 * error
    assert abs(top5 - 5 * chance) < 5 * error * 1.5


def test_chunks_change_nothing(monkeypatch):
    (bank, bank_labels), (queries, labels) = points(200, 8, 2.0), points(101, 9, 2.0)
    whole = knn_accuracy(bank, bank_labels, queries, labels, 10, 0.1, CLASSES)
    monkeypatch.setattr(knn, "CHUNK_ELEMENTS", 7 * len(bank))
    assert knn_accuracy(bank, bank_labels, queries, labels, 10, 0.1, CLASSES) == whole


def test_small_banks_and_few_classes():
    bank, labels = F.normalize(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), dim=1), torch.arange(3)
    assert knn_accuracy(bank, labels, bank, labels, k=200, temperature=0.07) == (100.0, 100.0)
    with pytest.raises(ValueError, match="images on both sides"):
        knn_accuracy(bank[:0], labels[:0], bank, labels)


def test_small_temperature_does_not_overflow():
    bank, labels = points(50, 10)
    assert knn_votes(bank, labels, bank, 10, 0.001, CLASSES).isfinite().all()


def test_a_bank_of_16_bits_and_in_parts_finds_the_same_neighbours(monkeypatch):
    (bank, labels), (queries, _) = points(400, 1, 2.0), points(100, 2, 2.0)
    whole = knn_votes(bank, labels, queries, 20, 0.1, CLASSES)
    monkeypatch.setattr(neighbours, "BANK_ROWS", 37)
    torch.testing.assert_close(knn_votes(bank, labels, queries, 20, 0.1, CLASSES), whole)
    half = knn_votes(bank.half(), labels, queries.half(), 20, 0.1, CLASSES)
    exact = knn_votes(bank.half().float(), labels, queries.half().float(), 20, 0.1, CLASSES)
    assert torch.equal(half, exact)  # products are not rounded to 16 bits
    assert kept_as(torch.device("cuda", 0)) is torch.float16 and kept_as(torch.device("cpu")) is torch.float32
