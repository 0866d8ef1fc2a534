"""The tensors of one model's update, and what a kernel needs in device memory to find them all in one launch."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastmoco.kernels.tiles import tiles

WORK_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Codes of the dtypes in a record: two bits each for gradient, query copy and key copy; None has nothing to be written.
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, None: 3}
COLUMNS = 8  # of a record: q, velocity, k, q_work, k_work, gradient, size, kinds; 64 bytes, two sectors of memory

_tables: weakref.WeakValueDictionary[int, TensorTable] = weakref.WeakValueDictionary()
_handles = itertools.count()


def table_of(handle: int) -> TensorTable:
    """The table that carries this handle; raises KeyError if it is gone, as under a graph that outlived it."""
    return _tables[handle]


class Tensors(NamedTuple):
    """What an update reads and writes, entry by entry; a working copy that is its master is the same object.

    Without a key encoder `k` and `k_work` are empty.
    """

    q: Sequence[Tensor]
    velocity: Sequence[Tensor]
    k: Sequence[Tensor]
    q_work: Sequence[Tensor]
    k_work: Sequence[Tensor]


class TensorTable:
    """The tensors of one model's update, one entry per parameter, checked once and updated in place ever after.

    `q`, `velocity`, `k`: float32 masters of query, momentum buffer (zeros at first) and key (float64 for the reference
    only). `q_work`, `k_work`: the copies the encoders compute with, float32, bfloat16 or float16; a copy may be the
    master itself, and is then not written a second time. Without a key encoder `k` and `k_work` are empty.

    All tensors of an entry share shape, device and strides, and are dense (contiguous, channels-last or any other order
    without gaps): the update works in storage order. The table holds the tensors' memory: replacing a parameter's
    `.data` afterwards leaves the table behind. A captured CUDA graph reads memory that the table owns: keep the table
    as long as the graph.

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
        if not k and not k_work:
            del groups["k"], groups["k_work"]
        if len({len(tensors) for tensors in groups.values()}) != 1 or not q:
            counts = ", ".join(f"{name} {len(tensors)}" for name, tensors in groups.items())
            raise ValueError(f"a table needs equally many tensors of each kind, at least one; got {counts}")
        for index, entry in enumerate(zip(*groups.values(), strict=True)):
            _check_entry(index, q[0].device, dict(zip(groups, entry, strict=True)))
        self.q, self.velocity, self.k = _detach(q), _detach(velocity), _detach(k)
        self.q_work, self.k_work = _copies(q, self.q, q_work), _copies(k, self.k, k_work)
        self.q_is_work = [copy is master for copy, master in zip(self.q_work, self.q, strict=True)]
        self.k_is_work = [copy is master for copy, master in zip(self.k_work, self.k, strict=True)]
        self.tensors = Tensors(self.q, self.velocity, self.k, self.q_work, self.k_work)
        self.q_casts = [copy for copy, same in zip(self.q_work, self.q_is_work, strict=True) if not same]
        self.k_casts = [copy for copy, same in zip(self.k_work, self.k_is_work, strict=True) if not same]
        self.has_keys = bool(self.k)
        self.layouts = [(q.shape, q.stride()) for q in self.q]
        self.device: torch.device = q[0].device
        self.handle: int = next(_handles)
        self._on_device: DeviceTable | None = None
        if self.device.type == "cuda" and q[0].dtype == torch.float32:
            self.on_device()  # here, because nothing of it may happen while a graph is captured
        _tables[self.handle] = self

    @classmethod
    def averaging(cls, q: Sequence[Tensor], k: Sequence[Tensor]) -> TensorTable:
        """The table of a momentum update alone: `ema` moves each of `k` (a teacher's) towards its `q` (a student's).

        The tensors stay the models' own, so the table is made once. All are float32, or all float64.
        """
        return cls(q, q, k, q, k)

    def __len__(self) -> int:
        return len(self.q)

    def on_device(self) -> DeviceTable:
        """Chunks and records in device memory, made on first use."""
        if self._on_device is None:
            self._on_device = DeviceTable(self)
        return self._on_device


class DeviceTable:
    """Chunks (int32 [chunks, 2]: entry, part) and records (int64 [entries, 8]) of a table, in its device's memory.

    Raises ValueError unless every master is float32.
    """

    def __init__(self, table: TensorTable) -> None:
        cuda = table.device.type == "cuda"
        self.row = tiles("sgd_ema", torch.cuda.get_device_capability(table.device) if cuda else None)
        if any(q.dtype != torch.float32 for q in table.q):
            raise ValueError("the Triton kernel needs float32 masters")
        self.sizes = [q.numel() for q in table.q]
        q_kinds = [KINDS[None if same else q.dtype] for q, same in zip(table.q_work, table.q_is_work, strict=True)]
        k_kinds = [KINDS[None if same else k.dtype] for k, same in zip(table.k_work, table.k_is_work, strict=True)]
        k_kinds = k_kinds or [KINDS[None]] * len(table)
        self.kinds = [q << 2 | k << 4 for q, k in zip(q_kinds, k_kinds, strict=True)]
        chunk = self.row.block[0]
        chunks = [(entry, part) for entry, size in enumerate(self.sizes) for part in range(-(-size // chunk))]
        self.chunks = torch.tensor(chunks or [(0, 0)], dtype=torch.int32, device=table.device)
        self.device = table.device
        self.grid = (len(self.chunks),)
        self._own = table.tensors
        self._own_addresses = self._addresses = _addresses(self._own)
        self._grads: list[list[int]] = [[0] * len(table), [0] * len(table)]  # addresses, kinds
        self._upload: Tensor | None = None
        self._spare = self._pin() if cuda else None
        self._captured: list[Tensor] = []

    def records(self, tensors: Tensors, grads: Sequence[Tensor] | None) -> Tensor:
        """The records of these tensors, int64 [entries, 8] on the device; sent again only where something moved."""
        addresses = self._own_addresses if tensors is self._own else _addresses(tensors)
        moving = self._grads if grads is None else [[g.data_ptr() for g in grads], [KINDS[g.dtype] for g in grads]]
        capturing = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if self._spare is None and self.device.type == "cuda" and not capturing:
            self._spare = self._pin()  # torch before 2.12 cannot pin memory while it captures
        upload = self._upload
        if upload is None or addresses != self._addresses or moving != self._grads:
            kinds = [kind | grad for kind, grad in zip(self.kinds, moving[1], strict=True)]
            upload = self._send([*addresses, moving[0], self.sizes, kinds], capturing)
            if not capturing:  # what is captured has not run: the next eager call must not count on it
                self._addresses, self._grads, self._upload = addresses, moving, upload
        if capturing:
            self._captured.append(upload)  # every replay reads it
        return upload

    def _send(self, columns: list[list[int]], capturing: bool) -> Tensor:
        rows = torch.tensor(columns, dtype=torch.int64, device="cpu").T.contiguous()
        if self.device.type == "cpu":
            return rows
        # A fresh buffer each time: an earlier copy may still be reading the last one, and a replay always will.
        pinned = self._spare if capturing and self._spare is not None else self._pin()
        pinned.copy_(rows)
        if capturing:
            self._captured.append(pinned)
            self._spare = None
        return pinned.to(self.device, non_blocking=True)

    def _pin(self) -> Tensor:
        return torch.empty(len(self.sizes), COLUMNS, dtype=torch.int64, device="cpu", pin_memory=True)


def _addresses(tensors: Tensors) -> list[list[int]]:
    return [[tensor.data_ptr() for tensor in group] or [0] * len(tensors.q) for group in tensors]


def _check_entry(index: int, device: torch.device, entry: dict[str, Tensor]) -> None:
    q = entry["q"]
    dtypes: tuple[torch.dtype, ...]
    for name, tensor in entry.items():
        if name in ("q_work", "k_work"):
            dtypes = (*WORK_DTYPES, q.dtype)
        else:
            dtypes = (torch.float32, torch.float64) if name == "q" else (q.dtype,)
        if tensor.dtype not in dtypes:
            raise ValueError(f"entry {index}: {name} is {tensor.dtype}, expected {' or '.join(map(str, dtypes))}")
        check_like(f"entry {index}: {name}", tensor, q, device)
    if not _is_dense(q):
        raise ValueError(f"entry {index}: shape {tuple(q.shape)} with strides {q.stride()} is not dense")


def check_like(name: str, tensor: Tensor, master: Tensor, device: torch.device) -> None:
    """Raise ValueError, naming the tensor, unless it lies on `device` with shape and storage order of `master`."""
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, the table on {device}")
    if tensor.shape != master.shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, its master {tuple(master.shape)}")
    if tensor.stride() != master.stride() and _order(tensor) != _order(master):
        raise ValueError(
            f"{name} has strides {tensor.stride()}, its master {master.stride()} (shape {tuple(master.shape)}): "
            "all tensors of an entry need one memory format"
        )


def _order(tensor: Tensor) -> list[tuple[int, int]]:
    # Strides of dimensions of size one say nothing about where elements lie.
    return [(stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


def _is_dense(tensor: Tensor) -> bool:
    expected = 1
    for stride, size in sorted(_order(tensor)):
        if stride != expected:
            return False
        expected *= size
    return True


def _detach(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach() for tensor in tensors]


def _copies(masters: Sequence[Tensor], detached: list[Tensor], copies: Sequence[Tensor]) -> list[Tensor]:
    return [
        view if _memory(copy) == _memory(master) else copy.detach()
        for master, view, copy in zip(masters, detached, copies, strict=True)
    ]


def _memory(tensor: Tensor) -> tuple[int, int]:
    # By storage, because meta and fake tensors have no address.
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset())
