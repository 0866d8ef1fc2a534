"""The way back from shuffled keys to sample order, by index.

Keys are encoded in the order of a permutation of the global batch, so that batch norm cannot tell which of them belong
to the queries beside them. One all-gather of the keys then serves both the positives and the queue.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fastmoco.parallel import Parallel


def start_unshuffle(parallel: Parallel, keys: Tensor, unshuffle: Tensor) -> Callable[[], Tensor]:
    """Begin gathering this rank's `keys` [M, D]; the returned call gives all keys in sample order, view by view.

    `unshuffle` int64 [views*B]: row of the gathered keys [G*M, D] for each view and sample.
    """
    gather = parallel.start_all_gather(keys)
    return lambda: gather().index_select(0, unshuffle)


def positives(keys: Tensor, parallel: Parallel, views: int) -> Tensor:
    """Of all `keys` [views*B, D] in sample order, those of this rank's M query rows.

    With two views the query of each view meets the key of the other.
    """
    by_view = keys.view(views, -1, keys.shape[1])
    per_rank = by_view.shape[1] // parallel.world
    mine = by_view[:, parallel.rank * per_rank : (parallel.rank + 1) * per_rank]
    return mine.flip(0).reshape(-1, keys.shape[1]) if views > 1 else mine[0]
