"""What a step is made of: encoders and who computes them, switches of torch, streams, DistributedDataParallel."""

from __future__ import annotations

import copy
import inspect
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastmoco.contrast.algorithms import choose_algorithms
from fastmoco.contrast.dictionary import BankDictionary, BatchDictionary, Dictionary, Queue, QueueDictionary
from fastmoco.contrast.update import Numbers
from fastmoco.contrast.views import Views
from fastmoco.encoder import BatchNormAct, Encoder, build_encoder
from fastmoco.options import UsageError
from fastmoco.parallel import Parallel
from fastmoco.recipe import Recipe

EncoderBackend = Literal["fused", "eager", "compile"]

# What DDP calls copying the first rank's buffers to the others; torch 2.13 renamed it.
BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel).parameters
)
QUEUE_SEED = 1 << 63  # added to the recipe's seed, which is smaller: the encoder draws from the seed itself


def check_device(recipe: Recipe, parallel: Parallel, *, key_stream: bool, apex: bool) -> None:
    """Raises UsageError if an option needs a GPU and there is none, or keys that are encoded apart."""
    if key_stream and not recipe.bn_group and parallel.world > 1:
        raise UsageError("--key-stream does not go with --bn-group 0 on several ranks: ranks would gather in any order")
    if key_stream and recipe.dictionary != "queue":
        raise UsageError(f"--key-stream needs a key encoder, which a {recipe.dictionary} has not: leave it out")
    for flag, is_on in (("--key-stream", key_stream), ("--update apex", apex)):
        if is_on and parallel.device.type != "cuda":
            raise UsageError(f"{flag} needs a GPU: leave it out")


def set_switches(device: torch.device, tf32: bool, deterministic: bool) -> None:
    """Set torch's switches, which are process-wide: TF32, and on a GPU how algorithms are chosen."""
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    choose_algorithms(device, deterministic)


def build_encoder_q(recipe: Recipe, device: torch.device) -> Encoder:
    """The query encoder on `device`, in training mode."""
    return build_encoder(recipe).to(device).train()


def share_statistics(recipe: Recipe, parallel: Parallel, *encoders: Encoder) -> None:
    """Let batch norm take its statistics over the rows of all ranks, where the recipe has one group for all."""
    if recipe.bn_group or parallel.world == 1:
        return
    for encoder in encoders:
        for module in encoder.modules():
            if isinstance(module, BatchNormAct):
                module.gather = parallel.all_gather


def choose_backend(backend: EncoderBackend, *encoders: Encoder) -> None:
    """Let `backend` compute batch norm in `encoders`, and compile them where it says so."""
    if backend not in ("eager", "compile"):
        return
    for encoder in encoders:
        for module in encoder.modules():
            if isinstance(module, BatchNormAct):
                module.impl = "torch"
        if backend == "compile":
            encoder.compile()


def build_dictionary(
    recipe: Recipe,
    parallel: Parallel,
    numbers: Numbers,
    encoder_q: Encoder,
    make_views: Views,
    *,
    key_stream: bool,
    images: int | None,
) -> Dictionary:
    """The recipe's dictionary at its random start, drawn from the recipe's seed; keys start equal to queries.

    Raises ValueError if it is a bank and the number of `images` is not given.
    """
    if recipe.dictionary == "batch":
        return BatchDictionary(recipe, parallel, make_views)
    generator = torch.Generator().manual_seed(recipe.seed + QUEUE_SEED)
    if recipe.dictionary == "bank":
        return BankDictionary(
            recipe, parallel, make_views, _bank(recipe, numbers, generator, images).to(parallel.device), numbers.work
        )
    dtype = numbers.work if recipe.queue_dtype == "auto" else getattr(torch, recipe.queue_dtype)
    queue = Queue(recipe.check_queue(), recipe.dim, dtype, generator).to(parallel.device)
    encoder_k = copy.deepcopy(encoder_q).requires_grad_(False)
    side = stream(parallel.device, "keys") if key_stream else None
    return QueueDictionary(recipe, parallel, make_views, encoder_k, queue, numbers.master, side)


def distribute(encoder: Encoder, parallel: Parallel) -> nn.Module:
    """`encoder` with gradients averaged over ranks; itself where there is one rank.

    Call it in the first step and so on that step's stream, a graph's or none: there DDP sums gradients from then on.
    """
    if parallel.world == 1:
        return encoder
    return DistributedDataParallel(
        encoder,
        device_ids=[parallel.device] if parallel.device.type == "cuda" else None,
        **{BUFFERS: False},  # type: ignore[arg-type]
        gradient_as_bucket_view=True,
        static_graph=True,
    )


@cache
def stream(device: torch.device, purpose: str) -> torch.cuda.Stream | None:
    """The stream of a GPU for `purpose`, one for all steps of a process; None on a CPU.

    Memory never passes from one stream to another, not even in a shared pool.
    """
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def _bank(recipe: Recipe, numbers: Numbers, generator: torch.Generator, images: int | None) -> Tensor:
    if images is None:
        raise ValueError("a bank has an entry for each image: say how many, Step(..., images=n)")
    entries = F.normalize(torch.randn(images, recipe.dim, generator=generator), dim=1)
    return entries.to(numbers.master if recipe.queue_dtype == "auto" else getattr(torch, recipe.queue_dtype))
