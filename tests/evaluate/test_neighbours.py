"""Nearest neighbours, pairs and groups against plain loops in float64; what must be found, and what must not."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastmoco.evaluate import neighbours
from fastmoco.evaluate.neighbours import Pairs, groups, nearest, pairs_above
from fastmoco.options import UsageError


def unit(n: int, seed: int = 0, length: int = 12) -> torch.Tensor:
    return F.normalize(torch.randn(n, length, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Sizes that no block divides."""
    monkeypatch.setattr(neighbours, "BANK_ROWS", 37)
    monkeypatch.setattr(neighbours, "QUERY_ROWS", 11)


@pytest.mark.parametrize(("bank", "queries", "k"), [(200, 50, 7), (5, 3, 9), (37, 11, 37), (1, 1, 1)])
def test_the_nearest_are_those_of_a_sort_in_float64(bank, queries, k):
    rows, asked = unit(bank, 1).double(), unit(queries, 2).double()
    found = nearest(rows, asked, k)
    every = asked @ rows.T
    expected = torch.sort(every, dim=1, descending=True, stable=True)
    assert torch.equal(found.rows, expected.indices[:, :k])
    torch.testing.assert_close(found.similarity, expected.values[:, :k], rtol=0, atol=1e-14)


def test_features_kept_in_16_bits_are_compared_in_32():
    rows = unit(120, 3)
    assert nearest(rows.half(), rows.half(), 2).similarity.dtype == torch.float32
    assert torch.equal(nearest(rows.half(), rows.half(), 1).rows[:, 0], torch.arange(120))


@pytest.mark.parametrize("threshold", [-0.9, 0.0, 0.5, 0.999])
def test_pairs_are_those_of_a_double_loop_each_once(threshold):
    rows = unit(90, 4)
    found = pairs_above(rows, threshold)
    exact = rows.double() @ rows.double().T
    near = (exact - threshold).abs() < 1e-6  # what rounding may decide either way
    expected = {(i, j) for i in range(90) for j in range(i + 1, 90) if exact[i, j] >= threshold}
    said = set(zip(found.first.tolist(), found.second.tolist(), strict=True))
    assert len(said) == len(found.first) and all(near[i, j] for i, j in expected ^ said)
    assert (np.diff(found.similarity) <= 0).all() and found.recall == 1


def test_too_many_pairs_ask_for_a_larger_threshold(monkeypatch):
    monkeypatch.setattr(neighbours, "MOST_PAIRS", 100)
    with pytest.raises(UsageError, match="--threshold -0.9: more than 100 pairs"):
        pairs_above(unit(90), -0.9)


def test_groups_are_connected_components():
    pairs = Pairs(np.array([0, 1, 5, 4]), np.array([1, 2, 6, 9]), np.ones(4, np.float32))
    assert groups(10, pairs) == [[0, 1, 2], [4, 9], [5, 6]]
    none = np.empty(0, np.int64)
    assert groups(10, Pairs(none, none, np.empty(0, np.float32))) == []


def test_planted_copies_are_the_groups_and_nothing_else_is():
    rows = unit(300, 5, 32)
    copied = F.normalize(rows[:20] + 0.01 * unit(20, 6, 32), dim=1)
    found = groups(320, pairs_above(torch.cat([rows, copied]), 0.95))
    assert found == [[i, 300 + i] for i in range(20)]
    assert pairs_above(rows, 0.95).first.size == 0, "the control has no copies"


def test_faiss_finds_the_planted_copies_and_says_its_recall(monkeypatch):
    pytest.importorskip("faiss")
    monkeypatch.setattr(neighbours, "MANY", 1000)
    rows = unit(3000, 7, 32)
    copied = F.normalize(rows[:50] + 0.01 * unit(50, 8, 32), dim=1)
    found = pairs_above(torch.cat([rows, copied]), 0.95)
    expected = {(i, 3000 + i) for i in range(50)}
    said = set(zip(found.first.tolist(), found.second.tolist(), strict=True))
    assert said <= expected and len(said) >= 0.9 * len(expected) and found.recall >= 0.9
    monkeypatch.setattr(neighbours, "CELLS_LOOKED_AT", 1)
    monkeypatch.setattr(neighbours, "RECALL_SAMPLE", 3050)
    few = pairs_above(torch.cat([rows, copied]), 0.3)
    assert few.recall < 0.9, "a search that misses pairs says so"
