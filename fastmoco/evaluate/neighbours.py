"""Exact nearest neighbours by cosine similarity, in blocks on the device; and pairs above a threshold, and groups.

Above a million images all pairs on a CPU take hours. There faiss takes over where it is installed: its inverted file
compares an image with those of the cells nearest to it, which may miss pairs. How many it finds is measured.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastmoco.options import UsageError

BANK_ROWS = 1 << 15  # rows of the bank that are compared at a time: 256 MiB of 2048 features in fp32
QUERY_ROWS = 1 << 10  # queries that are compared at a time: 128 MiB of similarities
MANY = 1_000_000  # images above which all pairs are left to faiss, on a CPU
MOST_PAIRS = 20_000_000
CELLS_LOOKED_AT = 32  # of faiss's inverted file, for each image
NEIGHBOURS_LOOKED_AT = 64  # of an image, by faiss
RECALL_SAMPLE = 1000  # images whose pairs are also looked for exactly


class Neighbours(NamedTuple):
    """The nearest rows of a bank, nearest first."""

    similarity: Tensor
    """float [m, k]: inner products, which of unit vectors are cosines."""
    rows: Tensor
    """int64 [m, k]: where in the bank they are."""


class Pairs(NamedTuple):
    """Pairs of rows that are alike, each once, the most alike first."""

    first: np.ndarray
    """int64 [p]: the smaller index."""
    second: np.ndarray
    """int64 [p]: the larger index."""
    similarity: np.ndarray
    """float32 [p]."""
    recall: float = 1.0
    """Share of the pairs that were found, where that was measured; 1 where the search was exact."""


def nearest(bank: Tensor, queries: Tensor, k: int) -> Neighbours:
    """The `k` rows of `bank` [n, F] nearest to each of `queries` [m, F], or all n where k is more.

    Never in the 16 bits that a bank may be kept in: products are taken in fp32, or in fp64 of fp64 features.
    """
    k = min(k, len(bank))
    parts = [_nearest(bank, part, k) for part in queries.split(QUERY_ROWS)] or [_nearest(bank, queries, k)]
    return Neighbours(torch.cat([part.similarity for part in parts]), torch.cat([part.rows for part in parts]))


def _nearest(bank: Tensor, queries: Tensor, k: int) -> Neighbours:
    wide = torch.float32 if bank.dtype == torch.float16 else bank.dtype
    similarity = queries.new_empty(len(queries), 0, dtype=wide)
    index = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for first in range(0, len(bank), BANK_ROWS):
        part = queries.to(wide) @ bank[first : first + BANK_ROWS].to(wide).T
        best, rows = part.topk(min(k, part.shape[1]), dim=1)
        if index.shape[1]:
            best, rows = torch.cat([similarity, best], 1), torch.cat([index, rows + first], 1)
            best, order = best.topk(min(k, best.shape[1]), dim=1)
            rows = rows.gather(1, order)
        similarity, index = best, rows
    return Neighbours(similarity, index)


def pairs_above(features: Tensor, threshold: float) -> Pairs:
    """Pairs of the unit vectors `features` [n, F] whose similarity is at least `threshold`.

    Raises UsageError if there are more than MOST_PAIRS: then the threshold tells nothing.
    """
    if len(features) > MANY and features.device.type == "cpu":
        faiss = _faiss()
        if faiss is not None:
            return _pairs_by_faiss(faiss, features, threshold)
    pairs: list[tuple[Tensor, ...]] = []
    count = 0
    for first in range(0, len(features), QUERY_ROWS):
        queries = features[first : first + QUERY_ROWS].float()
        for start in range(first, len(features), BANK_ROWS):
            similarity = queries @ features[start : start + BANK_ROWS].float().T
            # Each pair once: the second index is the larger one.
            rows, columns = (similarity >= threshold).triu(first - start + 1).nonzero(as_tuple=True)
            pairs.append((rows + first, columns + start, similarity[rows, columns]))
            count += len(rows)
            _check_count(count, threshold)
    columns_of = [torch.cat(column).cpu().numpy() for column in zip(*pairs, strict=True)]
    return _sorted_pairs(columns_of[0], columns_of[1], columns_of[2])


def groups(count: int, pairs: Pairs) -> list[list[int]]:
    """Images that pairs connect, over others where need be: lists of two or more indices, the largest list first."""
    parent = list(range(count))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    for one, other in zip(pairs.first.tolist(), pairs.second.tolist(), strict=True):
        one, other = root(one), root(other)
        parent[max(one, other)] = min(one, other)
    members: dict[int, list[int]] = {}
    for index in np.unique(np.concatenate([pairs.first, pairs.second])).tolist():
        members.setdefault(root(index), []).append(index)
    return sorted(members.values(), key=lambda group: (-len(group), group[0]))


def _check_count(count: int, threshold: float) -> None:
    if count > MOST_PAIRS:
        raise UsageError(
            f"--threshold {threshold:g}: more than {MOST_PAIRS:,} pairs are at least that alike, so it tells no "
            f"duplicates: give a larger one"
        )


def _sorted_pairs(first: np.ndarray, second: np.ndarray, similarity: np.ndarray, recall: float = 1.0) -> Pairs:
    order = np.lexsort((second, first, -similarity))
    return Pairs(first[order], second[order], similarity[order], recall)


def _faiss():
    try:
        import faiss
    except ImportError:
        return None
    return faiss


def _pairs_by_faiss(faiss, features: Tensor, threshold: float) -> Pairs:
    rows = np.ascontiguousarray(features.numpy(), np.float32)
    count, length = rows.shape
    cells = min(int(4 * count**0.5), max(1, count // 40))
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(length), length, cells, faiss.METRIC_INNER_PRODUCT)
    index.train(rows[np.random.RandomState(0).permutation(count)[: 64 * cells]])
    index.add(rows)
    index.nprobe = min(CELLS_LOOKED_AT, cells)
    similarity, near = index.search(rows, min(NEIGHBOURS_LOOKED_AT, count))
    here = np.repeat(np.arange(count), near.shape[1])
    there, similarity = near.ravel().astype(np.int64), similarity.ravel()
    alike = (there >= 0) & (there != here) & (similarity >= threshold)
    pairs = np.stack([np.minimum(here, there), np.maximum(here, there)])[:, alike]
    _check_count(pairs.shape[1], threshold)
    both, first = np.unique(pairs, axis=1, return_index=True)
    return _sorted_pairs(both[0], both[1], similarity[alike][first], _recall(features, both, threshold))


def _recall(features: Tensor, pairs: np.ndarray, threshold: float) -> float:
    """Share of the pairs of a sample of images that are among those found."""
    sample = np.sort(np.random.RandomState(1).permutation(len(features))[:RECALL_SAMPLE])
    known_pairs = set(map(tuple, pairs.T.tolist()))
    hits = total = 0
    for start in range(0, len(features), BANK_ROWS):
        similarity = features[torch.from_numpy(sample)] @ features[start : start + BANK_ROWS].T
        for row, column in (similarity >= threshold).nonzero().tolist():
            one, other = int(sample[row]), column + start
            if one != other:
                total += 1
                hits += (min(one, other), max(one, other)) in known_pairs
    return hits / total if total else 1.0
