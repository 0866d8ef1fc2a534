"""One training step of MoCo, whole: from uint8 crops to the updated encoders and queue.

The published order is momentum update, key forward, query forward, loss, SGD (He et al., 2020, algorithm 1). Updating
the key right after SGD is the same arithmetic one line earlier, since the very first update of a copy changes nothing;
it lets SGD and momentum update be one kernel. Negatives are the K keys enqueued before this step.

Nothing is read back to the host and nothing that persists is reallocated, so that a CUDA graph can hold a step.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, cached_property
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastmoco.contrast.backends import Backend
from fastmoco.contrast.dictionary import Queue
from fastmoco.contrast.parts import part
from fastmoco.contrast.shuffle import positives, start_unshuffle
from fastmoco.contrast.update import PRECISIONS, Precision, Update, resolve_precision
from fastmoco.encoder import BatchNormAct, Bottleneck, Encoder, build_encoder
from fastmoco.kernels.info_nce import info_nce
from fastmoco.kernels.photometric import photometric
from fastmoco.options import UsageError
from fastmoco.parallel import Parallel
from fastmoco.recipe import Recipe

if TYPE_CHECKING:
    from fastmoco.data.batch import Batch

EncoderBackend = Literal["fused", "fused-key", "eager", "compile"]

# What DDP calls copying the first rank's buffers to the others; torch 2.13 renamed it.
BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel).parameters
)
QUEUE_SEED = 1 << 63  # added to the recipe's seed, which is smaller: the encoder draws from the seed itself


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
    """Encoders, queue and optimiser of a run, and the step that advances them.

    `precision` overrides the recipe's. TF32 is a process-wide switch in torch, which this sets. With several ranks,
    `step` and `state` are collective: every rank calls them.

    The rest is how, and changes rounding at most. `encoder`: batch norm by our kernels ("fused-key": on a GPU the keys'
    bottlenecks by `encoder/forward_only.py`), in plain torch, or plain torch through torch.compile. `update`: see
    `contrast/backends.py`. `key_stream`: keys are encoded on a CUDA stream of their own, beside the queries. UsageError
    where the device or the installation lacks what these need.
    """

    def __init__(
        self,
        recipe: Recipe,
        parallel: Parallel,
        precision: Precision | None = None,
        *,
        encoder: EncoderBackend = "fused",
        update: Backend = "fused",
        key_stream: bool = False,
        channels: Literal[3, 4] | None = None,
    ) -> None:
        # The first custom operator imports it, and the import keeps the frames of all callers alive: that step's graph.
        import torch._dynamo  # noqa: F401

        recipe.check_ranks(parallel.world)
        self.recipe, self.parallel = recipe, parallel
        self.precision = resolve_precision(precision or recipe.precision, parallel.device)
        self._numbers = numbers = PRECISIONS[self.precision]
        _allow_tf32(numbers.tf32)
        self.encoder_q: Encoder = build_encoder(recipe).to(parallel.device).train()
        self.encoder_k: Encoder = copy.deepcopy(self.encoder_q).requires_grad_(False)
        self.update = Update(self.encoder_q, self.encoder_k, recipe, numbers, update)
        generator = torch.Generator().manual_seed(recipe.seed + QUEUE_SEED)
        dtype = numbers.work if recipe.queue_dtype == "auto" else getattr(torch, recipe.queue_dtype)
        self.queue = Queue(recipe.check_queue(), recipe.dim, dtype, generator).to(parallel.device)
        on_gpu = parallel.device.type == "cuda"
        self.channels = channels or (4 if on_gpu else 3)
        for flag, wanted in (("--key-stream", key_stream), ("--update apex", update == "apex")):
            if wanted and not on_gpu:
                raise UsageError(f"{flag} needs a GPU: leave it out")
        self.capture_stream = _stream(parallel.device, "capture") if on_gpu else None
        self._key_stream = _stream(parallel.device, "keys") if on_gpu and key_stream else None
        # Shapes never change, so cuDNN may time its algorithms once. A process-wide switch, as the published code sets.
        torch.backends.cudnn.benchmark = on_gpu or torch.backends.cudnn.benchmark
        _choose_backend(self.encoder_q, self.encoder_k, encoder)
        self._statistics = _join_statistics(self.encoder_q, self.encoder_k)

    def step(self, batch: Batch, lr: float) -> Metrics:
        """Train on `batch` with learning rate `lr`."""
        self.update.lr.fill_(lr)
        return self.advance(batch)

    def advance(self, batch: Batch) -> Metrics:
        """Train on `batch` with the learning rate in `update.lr`: the part that a CUDA graph can hold.

        Where something becomes infinite or NaN, weights, running statistics and queue keep what they had.
        """
        before = self._statistics.clone()
        unshuffled = self._start_keys(batch)
        with part("photometric"):
            views = self._views(batch.query_crops, batch.query_parameters)
        with part("query encoder"):
            z_q = self._query(views)
        keys = unshuffled()
        with part("loss"):
            positive = positives(keys, self.parallel, self.recipe.views)
            losses, rank = info_nce(z_q, positive, self.queue.keys, self.recipe.temperature)
            loss = self.recipe.views * losses.mean()
        with part("backward"):
            self.update.backward(loss)
        with part("update"):
            finite = self.update.apply()
        with part("enqueue"):
            self.queue.enqueue(keys)
        self._statistics.copy_(torch.where(self._statistics.isfinite().all(), self._statistics, before))
        return self._metrics(loss.detach(), rank, finite, keys)

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Whatever the steps inside do to the state is undone at the end, in place."""
        before = {name: value.clone() for name, value in self._tensors().items()}
        try:
            yield
        finally:
            self.load(before)

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, by name: fp32 masters, batch-norm buffers, velocity, queue.

        The tensors are live: copy them before the next step. Over several ranks running statistics become their mean,
        here and in this rank's encoders.
        """
        self._merge_statistics()
        return self._tensors()

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Continue from what `state` gave; ValueError where names or shapes do not fit this recipe.

        A loss scale is taken where both sides have one, so that a run may go on in another precision.
        """
        live = self._tensors()
        optional = {"loss_scale", "loss_scale_good_steps"}
        wrong = sorted((set(live) ^ set(state)) - optional)
        wrong += [name for name in live.keys() & state.keys() if live[name].shape != state[name].shape]
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            names = ", ".join(wrong[:3]) + more
            raise ValueError(f"the state does not fit the recipe: {names} missing, extra or of another shape")
        for name in live.keys() & state.keys():
            live[name].copy_(state[name])
        self.update.refresh()

    @cached_property
    def _query(self) -> nn.Module:
        # Made in the first step and so on its stream, a graph's or none: there DDP sums the gradients from then on.
        if self.parallel.world == 1:
            return self.encoder_q
        return DistributedDataParallel(
            self.encoder_q,
            device_ids=None if self.capture_stream is None else [self.parallel.device],
            **{BUFFERS: False},
            gradient_as_bucket_view=True,
            static_graph=True,
        )

    def _start_keys(self, batch: Batch) -> Callable[[], Tensor]:
        if self._key_stream is None:
            return start_unshuffle(self.parallel, self._encode_keys(batch), batch.unshuffle)
        # What is allocated there is used there again only after the next wait for this stream: no tensor is lost early.
        self._key_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._key_stream):
            unshuffled = start_unshuffle(self.parallel, self._encode_keys(batch), batch.unshuffle)

        def join() -> Tensor:
            torch.cuda.current_stream().wait_stream(self._key_stream)
            return unshuffled()

        return join

    def _views(self, crops: Tensor, parameters: Tensor, rows: Tensor | None = None) -> Tensor:
        if crops.is_floating_point():  # DALI has made the views, in their rows
            return crops.to(self._numbers.work)
        drawn = self.recipe.augmentation
        return photometric(
            crops,
            parameters,
            drawn.mean,
            drawn.std,
            dtype=self._numbers.work,
            channels=self.channels,
            rows=rows,
            max_sigma=drawn.blur_sigma[1],
        )

    @torch.no_grad()
    def _encode_keys(self, batch: Batch) -> Tensor:
        with part("photometric"):
            views = self._views(batch.key_crops, batch.key_parameters, batch.key_rows)
        with part("key encoder"):
            return F.normalize(self.encoder_k(views).to(self._numbers.master), dim=1)

    def _metrics(self, loss: Tensor, rank: Tensor, finite: Tensor, keys: Tensor) -> Metrics:
        if self.update.scale is not None:
            finite = finite | (self.update.scale.value > 1)
        top1, top5 = (100 * (rank < k).mean(dtype=torch.float32) for k in (1, 5))
        spread = keys.std(0, correction=0).mean() * keys.shape[1] ** 0.5
        return Metrics(loss, top1, top5, (~(finite & loss.isfinite())).to(torch.int32), spread)

    def _merge_statistics(self) -> None:
        if self.parallel.world == 1:
            return
        self._statistics.copy_(self.parallel.mean(self._statistics))

    def _tensors(self) -> dict[str, Tensor]:
        update, queue = self.update, self.queue
        sides = {"encoder_q": (self.encoder_q, update.q), "encoder_k": (self.encoder_k, update.k)}
        tensors = {
            f"{side}.{name}": masters.get(name, value)
            for side, (encoder, masters) in sides.items()
            for name, value in encoder.state_dict().items()
        }
        tensors |= {f"velocity.{name}": value for name, value in update.velocity.items()}
        tensors |= {"queue": queue.keys, "queue_pointer": queue.pointer, "queue_count": queue.count}
        if update.scale is not None:
            tensors |= {"loss_scale": update.scale.value, "loss_scale_good_steps": update.scale.good_steps}
        return tensors


@cache
def _stream(device: torch.device, purpose: str) -> torch.cuda.Stream:
    # One for all steps of a process: memory never passes from one stream to another, not even in a shared pool.
    return torch.cuda.Stream(device)


def _choose_backend(encoder_q: Encoder, encoder_k: Encoder, backend: EncoderBackend) -> None:
    if backend == "fused-key":
        for module in encoder_k.modules():
            if isinstance(module, Bottleneck):
                module.forward_only = True
    if backend not in ("eager", "compile"):
        return
    for encoder in (encoder_q, encoder_k):
        for module in encoder.modules():
            if isinstance(module, BatchNormAct):
                module.impl = "torch"
        if backend == "compile":
            encoder.compile()


def _join_statistics(*encoders: Encoder) -> Tensor:
    # One tensor, of which the running statistics become views, so that all are kept, restored or averaged at once.
    modules = [module for encoder in encoders for module in encoder.modules()]
    places = [
        (module._buffers, name)
        for module in modules
        for name, buffer in module._buffers.items()
        if buffer is not None and buffer.is_floating_point()
    ]
    joined = torch.cat([buffers[name] for buffers, name in places])
    parts = joined.split([buffers[name].numel() for buffers, name in places])
    for (buffers, name), part_of_joined in zip(places, parts, strict=True):
        buffers[name] = part_of_joined
    return joined


def _allow_tf32(allow: bool) -> None:
    torch.set_float32_matmul_precision("high" if allow else "highest")
    torch.backends.cudnn.allow_tf32 = allow
