"""The size at which steps are measured and profiled: on a GPU as published, on a CPU what takes a minute."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from fastmoco.bench.options import Bench, Profile
from fastmoco.recipe import PUBLISHED_IMAGES, Recipe

# Flags override them. Much smaller views would time layers of 2 x 2 pixels, whose weights outweigh their activations:
# nothing that anyone trains.
ON_A_CPU: dict[str, Any] = {"arch": "resnet18", "batch_size": 32, "crop_size": 112, "queue_size": 4096}


def at_size(recipe: Recipe, options: Bench | Profile, device: torch.device) -> Recipe:
    """`recipe` at the size that `options` ask for: left out, its own, and on a CPU no larger than ON_A_CPU.

    Recipes of small views are trained on CPUs as they are, so that they are measured so.
    """
    small: dict[str, Any] = {}
    if device.type != "cuda" and recipe.crop_size > ON_A_CPU["crop_size"]:
        small = {name: value for name, value in ON_A_CPU.items() if name == "arch" or getattr(recipe, name) > value}
        # The batch stays whole batch-norm groups.
        group = max(1, recipe.bn_group)
        small["batch_size"] = max(1, ON_A_CPU["batch_size"] // group) * group
        if recipe.dictionary == "batch":  # which has no queue
            small.pop("queue_size", None)
    return dataclasses.replace(recipe, **small | overrides(options)).for_images(PUBLISHED_IMAGES)


def overrides(options: Bench | Profile) -> dict[str, Any]:
    """The sizes that `options` name."""
    return {name: getattr(options, name) for name in ON_A_CPU if getattr(options, name) is not None}
