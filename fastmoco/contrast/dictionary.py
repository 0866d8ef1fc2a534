"""Where the keys come from that queries are told apart from: a dictionary, in the words of He et al., 2020.

    queue   keys of past batches, by a slowly moving encoder; MoCo
    batch   the other samples of the batch, by the same encoder, with gradient: SimCLR, and MoCo's end-to-end rival
    bank    an entry for each image, from when it was last seen; the memory bank of Wu et al., 2018

A step knows the contract, `Dictionary`, and not which one it has.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmoco.contrast.parts import part
from fastmoco.contrast.shuffle import positives, start_unshuffle
from fastmoco.contrast.views import Views
from fastmoco.data.draws import BANK_STREAM, hash_words
from fastmoco.encoder import Encoder
from fastmoco.kernels.enqueue import cost as enqueue_cost
from fastmoco.kernels.enqueue import enqueue
from fastmoco.kernels.info_nce import cost as info_nce_cost
from fastmoco.kernels.info_nce import info_nce
from fastmoco.kernels.nt_xent import Form, nt_xent
from fastmoco.kernels.nt_xent import cost as nt_xent_cost
from fastmoco.options import UsageError
from fastmoco.parallel import Parallel
from fastmoco.recipe import Recipe

if TYPE_CHECKING:
    from fastmoco.data.batch import Batch

Keys = Callable[[], Tensor]

# Constants of SplitMix64, as in data/plan.py, in int64.
GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
MIX = ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64)))


class Contrast(NamedTuple):
    """What comes of telling this rank's queries apart from the dictionary."""

    loss: Tensor
    """The scalar to minimise, []: this rank's part of a mean over ranks."""
    rank: Tensor
    """int32 [M]: how many keys score above the positive, for each row of the loss."""
    entries: Tensor
    """Unit vectors of all ranks' samples, in sample order: what the dictionary may take in."""


class Dictionary(ABC):
    """The contract. The methods are called once a step, in this order; none reads back to the host."""

    encoder_k: Encoder | None = None
    """The encoder of the keys that the momentum update moves; None if keys come from elsewhere."""

    @abstractmethod
    def start_keys(self, batch: Batch) -> Keys:
        """Begin what needs no query: encode and gather keys, or choose them; the call gives the rest to `contrast`."""

    @abstractmethod
    def views(self, batch: Batch) -> Tensor:
        """What the query encoder sees: [M, C, S, S]."""

    @abstractmethod
    def contrast(self, z: Tensor, keys: Tensor, batch: Batch) -> Contrast:
        """Loss of the raw projections `z` [M, D] of `views`, differentiable in `z`."""

    @abstractmethod
    def commit(self, entries: Tensor, batch: Batch) -> None:
        """Take in the `entries` of `contrast`, after the update. A row that is not finite leaves no trace."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it, by name."""

    @abstractmethod
    def costs(self, rows: int, work: torch.dtype) -> dict[str, tuple[int, int]]:
        """Bytes and operations that a rank's "loss" and "enqueue" cannot avoid, of `rows` projections in `work`."""

    def check(self, state: dict[str, Tensor]) -> None:
        """Raises UsageError if the `tensors` of a saved `state` are of other images than these."""


class Queue(nn.Module):
    """Ring of `size` keys of length `dim`, filled at first with random unit vectors.

    Buffers: `keys` [K, D] in `dtype`; `pointer` int64 [1], the row written next; `count` int64 [], keys ever enqueued.
    Any K goes with any batch: writing wraps around.
    """

    keys: Tensor
    pointer: Tensor
    count: Tensor

    def __init__(self, size: int, dim: int, dtype: torch.dtype, generator: torch.Generator) -> None:
        super().__init__()
        keys = F.normalize(torch.randn(size, dim, generator=generator), dim=1)
        self.register_buffer("keys", keys.to(dtype))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def enqueue(self, keys: Tensor) -> None:
        """Replace the oldest keys by `keys` [B, D], in their order; where one is not finite, the old key stays.

        One bad key would make every later loss infinite or NaN, until the queue had gone round.
        """
        rows = (self.pointer + torch.arange(keys.shape[0], device=keys.device)) % self.keys.shape[0]
        finite = keys.isfinite().all(1, keepdim=True)
        enqueue(self.keys, self.pointer, torch.where(finite, keys, self.keys[rows].to(keys.dtype)))
        self.count.add_(keys.shape[0])

    @property
    def fill_level(self) -> Tensor:
        """Share of the rows that hold keys rather than the random start: 0 to 1, on the device."""
        return (self.count / self.keys.shape[0]).clamp(max=1)


class QueueDictionary(Dictionary):
    """MoCo: negatives are a queue of keys of past batches, encoded by the slowly moving average of the query encoder.

    Keys are encoded in shuffled order, so that batch norm cannot tell which of them belong to the queries beside them.
    With a `key_stream` that happens on a CUDA stream of its own, beside the queries.
    """

    def __init__(
        self,
        recipe: Recipe,
        parallel: Parallel,
        make_views: Views,
        encoder_k: Encoder,
        queue: Queue,
        precision: torch.dtype,
        key_stream: torch.cuda.Stream | None = None,
    ) -> None:
        self.recipe, self.parallel, self.make_views = recipe, parallel, make_views
        self.encoder_k, self.queue = encoder_k, queue
        self._precision, self._key_stream = precision, key_stream

    def start_keys(self, batch: Batch) -> Keys:
        """Keys [views * B, D] of all ranks, in sample order, view by view."""
        if self._key_stream is None:
            return start_unshuffle(self.parallel, self._encode(batch), batch.unshuffle)
        # Safe without record_stream: memory freed on the key stream is reused only after the key stream has waited for
        # the main stream again.
        side = self._key_stream
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            unshuffled = start_unshuffle(self.parallel, self._encode(batch), batch.unshuffle)

        def join() -> Tensor:
            torch.cuda.current_stream().wait_stream(side)
            return unshuffled()

        return join

    def views(self, batch: Batch) -> Tensor:
        """The query view of each sample, or both when symmetric."""
        return self.make_views(batch.query_crops, batch.query_parameters)

    @part("loss")
    def contrast(self, z: Tensor, keys: Tensor, batch: Batch) -> Contrast:
        """InfoNCE (equation 1) against the key of the sample's other view and the queue; symmetric: both directions."""
        positive = positives(keys, self.parallel, self.recipe.views)
        losses, rank = info_nce(z, positive, self.queue.keys, self.recipe.temperature)
        return Contrast(self.recipe.views * losses.mean(), rank, keys)

    @part("enqueue")
    def commit(self, entries: Tensor, batch: Batch) -> None:
        """The oldest keys go."""
        self.queue.enqueue(entries)

    def tensors(self) -> dict[str, Tensor]:
        """Keys, the row written next, and how many keys were ever enqueued."""
        return {"queue": self.queue.keys, "queue_pointer": self.queue.pointer, "queue_count": self.queue.count}

    def costs(self, rows: int, work: torch.dtype) -> dict[str, tuple[int, int]]:
        """A sweep over the queue; the keys of all ranks written."""
        size, dim = self.queue.keys.shape
        keys = rows * self.parallel.world
        return {
            "loss": info_nce_cost(rows, size, dim, work, self.queue.keys.dtype),
            "enqueue": enqueue_cost(size, dim, keys, self.queue.keys.dtype, torch.float32),
        }

    @torch.no_grad()
    def _encode(self, batch: Batch) -> Tensor:
        views = self.make_views(batch.key_crops, batch.key_parameters, batch.key_rows)
        assert self.encoder_k is not None
        with part("key encoder"):
            return F.normalize(self.encoder_k(views).to(self._precision), dim=1)


class BatchDictionary(Dictionary):
    """Positives and negatives are views of the batch, encoded together, with gradients into all of them.

    Views that the shuffle sends to another rank are encoded there, and get their gradient there.
    """

    def __init__(self, recipe: Recipe, parallel: Parallel, make_views: Views) -> None:
        self.recipe, self.parallel, self.make_views = recipe, parallel, make_views

    @property
    def form(self) -> Form:
        """NT-Xent, or InfoNCE against the other view alone: in both directions or, as in MoCo's ablation, in one."""
        if not self.recipe.symmetric:
            return "one-sided"
        return "all" if self.recipe.same_view_negatives else "across"

    def start_keys(self, batch: Batch) -> Keys:
        """How gathered rows [2B] are put in sample order, first all of the first view; int64 [2B]."""
        n, unshuffle = len(batch.query_crops), batch.unshuffle
        sample = torch.arange(len(unshuffle), device=unshuffle.device)
        # Each rank sends its n rows of the first view, then those of the second that it encoded.
        order = torch.cat([sample // n * 2 * n + sample % n, unshuffle // n * 2 * n + n + unshuffle % n])
        return lambda: order

    def views(self, batch: Batch) -> Tensor:
        """Both views, one after the other, in one forward: the second in its shuffled rows."""
        n = len(batch.query_crops)
        rows = torch.cat([torch.arange(n, device=batch.key_rows.device), n + batch.key_rows])
        crops = torch.cat([batch.query_crops, batch.key_crops])
        return self.make_views(crops, torch.cat([batch.query_parameters, batch.key_parameters]), rows)

    @part("loss")
    def contrast(self, z: Tensor, keys: Tensor, batch: Batch) -> Contrast:
        """NT-Xent or InfoNCE, mean over the rows of this rank; entries are the unit vectors of both views [2B, D]."""
        order = keys
        gathered: list[Tensor] = []
        here = self.parallel.rank * len(z)
        rows = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))

        def gather(values: Tensor) -> Tensor:
            gathered.append(self.parallel.all_gather(values).index_select(0, order))
            return gathered[-1]

        a, b = z.chunk(2)
        own = rows[here : here + len(z)]
        loss, rank = nt_xent(a, b, self.recipe.temperature, form=self.form, gather=gather, rows=own)
        return Contrast(loss, rank, gathered[0].to(torch.promote_types(z.dtype, torch.float32)))

    def commit(self, entries: Tensor, batch: Batch) -> None:
        """Nothing is kept."""

    def tensors(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def costs(self, rows: int, work: torch.dtype) -> dict[str, tuple[int, int]]:
        """Two sweeps over the views of all ranks."""
        batch = rows // 2 * self.parallel.world
        return {"loss": nt_xent_cost(rows // 2, batch, self.recipe.dim, work, self.form), "enqueue": (0, 0)}


class BankDictionary(Dictionary):
    """The positive is the sample's own entry, from when it was last seen; negatives are entries drawn for each batch.

    One draw of K entries serves the whole batch, "randomly sampled ... for each mini-batch" (He et al., section 3.2); a
    query's own entry among them is left out. Where K is the number of images or more, all entries are negatives, each
    once, as Wu et al. have it for CIFAR-10. `bank` fp32 [n, D] starts as random unit vectors, so positives are real
    from the second epoch on. `drawn_steps` int64 [] counts steps: with the recipe's seed it decides the draw.
    """

    def __init__(self, recipe: Recipe, parallel: Parallel, make_views: Views, bank: Tensor, work: torch.dtype) -> None:
        self.recipe, self.parallel, self.make_views, self.bank = recipe, parallel, make_views, bank
        self.drawn_steps = torch.zeros((), dtype=torch.int64, device=bank.device)
        self._work, self._draw = work, Draw(recipe.seed, min(recipe.check_queue(), len(bank)), len(bank))

    def start_keys(self, batch: Batch) -> Keys:
        """Entries drawn for this step, int64 [K]."""
        ids = self._draw(self.drawn_steps)
        return lambda: ids

    def views(self, batch: Batch) -> Tensor:
        """The one view of each sample."""
        return self.make_views(batch.query_crops, batch.query_parameters)

    @part("loss")
    def contrast(self, z: Tensor, keys: Tensor, batch: Batch) -> Contrast:
        """InfoNCE against the sample's own entry and the drawn ones; entries are the queries of all ranks [B, D]."""
        positive = self.bank.index_select(0, batch.origins)
        negatives = self.bank.index_select(0, keys).to(self._work)
        losses, rank = info_nce(z, positive, negatives, self.recipe.temperature, row_ids=batch.origins, key_ids=keys)
        q = F.normalize(z.detach().to(self.bank.dtype), dim=1)
        return Contrast(losses.mean(), rank, self.parallel.all_gather(q))

    @part("enqueue")
    def commit(self, entries: Tensor, batch: Batch) -> None:
        """entry <- normalise(m entry + (1 - m) query), for each sample that was shown, on all ranks alike."""
        ids, m = self.parallel.all_gather(batch.origins), self.recipe.bank_momentum
        old = self.bank.index_select(0, ids)
        new = F.normalize(m * old + (1 - m) * entries, dim=1)
        new = torch.where(entries.isfinite().all(1, keepdim=True), new, old)
        # A substitute may stand in the batch twice. Its last row counts, and all write that one: the order of writes
        # is not defined on a GPU.
        place = torch.arange(len(ids), device=ids.device)
        last = torch.where(ids[:, None] == ids[None, :], place, -1).amax(1)
        self.bank.index_copy_(0, ids, new.index_select(0, last))
        self.drawn_steps.add_(1)

    def tensors(self) -> dict[str, Tensor]:
        """The bank, and the steps that it drew negatives for."""
        return {"bank": self.bank, "bank_steps": self.drawn_steps}

    def costs(self, rows: int, work: torch.dtype) -> dict[str, tuple[int, int]]:
        """A sweep over the drawn entries, which are copied first; entries of all ranks read and written."""
        size, dim, item = self._draw.count, self.bank.shape[1], self.bank.element_size()
        bytes_moved, flops = info_nce_cost(rows, size, dim, work, work)
        writes = rows * self.parallel.world * dim
        copies = size * dim * (item + work.itemsize)
        return {"loss": (bytes_moved + copies, flops), "enqueue": (3 * writes * item, 6 * writes)}

    def check(self, state: dict[str, Tensor]) -> None:
        """Raises UsageError if the bank of `state` is of another number of images."""
        before = state.get("bank")
        if before is not None and len(before) != len(self.bank):
            raise UsageError(
                f"the bank holds {len(before):,} images, the data {len(self.bank):,}: go on with the images it was "
                "made of, or start another run"
            )


class Draw:
    """`count` numbers below `size` for each step, uniform with replacement: the plan's hash of (seed, step, number).

    All of them, in order, where `count` is `size`. In integers of the device: there is no generator, and nothing is
    read back.
    """

    def __init__(self, seed: int, count: int, size: int) -> None:
        self.count, self.size = count, size
        self._start = int(hash_words(seed, BANK_STREAM)[0].astype(np.int64))

    def __call__(self, step: Tensor) -> Tensor:
        """The draw of `step`, int64 [], as int64 [count]."""
        if self.count == self.size:
            return torch.arange(self.size, device=step.device)
        state = _mix(self._start + (step + 1) * GOLDEN)
        numbers = _mix(state + torch.arange(1, self.count + 1, device=step.device) * GOLDEN)
        return _shift(numbers, 1) % self.size


def _mix(x: Tensor) -> Tensor:
    for bits, factor in MIX:
        x = (x ^ _shift(x, bits)) * factor
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    # int64 brings in its sign from the left, which uint64 would not.
    return (x >> bits) & ((1 << (64 - bits)) - 1)
