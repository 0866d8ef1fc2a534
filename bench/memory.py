"""Peak memory: of the loss beside the materialised one, and of a whole step by precision.

On a GPU torch's allocator counts. On a CPU every tensor that an operator makes is counted while it lives, which leaves
out what an operator allocates and frees inside.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastmoco.bench import losses
from fastmoco.bench.journal import Journal
from fastmoco.bench.kernels import OURS, short_name
from fastmoco.bench.record_files import Row, matches
from fastmoco.bench.step import config_of, ours, published
from fastmoco.kernels.info_nce import info_nce
from fastmoco.recipe import Recipe

Names = tuple[str, ...]  # of a row and of its provider, and its size


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors made inside that are alive, and their `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._storages: set[int] = set()

    def __torch_dispatch__(self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> object:
        inputs = {_storage(value) for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)}
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor) and _storage(value) not in inputs | self._storages:
                self._add(value.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        self._storages.add(address)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._remove, address, size)

    def _remove(self, address: int, size: int) -> None:
        self._storages.discard(address)
        self.live -= size


def run(
    recipe: Recipe, device: torch.device, *, dtype: torch.dtype, only: str = "", journal: Journal | None = None
) -> list[Row]:
    """Peak megabytes of every case of which a word of `only` stands in the name; one sample each: it does not vary.

    The journal has each row as it comes. What fails is noted there and costs its own row.
    """
    cases = {**_loss_cases(recipe, device, dtype), **_step_cases(recipe, device)}
    selection = {names: measure for names, measure in cases.items() if any(matches(name, only) for name in names)}
    if not selection:
        raise ValueError(f"nothing to measure has {only} in its name: leave --only out")
    journal = journal or Journal()
    for names, measure in selection.items():
        with journal.attempt(" ".join(names)):
            journal.keep([measure()])
    return journal.rows


def peak_bytes(call: Callable[[], object], device: torch.device, prepare: Callable[[], object] = lambda: None) -> int:
    """Most bytes that `call` holds beyond what was held before `prepare`.

    What `prepare` leaves behind counts. What it holds meanwhile does not on a GPU, where cuDNN tries its algorithms the
    first time, with more workspace than it needs later; on a CPU it does.
    """
    if device.type != "cuda":
        with LiveBytes() as counter:
            prepare()
            call()
        return counter.peak
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(device)
    prepare()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated(device) - before


def _loss_cases(recipe: Recipe, device: torch.device, dtype: torch.dtype) -> dict[Names, Callable[[], Row]]:
    config = {"D": recipe.dim, "dtype": short_name(dtype)}
    cases: dict[Names, Callable[[], Row]] = {}

    def add(loss: str, calls: Mapping[str, Callable[[], object]], sizes: dict[str, int], rows: int) -> None:
        least = rows * (8 + recipe.dim * dtype.itemsize) / 1e6  # loss, rank and gradient

        def measured(name: str) -> Row:
            calls[name]()
            return Row(loss, name, "MB", (peak_bytes(calls[name], device) / 1e6,), config | sizes, "eager", least)

        cases.update({(loss, name, *map(str, sizes.values())): partial(measured, name) for name in calls})

    if recipe.dictionary != "batch":
        n, k = recipe.batch_size, recipe.check_queue()
        add("info_nce", _info_nce_calls(n, k, recipe, device, dtype), {"N": n, "K": k}, n)
    for n in sorted({recipe.batch_size, *losses.PAIRS[device.type]}):
        z = [torch.randn(n, recipe.dim, device=device, dtype=dtype).requires_grad_() for _ in range(2)]
        add("nt_xent", losses.ways_to_nt_xent(z, recipe.temperature, "all"), {"N": n}, 2 * n)
    return cases


def _info_nce_calls(
    n: int, k: int, recipe: Recipe, device: torch.device, dtype: torch.dtype
) -> dict[str, Callable[[], object]]:
    d, t = recipe.dim, recipe.temperature
    z = torch.randn(n, d, device=device, dtype=dtype).requires_grad_()
    keys, queue = (F.normalize(torch.randn(rows, d, device=device), dim=1).to(dtype) for rows in (n, k))
    return {
        OURS: lambda: torch.autograd.grad(info_nce(z, keys, queue, t)[0].mean(), z),
        "eager": lambda: losses.published_loss(z, keys, queue, t),
    }


def _step_cases(recipe: Recipe, device: torch.device) -> dict[Names, Callable[[], Row]]:
    on_gpu = device.type == "cuda"
    plain = "published tf32" if on_gpu else "published fp32"  # as in bench/step.py
    config = config_of(recipe)
    starts = {plain: partial(published, recipe, device)}
    precisions = ("fp32", "bf16", "fp16") if on_gpu else ("fp32", "bf16")
    starts |= {f"fastmoco {name}": partial(ours, recipe, device, name) for name in precisions}

    def measure(name: str) -> Row:
        steps: list[Callable[[], object]] = []

        def first() -> None:
            steps.append(starts[name]())
            steps[0]()

        peak = peak_bytes(lambda: steps[0](), device, first)
        return Row("step", name, "MB", (peak / 1e6,), config, plain)

    return {("step", name): partial(measure, name) for name in starts}


def _storage(value: Tensor) -> int:
    return value.untyped_storage()._cdata
