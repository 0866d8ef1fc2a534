"""A CPU gets what it can do in a minute, and flags override it."""

import torch

from fastmoco.bench.options import Bench, Profile
from fastmoco.bench.size import at_size
from fastmoco.presets import PRESETS
from fastmoco.recipe import PUBLISHED_IMAGES

CPU = torch.device("cpu")
V2 = PRESETS["v2"][1]


def test_a_cpu_is_measured_small_and_a_gpu_as_published():
    small = at_size(V2, Bench(()), CPU)
    assert (small.arch, small.batch_size, small.crop_size, small.queue_size) == ("resnet18", 32, 112, 4096)
    assert at_size(V2, Bench(()), torch.device("cuda", 0)) == V2.for_images(PUBLISHED_IMAGES)
    recipe_at = at_size(V2, Bench((), arch="resnet50", batch_size=64), CPU)
    assert (recipe_at.arch, recipe_at.batch_size, recipe_at.crop_size) == ("resnet50", 64, 112)
    for _, recipe in PRESETS.values():
        recipe_of = at_size(recipe, Profile(), CPU)
        assert recipe_of.batch_size % max(1, recipe.bn_group) == 0 and recipe_of.crop_size <= 112
