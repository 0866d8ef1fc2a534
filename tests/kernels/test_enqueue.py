"""The ring: against a list, by wrap-around, in each dtype; and the operator as torch sees it."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastmoco.kernels.enqueue import _operator, cost, enqueue


def _one_by_one(queue, pointer, keys):
    queue, pointer = queue.clone(), int(pointer)
    for key in keys:
        queue[pointer] = key.to(queue.dtype)
        pointer = (pointer + 1) % len(queue)
    return queue, pointer


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize(
    ("size", "dim", "start", "rows"),
    [(64, 128, 0, 16), (64, 128, 60, 16), (33, 48, 32, 17), (5, 16, 3, 5), (5, 16, 2, 23), (1, 16, 0, 3), (7, 8, 6, 1)],
)
def test_equals_writing_one_by_one(device, impl, size, dim, start, rows):
    queue = torch.randn(size, dim, device=device)
    pointer = torch.tensor([start], device=device)
    keys = torch.randn(rows, dim, device=device)
    expected, end = _one_by_one(queue, pointer, keys)
    enqueue(queue, pointer, keys, impl=impl)
    assert torch.equal(queue, expected)
    assert pointer.tolist() == [end]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_casts_as_torch_does(device, dtype):
    queue = torch.zeros(40, 32, dtype=dtype, device=device)
    keys = torch.randn(24, 32, device=device)
    enqueue(queue, torch.tensor([30], device=device), keys, impl="triton")
    assert torch.equal(queue.roll(-30, 0)[:24], keys.to(dtype))
    assert not queue[14:30].any()


def test_many_calls_stay_in_step_with_the_reference(device):
    rings = [torch.zeros(37, 16, device=device) for _ in range(2)]
    pointers = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(2)]
    for rows in (20, 20, 37, 1, 80, 5):
        keys = torch.randn(rows, 16, device=device)
        for ring, pointer, impl in zip(rings, pointers, ("triton", "reference"), strict=True):
            enqueue(ring, pointer, keys, impl=impl)
    assert torch.equal(*rings)
    assert torch.equal(*pointers)


@pytest.mark.parametrize(
    ("queue", "pointer", "keys", "what"),
    [
        (torch.zeros(4, 16), torch.zeros(1, dtype=torch.int64), torch.zeros(0, 16), "keys must be"),
        (torch.zeros(4, 16), torch.zeros(1, dtype=torch.int32), torch.zeros(2, 16), "pointer must be int64"),
        (torch.zeros(4, 16), torch.zeros(1, dtype=torch.int64), torch.zeros(2, 8), "queue rows have 16"),
        (torch.zeros(16, 4).T, torch.zeros(1, dtype=torch.int64), torch.zeros(2, 16), "contiguous"),
        (torch.zeros(4, 16).long(), torch.zeros(1, dtype=torch.int64), torch.zeros(2, 16), "queue must be"),
    ],
)
def test_refuses(queue, pointer, keys, what):
    with pytest.raises(ValueError, match=what):
        enqueue(queue, pointer, keys)


def test_the_twin_takes_float64():
    queue, keys = torch.zeros(4, 16, dtype=torch.float64), torch.randn(2, 16, dtype=torch.float64)
    enqueue(queue, torch.zeros(1, dtype=torch.int64), keys)
    assert torch.equal(queue[:2], keys)


def test_operator_contract(device):
    arguments = (torch.zeros(8, 16, device=device), torch.tensor([6], device=device), torch.ones(4, 16, device=device))
    torch.library.opcheck(_operator, arguments)


def test_fake_tensors_pass():
    with FakeTensorMode():
        queue, pointer = torch.empty(8, 16, device="cuda"), torch.empty(1, dtype=torch.int64, device="cuda")
        enqueue(queue, pointer, torch.empty(4, 16, device="cuda"))


def test_cost_counts_the_bytes_of_the_tensors():
    queue, pointer = torch.zeros(100, 32, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.int64)
    for rows in (30, 130):
        keys = torch.zeros(rows, 32)
        kept, slots = keys[-100:], queue[:rows]
        assert cost(100, 32, rows, queue.dtype, keys.dtype) == (kept.nbytes + slots.nbytes + 2 * pointer.nbytes, 0)
