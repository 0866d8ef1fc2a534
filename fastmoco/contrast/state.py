"""The state of a step, by name: everything that the next step depends on, to save, to load and to put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from fastmoco.contrast.dictionary import Dictionary
from fastmoco.contrast.update import Update

LOSS_SCALE = ("loss_scale", "loss_scale_good_steps")


class Stateful(Protocol):
    """What a step holds that the next one depends on."""

    update: Update
    dictionary: Dictionary

    @property
    def encoder_q(self) -> nn.Module:
        """The encoder that is trained."""

    @property
    def encoder_k(self) -> nn.Module | None:
        """The momentum encoder, or None if the dictionary needs none."""


def tensors(step: Stateful) -> dict[str, Tensor]:
    """The live tensors of `step`: fp32 masters and batch-norm buffers of both encoders, velocity, dictionary."""
    update = step.update
    sides = {"encoder_q": (step.encoder_q, update.q), "encoder_k": (step.encoder_k, update.k)}
    state = {
        f"{side}.{name}": masters.get(name, value)
        for side, (encoder, masters) in sides.items()
        if encoder is not None
        for name, value in encoder.state_dict().items()
    }
    state |= {f"velocity.{name}": value for name, value in update.velocity.items()}
    state |= step.dictionary.tensors()
    if update.scale is not None:
        state |= dict(zip(LOSS_SCALE, (update.scale.value, update.scale.good_steps), strict=True))
    return state


@torch.no_grad()
def load(step: Stateful, state: dict[str, Tensor]) -> None:
    """Copy `state` into the tensors of `step`; raises ValueError if names or shapes do not fit its recipe.

    A loss scale is taken where both sides have one, so that a run may go on in another precision.
    """
    step.dictionary.check(state)
    live = tensors(step)
    common = live.keys() & state.keys()
    wrong = [f"{name} is missing" for name in sorted(live.keys() - common - {*LOSS_SCALE})]
    wrong += [f"{name} has no place" for name in sorted(state.keys() - common - {*LOSS_SCALE})]
    wrong += [f"{name} has another shape" for name in sorted(common) if live[name].shape != state[name].shape]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"the state does not fit the recipe: {', '.join(wrong[:3])}{more}")
    for name in common:
        live[name].copy_(state[name])
    step.update.refresh()


@contextmanager
def restoring(step: Stateful) -> Iterator[None]:
    """Put the state of `step` back, in place, when the block ends.

    Meanwhile the host keeps it: a bank may take a large part of a GPU's memory.
    """
    before = {name: value.to("cpu", copy=True) for name, value in tensors(step).items()}
    try:
        yield
    finally:
        load(step, before)
