"""The batch that one training step consumes. A separate file, so that code without images does not import DALI."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastmoco.data.plan import Plan, Route, route


@dataclass
class Batch:
    """One rank's part of a training step: N samples, M = N rows of crops, or 2N when symmetric, view by view.

    A dictionary that takes its keys from earlier steps, a bank, has no key crops: there M of the keys is 0.

    A loader with `photometric="dali"` has finished views in the place of crops, float32 [M, 3, S, S] channels-last, and
    those of the keys stand in the rows of the key batch.
    """

    step: int
    epoch: int
    sample: np.ndarray
    """int64 [N]: samples of this rank's query slots, as planned."""
    query_crops: Tensor
    """uint8 [M, S, S, 3]."""
    query_parameters: Tensor
    """float32 [M, 8]: photometric parameters of the query crops."""
    key_crops: Tensor
    """uint8 [M, S, S, 3]: crops that this rank's key encoder sees, in order of arrival."""
    key_parameters: Tensor
    """float32 [M, 8]: photometric parameters of the key crops."""
    key_rows: Tensor
    """int64 [M]: row of the key batch that each key crop is written to."""
    unshuffle: Tensor
    """int64 [views * B]: row of the keys gathered from all ranks, for each key view and slot of the global batch."""
    origins: Tensor
    """int64 [N]: samples whose crops stand here: a bad one's substitute, which may then stand here twice."""


def assemble(plan: Plan, step: int, crops: Tensor, origins: np.ndarray) -> tuple[Batch, Route]:
    """The batch of `step` from the crops of this rank's samples, and the way its key crops go to other ranks.

    crops: uint8 [V, N, S, S, 3], views in the plan's order; origins: int64 [N], samples that the crops are of. With
    several ranks the key crops still have to be exchanged.
    """
    epoch, samples = plan.epoch(step), plan.samples(step)
    own = samples[plan.rank * plan.per_rank :][: plan.per_rank]
    exchange = route([plan.shuffle(step, view) for view in plan.key_views], plan.world, plan.rank)
    arriving = np.empty((len(exchange.slots), 8), np.float32)
    for number, view in enumerate(plan.key_views):
        rows = exchange.views == number
        arriving[rows] = plan.photometric(epoch, samples[exchange.slots[rows]], view)
    key_crops = crops[len(plan.views) - len(plan.key_views) :].flatten(0, 1)
    if plan.world > 1 and plan.key_views:
        key_crops = key_crops[_move(exchange.send_rows, crops.device)]
    batch = Batch(
        step=step,
        epoch=epoch,
        sample=own,
        query_crops=crops[: len(plan.query_views)].flatten(0, 1),
        query_parameters=_move(
            np.concatenate([plan.photometric(epoch, own, view) for view in plan.query_views]), crops.device
        ),
        key_crops=key_crops,
        key_parameters=_move(arriving, crops.device),
        key_rows=_move(exchange.key_rows, crops.device),
        unshuffle=_move(exchange.unshuffle, crops.device),
        origins=_move(origins, crops.device),
    )
    return batch, exchange


def _move(array: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
