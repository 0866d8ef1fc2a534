"""A batch of noise in place of images: to time a step without a loader, and to capture one before there is a loader."""

from __future__ import annotations

import numpy as np
import torch

from fastmoco.data.batch import Batch
from fastmoco.data.plan import Plan, route
from fastmoco.parallel import Parallel
from fastmoco.recipe import Recipe

IMAGE_SIDE = 500  # pixels; the plan draws boxes and needs some size


def noise_batch(recipe: Recipe, parallel: Parallel) -> Batch:
    """This rank's batch of step 0: random crops, with the parameters and the shuffle that the plan gives it."""
    plan = Plan(recipe, np.full((recipe.batch_size, 2), IMAGE_SIDE, np.int32), parallel.world, parallel.rank)
    device, samples = parallel.device, plan.samples(0)
    own = samples[parallel.rank * plan.per_rank :][: plan.per_rank]
    way = route([plan.shuffle(0, view) for view in plan.key_views], parallel.world, parallel.rank)
    generator = torch.Generator().manual_seed(recipe.seed)
    shape = (len(plan.query_views), plan.per_rank, recipe.crop_size, recipe.crop_size, 3)
    crops = [torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(device) for _ in range(2)]
    query, key = crops[0], crops[1] if plan.key_views else crops[1][:0]
    key_parameters = np.empty((len(way.slots), 8), np.float32)
    for number, view in enumerate(plan.key_views):
        rows = way.views == number
        key_parameters[rows] = plan.photometric(0, samples[way.slots[rows]], view)
    query_parameters = np.concatenate([plan.photometric(0, own, view) for view in plan.query_views])
    return Batch(
        step=0,
        epoch=0,
        sample=own,
        query_crops=query.flatten(0, 1),
        query_parameters=torch.from_numpy(query_parameters).to(device),
        key_crops=(query.flip(0) if recipe.views == 2 else key).flatten(0, 1),
        key_parameters=torch.from_numpy(key_parameters).to(device),
        key_rows=torch.from_numpy(way.key_rows).to(device),
        unshuffle=torch.from_numpy(way.unshuffle).to(device),
        shown=torch.from_numpy(own).to(device),
    )
