"""Write keys into the ring of the queue at a pointer held on the device, and advance the pointer, in one launch.

Every block must read the pointer before any block moves it. The pointer itself keeps the count: each block adds one
to its high bits, which returns the position (low bits) and how many blocks have read it (high bits); the last of them
stores the new position. So there is no second launch, no scratch memory, and nothing to reset between replays of a
CUDA graph. Which block comes last is open, what it stores is not.

Bytes: each key that stays is read once and written once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmoco.kernels import reference
from fastmoco.kernels.dispatch import NAMES, Impl, cast, check_dtype, launch_options, machine, takes_kernel, variant
from fastmoco.kernels.tiles import Variant, tiles

__all__ = ["cost", "enqueue", "variants"]


@triton.jit(do_not_specialize=["size", "rows", "skip"])
def _enqueue_kernel(
    queue, pointer, keys, size, rows, skip, DIM: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr
):
    one_reader: tl.constexpr = 1 << 40
    ticket = tl.atomic_add(pointer, one_reader)
    position = ticket % one_reader
    if ticket // one_reader == tl.num_programs(0) - 1:
        tl.store(pointer, (position + rows) % size)

    row = skip + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, PADDED)
    mask = (row < rows)[:, None] & (column < DIM)[None, :]
    target = (position + row) % size
    values = tl.load(keys + row.to(tl.int64)[:, None] * DIM + column[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(queue + target[:, None] * DIM + column[None, :], cast(values, queue.dtype.element_ty), mask=mask)


def _launch(queue: Tensor, pointer: Tensor, keys: Tensor) -> None:
    (size, dim), rows = queue.shape, keys.shape[0]
    row = tiles("enqueue", machine(queue.device).capability)
    skip = max(0, rows - size)
    with torch.cuda.device_of(queue):
        _enqueue_kernel[(triton.cdiv(rows - skip, row.block[0]),)](
            queue, pointer, keys, size, rows, skip, **_constants(dim, row.block[0]), **launch_options(row)
        )


def _constants(dim: int, block: int) -> dict[str, int]:
    return {"DIM": dim, "PADDED": triton.next_power_of_2(dim), "BLOCK": block}


_operator = torch.library.custom_op("fastmoco::enqueue", _launch, mutates_args=("queue", "pointer"))


@_operator.register_fake
def _(queue, pointer, keys) -> None:
    return None


def _check(queue: Tensor, pointer: Tensor, keys: Tensor) -> None:
    for name, tensor in (("queue", queue), ("keys", keys)):
        check_dtype(f"enqueue: {name}", tensor.dtype)
        if tensor.dim() != 2 or not tensor.numel():
            raise ValueError(f"enqueue: {name} must be [rows, D], not empty, not {tuple(tensor.shape)}")
    if keys.shape[1] != queue.shape[1]:
        raise ValueError(f"enqueue: queue rows have {queue.shape[1]} numbers, keys {keys.shape[1]}")
    if pointer.dtype != torch.int64 or pointer.shape != (1,):
        raise ValueError(f"enqueue: pointer must be int64 [1], not {pointer.dtype} {tuple(pointer.shape)}")
    if not queue.is_contiguous():
        raise ValueError(f"enqueue: the queue must be contiguous, not of strides {queue.stride()}")
    if not queue.device == pointer.device == keys.device:
        raise ValueError(f"enqueue: queue on {queue.device}, pointer on {pointer.device}, keys on {keys.device}")


def enqueue(queue: Tensor, pointer: Tensor, keys: Tensor, *, impl: Impl = "auto") -> None:
    """Write keys [B, D] into the ring queue [K, D] from row `pointer` (int64 [1], 0 <= pointer < K) on, in place.

    Rows wrap at the end; of more than K keys the last K stay, where they would have come to lie one by one. Keys are
    cast to the queue's dtype: fp32, fp16 or bf16 (the twin also takes fp64). The pointer becomes (pointer + B) % K and
    is never read back to the host. Raises ValueError for a wrong dtype, shape, stride or device.
    """
    _check(queue, pointer, keys)
    keys = keys.detach()
    if takes_kernel(impl, queue.device, queue.dtype, keys.dtype):
        _operator(queue, pointer, keys.contiguous())
    else:
        reference.enqueue(queue, pointer, keys)


def cost(size: int, dim: int, rows: int, queue_dtype: torch.dtype, keys_dtype: torch.dtype) -> tuple[int, int]:
    """(bytes, flops): the keys that stay are read and written once; the pointer is read and written."""
    return min(size, rows) * dim * (keys_dtype.itemsize + queue_dtype.itemsize) + 2 * torch.int64.itemsize, 0


def variants(arch: int) -> list[Variant]:
    """What the compile gate compiles: the usual D = 128, in each dtype of the queue, from keys in fp32 and in that."""
    row = tiles("enqueue", arch)
    types = {"pointer": "*i64"} | dict.fromkeys(("size", "rows", "skip"), "i32")
    pairs = dict.fromkeys((name, keys) for name in NAMES.values() for keys in (name, "fp32"))
    return [
        variant(
            f"enqueue {name} keys={keys}",
            _enqueue_kernel,
            row,
            types | {"queue": f"*{name}", "keys": f"*{keys}"},
            _constants(128, row.block[0]),
            streaming=True,
        )
        for name, keys in pairs
    ]
