"""The queue against a list, and its random start."""

import collections

import pytest
import torch

from fastmoco.contrast.dictionary import Queue


def make(size: int, dim: int = 16, dtype: torch.dtype = torch.float32, seed: int = 0) -> Queue:
    return Queue(size, dim, dtype, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("size", "batch"), [(12, 4), (10, 4), (7, 7), (5, 8), (1, 3), (64, 1)])
def test_it_keeps_the_last_k_keys_in_the_order_of_arrival(size: int, batch: int) -> None:
    """Batches that divide K, that wrap around its end, and that are larger than it."""
    queue = make(size)
    arrived = collections.deque(queue.keys.clone(), maxlen=size)
    for step in range(30):
        keys = torch.randn(batch, 16)
        queue.enqueue(keys)
        arrived.extend(keys)
        oldest = int(queue.pointer)
        assert torch.equal(queue.keys.roll(-oldest, 0), torch.stack(list(arrived)))
        assert oldest == (step + 1) * batch % size
        assert int(queue.count) == (step + 1) * batch
        assert float(queue.fill_level) == pytest.approx(min(1, (step + 1) * batch / size))


def test_it_starts_with_random_unit_vectors() -> None:
    keys = make(4096, dim=128).keys
    torch.testing.assert_close(keys.norm(dim=1), torch.ones(4096), rtol=1e-6, atol=1e-6)
    # The cosines of random directions have variance 1/D; five standard errors of the mean of their squares.
    cosines = (keys[:2048] * keys[2048:]).sum(1)
    assert abs(cosines.square().mean() * 128 - 1) < 5 * (2 / 2048) ** 0.5
    assert torch.equal(keys, make(4096, dim=128).keys)
    assert not torch.equal(keys, make(4096, dim=128, seed=1).keys)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_it_stores_what_it_is_told(dtype: torch.dtype) -> None:
    queue, keys = make(8, dtype=dtype), torch.randn(4, 16)
    queue.enqueue(keys)
    assert queue.keys.dtype == dtype
    assert torch.equal(queue.keys[:4], keys.to(dtype))


def test_a_key_that_is_not_finite_leaves_the_old_one() -> None:
    """Also where writing wraps and where there are more keys than rows."""
    for size, batch in ((12, 4), (10, 7), (5, 8)):
        queue, other = make(size), make(size)
        for step in range(5):
            keys = torch.randn(batch, 16)
            queue.enqueue(keys)
            old = other.keys[(other.pointer + torch.arange(batch)) % size]
            spoiled = keys.clone()
            spoiled[step % batch, 3], spoiled[(step + 2) % batch] = float("inf"), float("nan")
            other.enqueue(spoiled)
            bad = [step % batch, (step + 2) % batch]
            expected = torch.where(torch.isin(torch.arange(batch), torch.tensor(bad))[:, None], old, keys)
            rows = (other.pointer - min(batch, size) + torch.arange(min(batch, size))) % size
            assert torch.equal(other.keys[rows], expected[-size:]) and other.keys.isfinite().all()
        assert torch.equal(queue.pointer, other.pointer) and torch.equal(queue.count, other.count)
