"""Where the keys come from that queries are told apart from: a dictionary, in the words of He et al., 2020.

A step knows the contract, `Dictionary`, and not which one it has.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmoco.contrast.parts import part
from fastmoco.contrast.shuffle import positives, start_unshuffle
from fastmoco.contrast.views import Views
from fastmoco.encoder import Encoder
from fastmoco.kernels.enqueue import enqueue
from fastmoco.kernels.info_nce import info_nce
from fastmoco.parallel import Parallel
from fastmoco.recipe import Recipe

if TYPE_CHECKING:
    from fastmoco.data.batch import Batch

Keys = Callable[[], Tensor]


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
    """The encoder of the keys that the momentum update moves; None where keys come from elsewhere."""

    @abstractmethod
    def start_keys(self, batch: Batch) -> Keys:
        """Begin to encode and gather keys, without gradient; the returned call gives them, for `contrast`."""

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


class Queue(nn.Module):
    """Ring of `size` keys of length `dim`, filled at first with random unit vectors.

    Buffers: `keys` [K, D] in `dtype`; `pointer` int64 [1], the row written next; `count` int64 [], keys ever enqueued.
    Any K goes with any batch: writing wraps around.
    """

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
    def filled(self) -> Tensor:
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
        self._key_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._key_stream):
            unshuffled = start_unshuffle(self.parallel, self._encode(batch), batch.unshuffle)

        def join() -> Tensor:
            torch.cuda.current_stream().wait_stream(self._key_stream)
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

    @torch.no_grad()
    def _encode(self, batch: Batch) -> Tensor:
        views = self.make_views(batch.key_crops, batch.key_parameters, batch.key_rows)
        with part("key encoder"):
            return F.normalize(self.encoder_k(views).to(self._precision), dim=1)
