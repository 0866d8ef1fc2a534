"""Keys come back in sample order, and meet the queries that they belong to."""

import numpy as np
import pytest
import torch

from fastmoco.contrast.shuffle import positives, start_unshuffle
from fastmoco.data.plan import route
from fastmoco.parallel import Parallel


def encoded(shuffles: list[np.ndarray], world: int) -> torch.Tensor:
    """Keys of all ranks [G*M, 2], each as (view, slot), by the published rule perm.view(G, -1)[rank]."""
    rows = [
        (float(view), float(slot))
        for rank in range(world)
        for view, order in enumerate(shuffles)
        for slot in order.reshape(world, -1)[rank]
    ]
    return torch.tensor(rows)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("views", [1, 2])
def test_the_gathered_keys_come_back_in_sample_order(world: int, views: int) -> None:
    for seed in range(20):
        random = np.random.default_rng(seed)
        shuffles = [random.permutation(16) for _ in range(views)]
        gathered = encoded(shuffles, world)
        way = route(shuffles, world, rank=world - 1)
        keys = start_unshuffle(Parallel(), gathered, torch.from_numpy(way.unshuffle))()
        expected = [[float(view), float(slot)] for view in range(views) for slot in range(16)]
        assert keys.tolist() == expected


@pytest.mark.parametrize("rank", [0, 1])
def test_positives_are_the_rows_of_this_rank(rank: int) -> None:
    keys = torch.arange(8.0)[:, None]
    assert positives(keys, Parallel(rank, rank, 2), views=1).flatten().tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]][rank]


@pytest.mark.parametrize(("rank", "expected"), [(0, [14, 15, 10, 11]), (1, [16, 17, 12, 13])])
def test_each_view_meets_the_keys_of_the_other(rank: int, expected: list[int]) -> None:
    keys = torch.arange(10.0, 18.0)[:, None]  # 10 to 13 are view 0's
    assert positives(keys, Parallel(rank, rank, 2), views=2).flatten().tolist() == expected
