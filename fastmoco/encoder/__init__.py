"""Encoders: residual networks with grouped batch norm and a projection head."""

from __future__ import annotations

from typing import TypeVar

import torch

from fastmoco.encoder.norm import BatchNormAct
from fastmoco.encoder.resnet import Bottleneck, Encoder
from fastmoco.recipe import Recipe

__all__ = ["BatchNormAct", "Bottleneck", "Encoder", "build_encoder", "build_kind"]
E = TypeVar("E", bound=Encoder)


def build_encoder(recipe: Recipe) -> Encoder:
    """The recipe's encoder in fp32 on the CPU: a pure function of the recipe, drawing from no global generator."""
    return build_kind(Encoder, recipe)


def build_kind(kind: type[E], recipe: Recipe) -> E:
    """The same as an object of a class derived from `Encoder`."""
    return kind(
        recipe.arch,
        width=recipe.width,
        stem=recipe.stem,
        head=recipe.head,
        dim=recipe.dim,
        bn_group=recipe.bn_group,
        generator=torch.Generator().manual_seed(recipe.seed),
        zero_init=recipe.zero_init,
    )
