"""One training step of MoCo: algorithm 1 of He et al., 2020 (arXiv:1911.05722), from uint8 crops to new weights.

The order is the paper's: SGD, then the momentum update, then enqueue. The released code makes the momentum update at
the start of the next step, which is the same arithmetic: the very first one changes nothing, since key equals query.

The host reads nothing back and nothing that persists is reallocated, so that a CUDA graph can hold a step.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cached_property
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastmoco.contrast import build, state
from fastmoco.contrast.backends import Backend
from fastmoco.contrast.build import EncoderBackend
from fastmoco.contrast.dictionary import Contrast
from fastmoco.contrast.norm_statistics import Statistics
from fastmoco.contrast.parts import part
from fastmoco.contrast.update import PRECISIONS, Precision, Update, resolve_precision
from fastmoco.contrast.views import Views
from fastmoco.encoder import Encoder
from fastmoco.parallel import Parallel
from fastmoco.recipe import Recipe

if TYPE_CHECKING:
    from fastmoco.data.batch import Batch


class Metrics(NamedTuple):
    """This rank's figures of one step, each a tensor [] on the device."""

    loss: Tensor
    """InfoNCE, mean over the rank's samples; symmetric: sum of both directions."""
    top1: Tensor
    """Percent of queries whose positive scores above every negative."""
    top5: Tensor
    """Percent of queries whose positive is among the five highest."""
    nonfinite: Tensor
    """int32: 1 where loss or gradients are infinite or NaN. An overflow that the loss scale takes care of is none."""
    spread: Tensor
    """Standard deviation of all ranks' keys, mean over dimensions, times sqrt(D): 1 when even, 0 when collapsed."""


class Step:
    """Encoders, dictionary and optimiser of a run, and the step that advances them.

    Differences from the paper's lines: keys are encoded in shuffled order; loss, top-k and gradient come from one pass
    over the queue; SGD and momentum update are one kernel.

    `parallel` says which rank this is, and its device; left out, it is a process alone, on a GPU where there is one.
    `precision` overrides the recipe's. TF32 is a process-wide switch in torch, which this sets. With several ranks,
    `step` and `state` are collective: every rank calls them. `images`: how many there are, which a bank needs.

    The keyword arguments choose implementations; results differ by rounding only. `encoder`: batch norm by our kernels,
    in plain torch, or plain torch through torch.compile. `update`: see `contrast/backends.py`. `key_stream`: keys are
    encoded on a CUDA stream of their own, beside the queries. `channels`: of the views; left out, 4 on a GPU.
    `deterministic`: on a GPU, only algorithms that give the same bits each time, as `contrast/algorithms.py` sets them
    for the process. Raises UsageError if the device or the installation lacks what these need.
    """

    def __init__(
        self,
        recipe: Recipe,
        parallel: Parallel | None = None,
        precision: Precision | None = None,
        *,
        encoder: EncoderBackend = "fused",
        update: Backend = "fused",
        key_stream: bool = False,
        channels: Literal[3, 4] | None = None,
        deterministic: bool = False,
        images: int | None = None,
    ) -> None:
        parallel = parallel or Parallel.alone()
        if parallel.device.type == "cuda" or parallel.world > 1:
            # torch imports this when the first custom operator or DDP runs. That import keeps every calling frame
            # alive, and with it the first step's autograd graph. So import it here. A CPU alone needs none of it.
            import torch._dynamo  # noqa: F401
        recipe.check_ranks(parallel.world)
        build.check_device(recipe, parallel, key_stream=key_stream, apex=update == "apex")
        self.recipe, self.parallel = recipe, parallel
        self.precision = resolve_precision(precision or recipe.precision, parallel.device)
        numbers = PRECISIONS[self.precision]
        build.set_switches(parallel.device, numbers.tf32, deterministic)
        self.channels = channels or (4 if parallel.device.type == "cuda" else 3)
        make_views = Views(recipe.augmentation, numbers.work, self.channels)
        self.encoder_q: Encoder = build.build_encoder_q(recipe, parallel.device)
        self.dictionary = build.build_dictionary(
            recipe, parallel, numbers, self.encoder_q, make_views, key_stream=key_stream, images=images
        )
        self.update = Update(self.encoder_q, self.dictionary.encoder_k, recipe, numbers, update)
        encoders = [self.encoder_q] if self.encoder_k is None else [self.encoder_q, self.encoder_k]
        build.choose_backend(encoder, *encoders)
        build.share_statistics(recipe, parallel, *encoders)
        self.statistics = Statistics(*encoders)
        self.capture_stream = build.stream(parallel.device, "capture")

    def step(self, batch: Batch, lr: float) -> Metrics:
        """Train on `batch` with learning rate `lr`."""
        self.update.lr.fill_(lr)
        return self.advance(batch)

    def advance(self, batch: Batch) -> Metrics:
        """Train on `batch` with the learning rate in `update.lr`: the part that a CUDA graph can hold.

        Where something becomes infinite or NaN, weights, running statistics and dictionary keep what they had.
        """
        before = self.statistics.snapshot()

        keys = self.dictionary.start_keys(batch)  # without gradient; gathered while the queries are encoded
        z = self.queries(batch)
        contrast = self.dictionary.contrast(z, keys(), batch)  # loss, against the positive and the dictionary
        self.backward(contrast.loss)  # over ranks gradients are averaged
        finite = self.sgd_and_momentum_update()  # q <- SGD(q), then k <- m k + (1 - m) q
        self.dictionary.commit(contrast.entries, batch)  # enqueue: the oldest keys go

        self.statistics.keep_finite(before)
        return self.metrics(contrast, finite)

    def queries(self, batch: Batch) -> Tensor:
        """Raw projections of the views that take a gradient."""
        views = self.dictionary.views(batch)
        with part("query encoder"):
            return self._query(views)

    @part("backward")
    def backward(self, loss: Tensor) -> None:
        """Gradients of `loss`."""
        self.update.backward(loss)

    @part("update")
    def sgd_and_momentum_update(self) -> Tensor:
        """One kernel for both, and for the casts to working copies; bool [], whether all gradients were finite."""
        return self.update.apply()

    def metrics(self, contrast: Contrast, finite: Tensor) -> Metrics:
        """Figures of the step, on the device."""
        if self.update.scale is not None:
            finite = finite | (self.update.scale.value > 1)
        loss, entries = contrast.loss.detach(), contrast.entries
        top1, top5 = (100 * (contrast.rank < k).mean(dtype=torch.float32) for k in (1, 5))
        spread = entries.std(0, correction=0).mean() * entries.shape[1] ** 0.5
        return Metrics(loss, top1, top5, (~(finite & loss.isfinite())).to(torch.int32), spread)

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, by name: fp32 masters, batch-norm buffers, velocity, dictionary.

        The tensors are live: copy them before the next step. Over several ranks running statistics become their mean,
        here and in this rank's encoders.
        """
        self.statistics.merge(self.parallel)
        return state.tensors(self)

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Continue from what `state` gave; raises ValueError if names or shapes do not fit this recipe."""
        state.load(self, tensors)

    def rehearsal(self) -> AbstractContextManager[None]:
        """Whatever the steps inside do to the state is undone at the end, in place."""
        return state.restoring(self)

    @property
    def encoder_k(self) -> Encoder | None:
        """The dictionary's momentum encoder, where it has one."""
        return self.dictionary.encoder_k

    @cached_property
    def _query(self) -> nn.Module:
        # Made in the first step and so on its stream, a graph's or none: there DDP sums gradients from then on.
        return build.distribute(self.encoder_q, self.parallel)
