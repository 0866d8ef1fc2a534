"""Requests of images with random boxes, and the crops that the pipeline for a CPU makes of them."""

from __future__ import annotations

import numpy as np
import torch

from fastmoco.data.manifest import Manifest
from fastmoco.data.pipeline import Pipeline
from fastmoco.data.request import Request

CPU = torch.device("cpu")


def request(manifest: Manifest, indices: np.ndarray, views: int = 2, seed: int = 0) -> Request:
    generator = np.random.default_rng(seed)
    sizes = manifest.sizes[indices]
    sides = np.maximum((sizes * generator.uniform(0.2, 1, (views, len(indices), 2))).astype(np.int32), 1)
    corners = (generator.uniform(0, 1, sides.shape) * (sizes - sides + 1)).astype(np.int32)
    boxes = np.concatenate([corners, sides], 2)
    return Request([manifest.path(i) for i in indices], [manifest.read(i) for i in indices], sizes, boxes)


def pipeline(requests: object, views: int = 2, crop_size: int = 64, threads: int | None = 1) -> Pipeline:
    return Pipeline(requests, batch_size=200, crop_size=crop_size, views=views, device=CPU, threads=threads)


def crops(*requests: Request, **options: int) -> list[torch.Tensor]:
    return list(pipeline(requests, **options))
