"""The encoder that a run or a checkpoint ends with, ready to be used: `fastmoco.load` gives one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastmoco.data.transform import Transform
from fastmoco.encoder import Encoder, build_kind
from fastmoco.recipe import Recipe

HOW = "torch.stack([encoder.transform(picture) for picture in pictures])"


class Pretrained(Encoder):
    """The query encoder of a run, the one that is kept, with what belongs to it. An `nn.Module`.

    It is in evaluation mode and frozen (no parameter requires a gradient). To fine-tune it:
    `encoder.requires_grad_(True).train()`; in training mode batch norm takes its statistics over groups of
    `recipe.bn_group` samples, so batches must be multiples of that. Names of weights are torchvision's, and those of
    the projection head, `fc`.
    """

    recipe: Recipe
    """What it was trained with."""
    step: int
    """Steps it was trained for."""
    transform: Transform
    """Picture (Pillow image, path or uint8 array) -> float32 [3, S, S], as evaluation takes it."""

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.conv1.weight.device

    def features(self, images: Tensor) -> Tensor:
        """Features [N, feature_dim] of images [N, 3, S, S], before the projection head; not of unit length.

        Images are float and normalised, as `transform` gives them: `torch.stack([transform(p) for p in pictures])`.
        They are taken to the device of the weights. Raises ValueError for anything else.
        """
        received = (
            f"{images.dtype} {list(images.shape)}" if isinstance(images, Tensor) else f"a {type(images).__name__}"
        )
        if not isinstance(images, Tensor) or images.dim() != 4 or not images.is_floating_point():
            raise ValueError(f"images must be float [N, 3, S, S], not {received}: {HOW}")
        if images.shape[1] not in (3, 4):
            raise ValueError(f"images must have their three colours in dimension 1, not {received}: {HOW}")
        return super().features(images.to(self.device))

    def forward(self, images: Tensor) -> Tensor:
        """Projections [N, recipe.dim] of images [N, 3, S, S]: what the loss compared. `features` are for other uses."""
        return super().forward(images)


def pretrained(recipe: Recipe, weights: Mapping[str, Tensor] | None, step: int, device: torch.device) -> Pretrained:
    """The encoder of `recipe` on `device` with `weights`, by torchvision's names; None: those that the seed draws."""
    encoder = build_kind(Pretrained, recipe)
    if weights is not None:
        encoder.load_state_dict(weights)
    encoder.recipe, encoder.step, encoder.transform = recipe, step, Transform.of(recipe)
    encoder = encoder.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return encoder.eval().requires_grad_(False)
