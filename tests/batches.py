"""Batches for tests: drawn from a loader, and compared bit for bit."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from fastmoco.data.batch import Batch
from fastmoco.data.loader import Loader, Loading
from fastmoco.data.manifest import Manifest
from fastmoco.data.plan import Plan
from fastmoco.data.quarantine import Quarantine
from fastmoco.recipe import Recipe

CPU = torch.device("cpu")
ALONE: Any = SimpleNamespace(rank=0, world=1, device=CPU)


def batches(
    images: Manifest,
    recipe: Recipe,
    steps: range,
    parallel: Any = ALONE,
    quarantine: Quarantine | None = None,
    **loading: Any,
) -> list[Batch]:
    """All batches of `steps` on one rank; `loading` are the fields of Loading."""
    plan = Plan(recipe, images.sizes, parallel.world, parallel.rank)
    with Loader(images, plan, parallel, steps, Loading(**loading), quarantine) as loader:
        return list(loader)


def equal(a: Batch, b: Batch) -> bool:
    """Whether every number of two batches is the same."""
    pairs = zip(vars(a).values(), vars(b).values(), strict=True)
    return all(
        np.array_equal(np.asarray(torch.as_tensor(x).cpu()), np.asarray(torch.as_tensor(y).cpu())) for x, y in pairs
    )


def all_equal(a: list[Batch], b: list[Batch]) -> bool:
    """Whether two lists hold equally many batches, equal one by one."""
    return len(a) == len(b) and all(map(equal, a, b))
