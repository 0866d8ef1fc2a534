"""A batch of noise in place of images: to time a step without a loader, and to capture one before there is a loader."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from fastmoco.data.batch import Batch, assemble
from fastmoco.data.plan import Plan
from fastmoco.parallel import Parallel
from fastmoco.recipe import Recipe

IMAGE_SIDE = 500  # pixels; the plan draws boxes and needs some size


def noise_batch(recipe: Recipe, parallel: Parallel) -> Batch:
    """This rank's batch of step 0: random crops, with the parameters and the shuffle that the plan gives it."""
    recipe = dataclasses.replace(recipe, order="auto")  # one by windows wants shards
    plan = Plan(recipe, np.full((recipe.batch_size, 2), IMAGE_SIDE, np.int32), parallel.world, parallel.rank)
    generator = torch.Generator().manual_seed(recipe.seed)
    shape = (len(plan.views), plan.per_rank, recipe.crop_size, recipe.crop_size, 3)
    crops = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(parallel.device)
    own = plan.samples(0)[parallel.rank * plan.per_rank :][: plan.per_rank]
    batch, _ = assemble(plan, 0, crops, own)  # noise need not travel: as many crops come as go
    return batch


def noise_images(recipe: Recipe) -> int:
    """How many images the noise passes for, where a dictionary has an entry for each: twice what it draws of them."""
    return max(recipe.batch_size, 2 * recipe.check_queue()) if recipe.dictionary == "bank" else recipe.batch_size
