"""Peak memory: of the loss beside the materialised one, and of a whole step by precision.

On a GPU torch's allocator counts. On a CPU every tensor that an operator makes is counted while it lives, which leaves
out what an operator allocates and frees inside.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastmoco.bench.baseline import PublishedStep
from fastmoco.bench.kernels import OURS, published_loss, short_name
from fastmoco.bench.report import Row
from fastmoco.contrast.step import Step
from fastmoco.data.placeholder import noise_batch
from fastmoco.kernels.info_nce import info_nce
from fastmoco.parallel import Parallel
from fastmoco.recipe import Recipe


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors made inside that are alive, and their `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> object:
        given = {_storage(value) for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)}
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor) and _storage(value) not in given | self._seen:
                self._add(value.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        self._seen.add(address)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._remove, address, size)

    def _remove(self, address: int, size: int) -> None:
        self._seen.discard(address)
        self.live -= size


def run(recipe: Recipe, device: torch.device, *, dtype: torch.dtype, only: str = "") -> list[Row]:
    """Peak megabytes of every case whose name contains `only`; one sample each, because it does not vary."""
    rows = [*_loss_rows(recipe, device, dtype), *_step_rows(recipe, device)]
    chosen = [row for row in rows if only in row.name or only in row.provider]
    if not chosen:
        raise ValueError(f"nothing to measure has {only} in its name: leave --only out")
    return chosen


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Most bytes that `call` holds beyond what was held before it."""
    if device.type != "cuda":
        with LiveBytes() as counted:
            call()
        return counted.peak
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated(device) - before


def _loss_rows(recipe: Recipe, device: torch.device, dtype: torch.dtype) -> list[Row]:
    n, k, d, t = recipe.batch_size, recipe.queue_size, recipe.dim, recipe.temperature
    z = torch.randn(n, d, device=device, dtype=dtype).requires_grad_()
    keys, queue = (F.normalize(torch.randn(rows, d, device=device), dim=1).to(dtype) for rows in (n, k))
    calls = {
        OURS: lambda: torch.autograd.grad(info_nce(z, keys, queue, t)[0].mean(), z),
        "eager": lambda: published_loss(z, keys, queue, t),
    }
    config = {"N": n, "K": k, "D": d, "dtype": short_name(dtype)}
    least = n * (8 + d * dtype.itemsize) / 1e6  # loss, rank and gradient
    return [
        Row("info_nce", name, "MB", (_warm_peak(call, device) / 1e6,), config, "eager", least)
        for name, call in calls.items()
    ]


def _step_rows(recipe: Recipe, device: torch.device) -> list[Row]:
    precisions = ("fp32", "bf16", "fp16") if device.type == "cuda" else ("fp32", "bf16")
    config = {"arch": recipe.arch, "px": recipe.crop_size, "batch": recipe.batch_size, "queue": recipe.queue_size}
    calls = {"published fp32": lambda: _published(recipe, device)}
    calls |= {f"fastmoco {name}": lambda name=name: _ours(recipe, device, name) for name in precisions}
    return [
        Row("step", name, "MB", (peak_bytes(call, device) / 1e6,), config, "published fp32")
        for name, call in calls.items()
    ]


def _warm_peak(call: Callable[[], object], device: torch.device) -> int:
    call()
    return peak_bytes(call, device)


def _ours(recipe: Recipe, device: torch.device, precision: str) -> None:
    parallel = Parallel(device=device)
    step, batch = Step(recipe, parallel, precision), noise_batch(recipe, parallel)
    for _ in range(2):
        step.step(batch, 1e-3)


def _published(recipe: Recipe, device: torch.device) -> None:
    step = PublishedStep(recipe, device)
    views = torch.randn(2, recipe.batch_size, 3, recipe.crop_size, recipe.crop_size, device=device)
    for _ in range(2):
        step(*views)


def _storage(value: Tensor) -> int:
    return value.untyped_storage()._cdata
