"""The order of an epoch: which image stands at which position, as a pure function of (seed, epoch, position).

`Table` sorts a hash of every image and keeps the result: exact and simple, 16 bytes an image while it sorts. `Keyed`
computes any element of a permutation when it is asked for, and holds a few numbers whatever n is. `Windows` permutes
shards, and the images of so many shards at a time: what disks and object stores can serve in large pieces.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import numpy as np

from fastmoco.data.draws import GOLDEN, KEYED_STREAM, ORDER_STREAM, SHARD_STREAM, WINDOW_STREAM, hash_words, mix
from fastmoco.recipe import Recipe, RecipeError

ROUNDS = 8  # of the Feistel network: its designers' analysis wants three; more cost 0.1 ms a step
SORTED_UP_TO = 4096  # numbers of which a permutation is sorted: rounds over so few are seen by statistics
KEPT_EPOCHS = 2  # images of the next epoch are read while the last batches of this one are being assembled


class Permutation:
    """A permutation of 0 to n - 1, chosen by a key, without a table: any element on demand, in constant memory.

    The generalised Feistel cipher of Black and Rogaway ("Ciphers with arbitrary finite domains", CT-RSA 2002, method
    3). A number is a pair (left, right) with left < a and right < b, where a b is just above n; each round adds a keyed
    hash of one half to the other. A result of n or more is put in again until one is below n ("cycle walking"), which
    happens with probability below 2 / sqrt(n). Up to SORTED_UP_TO numbers are sorted by a hash instead. Raises
    ValueError if n is below 1.
    """

    def __init__(self, n: int, *key: int) -> None:
        if n < 1:
            raise ValueError(f"a permutation of {n} numbers: give at least 1")
        left = math.isqrt(n - 1) + 1
        self.n, self._left, self._right = n, np.uint64(left), np.uint64(-(-n // left))
        self._keys = hash_words(*key, np.arange(ROUNDS))
        self._sorted = np.argsort(hash_words(*key, np.arange(n)), kind="stable") if n <= SORTED_UP_TO else None

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Elements at `positions`, int64 [m], each from 0 to n - 1: int64 [m]."""
        if self._sorted is not None:
            return self._sorted[positions]
        images = self._once(np.asarray(positions).astype(np.uint64))
        while len(outside := np.flatnonzero(images >= self.n)):
            images[outside] = self._once(images[outside])
        return images.astype(np.int64)

    def _once(self, numbers: np.ndarray) -> np.ndarray:
        right, left = np.divmod(numbers, self._left)
        for first, second in self._keys.reshape(-1, 2):
            left = _added(left, _hashed(first, right), self._left)
            right = _added(right, _hashed(second, left), self._right)
        return right * self._left + left


def _hashed(key: np.uint64, half: np.ndarray) -> np.ndarray:
    return mix(key + (half + np.uint64(1)) * GOLDEN)


def _added(half: np.ndarray, drawn: np.ndarray, size: np.uint64) -> np.ndarray:
    total = half + drawn % size
    return np.where(total >= size, total - size, total)


class ShardRows(NamedTuple):
    """Which images each shard holds, in the order they stand in it."""

    starts: np.ndarray
    """int64 [S + 1]: row of each shard's first image; the last number is n."""
    images: np.ndarray | None = None
    """int64 [n]: image of each row; None where rows are images."""

    def image(self, rows: np.ndarray) -> np.ndarray:
        """Images of `rows`, int64 [m]."""
        return rows if self.images is None else self.images[rows]


class Order(Protocol):
    """One way to order an epoch of n images."""

    def __call__(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """Images at `positions` of `epoch`, int64 [m]."""

    def windows(self, epoch: int, first: int, last: int) -> list[np.ndarray]:
        """Shards int64 [at most W] of each window that the positions from `first` to before `last` lie in."""


class Table:
    """The order of all runs before there was a choice: images sorted by a hash of (seed, epoch, image)."""

    def __init__(self, seed: int, n: int) -> None:
        self.seed, self.n = seed, n
        self._kept: dict[int, np.ndarray] = {}

    def __call__(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        if epoch not in self._kept:
            keys = hash_words(self.seed, ORDER_STREAM, epoch, np.arange(self.n))
            self._kept = _newest(self._kept) | {epoch: np.argsort(keys, kind="stable")}
        return self._kept[epoch][positions]

    def windows(self, epoch: int, first: int, last: int) -> list[np.ndarray]:
        """None: images of all shards are mixed."""
        return []


class Keyed:
    """A permutation of all images that is computed where it is asked for."""

    def __init__(self, seed: int, n: int) -> None:
        self.seed, self.n = seed, n

    def __call__(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        return Permutation(self.n, self.seed, KEYED_STREAM, epoch)(positions)

    def windows(self, epoch: int, first: int, last: int) -> list[np.ndarray]:
        """None: images of all shards are mixed."""
        return []


class _Dealt(NamedTuple):
    """The shards of one epoch in their order."""

    shards: np.ndarray
    """int64 [S]."""
    starts: np.ndarray
    """int64 [S + 1]: position of the first image of each of them, were they read one after the other."""
    edges: np.ndarray
    """int64 [windows + 1]: position where each window begins; the last number is n."""


class Windows:
    """Shards in a random order, W of them at a time; all images of these W in a random order.

    W = S is a shuffle of everything. A window is left for good when the next one begins.
    """

    def __init__(self, seed: int, rows: ShardRows, window: int) -> None:
        self.seed, self.rows, self.window = seed, rows, window
        self._kept: dict[int, _Dealt] = {}

    def __call__(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        dealt, positions = self._dealt(epoch), np.asarray(positions, np.int64)
        number = np.searchsorted(dealt.edges, positions, side="right") - 1
        rows = np.empty_like(positions)
        for window in np.unique(number).tolist():
            inside = number == window
            begin, end = dealt.edges[window : window + 2].tolist()
            mixed = Permutation(end - begin, self.seed, WINDOW_STREAM, epoch, window)(positions[inside] - begin) + begin
            place = np.searchsorted(dealt.starts, mixed, side="right") - 1
            rows[inside] = self.rows.starts[dealt.shards[place]] + mixed - dealt.starts[place]
        return self.rows.image(rows)

    def windows(self, epoch: int, first: int, last: int) -> list[np.ndarray]:
        """Shards of each window that the positions from `first` to before `last` lie in."""
        dealt = self._dealt(epoch)
        begin, end = np.searchsorted(dealt.edges, [first, last - 1], side="right") - 1
        numbers = range(int(begin), min(int(end) + 1, len(dealt.edges) - 1))
        return [dealt.shards[number * self.window : (number + 1) * self.window] for number in numbers]

    def _dealt(self, epoch: int) -> _Dealt:
        if epoch not in self._kept:
            counts = np.diff(self.rows.starts)
            shards = np.argsort(hash_words(self.seed, SHARD_STREAM, epoch, np.arange(len(counts))), kind="stable")
            shards = shards[counts[shards] > 0]  # an empty window would be no window
            starts = np.concatenate([[0], np.cumsum(counts[shards])])
            edges = np.append(starts[:-1][:: self.window], starts[-1])
            self._kept = _newest(self._kept) | {epoch: _Dealt(shards, starts, edges)}
        return self._kept[epoch]


def _newest(kept: dict) -> dict:
    return dict(list(kept.items())[1 - KEPT_EPOCHS :])


def order_for(recipe: Recipe, n: int, rows: ShardRows | None = None) -> Order:
    """The order of n images that `recipe` asks for; RecipeError if it goes by shards and `rows` tells of none."""
    name = recipe.order_of(n)
    if name == "table":
        return Table(recipe.seed, n)
    if name == "keyed":
        return Keyed(recipe.seed, n)
    if rows is None:
        raise RecipeError(
            "order windows needs images in tar archives, which these are not: use --order auto, or make shards of them "
            "with fastmoco data pack"
        )
    return Windows(recipe.seed, rows, recipe.window_shards)
