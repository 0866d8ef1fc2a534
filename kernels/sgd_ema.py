"""SGD with momentum, the momentum (EMA) update of the key encoder and the casts to both working copies, in one pass."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fastmoco.kernels import reference

Impl = Literal["auto", "triton", "reference"]
WORK_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_tables: weakref.WeakValueDictionary[int, TensorTable] = weakref.WeakValueDictionary()
_handles = itertools.count()


class TensorTable:
    """The tensors of one model's update, one entry per parameter, checked once and updated in place ever after.

    `q`, `velocity`, `k`: float32 masters of query, momentum buffer (zeros at first) and key (float64 for the reference
    only). `q_work`, `k_work`: the copies the encoders compute with, float32, bfloat16 or float16; a copy may be the
    master itself, and is then not written a second time. All tensors of an entry share shape, device and strides, and
    are dense (contiguous, channels-last or any other order without gaps): the update works in storage order. The
    table holds the tensors' memory: replacing a parameter's `.data` afterwards leaves the table behind.

    Raises ValueError, naming the entry, where one of these does not hold.
    """

    def __init__(
        self,
        q: Sequence[Tensor],
        velocity: Sequence[Tensor],
        k: Sequence[Tensor],
        q_work: Sequence[Tensor],
        k_work: Sequence[Tensor],
    ) -> None:
        groups = {"q": q, "velocity": velocity, "k": k, "q_work": q_work, "k_work": k_work}
        if len({len(tensors) for tensors in groups.values()}) != 1 or not q:
            counts = ", ".join(f"{name} {len(tensors)}" for name, tensors in groups.items())
            raise ValueError(f"a table needs equally many tensors of each kind, at least one; got {counts}")
        for index, entry in enumerate(zip(q, velocity, k, q_work, k_work, strict=True)):
            _check_entry(index, dict(zip(groups, entry, strict=True)))
        self.q, self.velocity, self.k = _detached(q), _detached(velocity), _detached(k)
        self.q_work = _work_copies(self.q, q, q_work)
        self.k_work = _work_copies(self.k, k, k_work)
        self.device: torch.device = q[0].device
        self.handle: int = next(_handles)
        _tables[self.handle] = self

    def __len__(self) -> int:
        return len(self.q)


def sgd_ema(
    table: TensorTable,
    grads: Sequence[Tensor],
    lr: float | Tensor,
    momentum: float | Tensor,
    weight_decay: float | Tensor,
    ema_momentum: float | Tensor,
    nonfinite: Tensor,
    impl: Impl = "auto",
    grad_scale: Tensor | None = None,
) -> None:
    """One optimiser step, in place: g += wd q; v = momentum v + g; q -= lr v; k = m k + (1 - m) q; both casts.

    `grads`: one per entry, float32, bfloat16 or float16, strides of the entry; divided by the scalar `grad_scale` where
    given. If any of them holds an infinity or NaN nothing changes but `nonfinite` (int32 [1]), which becomes 1; it is
    never cleared here.
    """
    _check_gradients(table, grads)
    reference.sgd_ema(table, grads, lr, momentum, weight_decay, ema_momentum, nonfinite, grad_scale)


def ema(table: TensorTable, ema_momentum: float | Tensor, impl: Impl = "auto") -> None:
    """The momentum update alone, in place: k = m k + (1 - m) q, and the cast to `k_work`."""
    reference.ema(table, ema_momentum)


def _check_entry(index: int, entry: dict[str, Tensor]) -> None:
    q = entry["q"]
    for name, tensor in entry.items():
        masters = (torch.float32, torch.float64) if name in ("q", "velocity", "k") else (*WORK_DTYPES, torch.float64)
        if tensor.dtype not in masters:
            raise ValueError(f"entry {index}: {name} is {tensor.dtype}, expected one of {masters}")
        _check_like(f"entry {index}: {name}", tensor, q)
    if not _is_dense(q):
        raise ValueError(f"entry {index}: shape {tuple(q.shape)} with strides {q.stride()} is not dense")


def _check_gradients(table: TensorTable, grads: Sequence[Tensor]) -> None:
    if len(grads) != len(table):
        raise ValueError(f"{len(grads)} gradients for a table of {len(table)} entries")
    for index, (grad, q) in enumerate(zip(grads, table.q, strict=True)):
        _check_like(f"gradient {index}", grad, q)
        if grad.dtype not in WORK_DTYPES and grad.dtype != q.dtype:
            raise ValueError(f"gradient {index} is {grad.dtype}, expected one of {WORK_DTYPES}")


def _check_like(name: str, tensor: Tensor, model: Tensor) -> None:
    if tensor.device != model.device:
        raise ValueError(f"{name} is on {tensor.device}, its master on {model.device}")
    if tensor.shape != model.shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, its master {tuple(model.shape)}")
    if tensor.stride() != model.stride() and _order(tensor) != _order(model):
        raise ValueError(
            f"{name} has strides {tensor.stride()}, its master {model.stride()} (shape {tuple(model.shape)}): "
            "all tensors of an entry need one memory format"
        )


def _order(tensor: Tensor) -> list[tuple[int, int]]:
    # Strides of dimensions of size one say nothing about where elements lie.
    return [(size, stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


def _is_dense(tensor: Tensor) -> bool:
    expected = 1
    for stride, size in sorted((stride, size) for size, stride in _order(tensor)):
        if stride != expected:
            return False
        expected *= size
    return True


def _detached(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach() for tensor in tensors]


def _work_copies(masters: list[Tensor], given_masters: Sequence[Tensor], copies: Sequence[Tensor]) -> list[Tensor]:
    return [
        master if copy is given or copy.is_set_to(given) else copy.detach()
        for master, given, copy in zip(masters, given_masters, copies, strict=True)
    ]
