"""Features of a frozen encoder: centre crops, evaluation mode, unit length."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmoco.data.loader import EvaluationLoader
from fastmoco.data.manifest import Manifest
from fastmoco.data.pipeline import Decoding
from fastmoco.encoder import Encoder
from fastmoco.kernels.photometric import photometric
from fastmoco.kernels.reference import BRIGHTNESS, HUE, NO_JITTER, ORDER
from fastmoco.parallel import Parallel
from fastmoco.recipe import Recipe


def extract(
    encoder: Encoder, manifest: Manifest, recipe: Recipe, parallel: Parallel, **options: Any
) -> tuple[Tensor, Tensor]:
    """Features float32 [n, F] of every image, and labels int64 [n] (-1 where there are none), on the device.

    An image that turns out to be bad has features and label of the next good one. The rest, `options` too, is as
    `encode` says.
    """
    features, shown = encode(encoder, manifest, recipe, parallel, **options)
    labels = np.full(len(manifest), -1, np.int64) if manifest.labels is None else manifest.labels
    return features, torch.from_numpy(labels).to(parallel.device)[shown]


def encode(
    encoder: Encoder,
    manifest: Manifest,
    recipe: Recipe,
    parallel: Parallel,
    *,
    threads: int | None = None,
    hw_decoder_load: float | None = None,
    batch_size: int = 256,
    normalise: bool = True,
    progress: Callable[[int], Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """Features float32 [n, F], and for each the index int64 [n] of the image it is of: its own, or where that turned
    out to be bad the next good one's. Both are on the device.

    Features have unit length, unless `normalise` is false.

    `recipe.knn_features` says which: of the backbone, or after the projection head. Each rank encodes its share of the
    images and gets all features, in the manifest's order; all ranks call this. The encoder's mode is put back.
    `progress` is told how many images were just encoded.
    """
    share = -(-len(manifest) // parallel.world)
    # Every rank encodes equally many, the last images again where the shares do not come out even.
    indices = (np.arange(share) + parallel.rank * share).clip(max=len(manifest) - 1)
    loader = EvaluationLoader(
        manifest,
        recipe.crop_size,
        parallel.device,
        indices=indices,
        batch_size=batch_size,
        threads=threads,
        decoding=Decoding(hw_decoder_load, recipe.fancy_upsampling),
        max_bad_share=recipe.max_bad_share,
    )
    forward = encoder.features if recipe.knn_features == "backbone" else encoder
    features, done, shown = None, 0, np.empty(share, np.int64)
    with loader, _evaluating(encoder), torch.no_grad():
        for crops, index in loader:
            rows = forward(_plain(crops, encoder, recipe)).float().flatten(1)
            rows = F.normalize(rows, dim=1) if normalise else rows
            if features is None:
                features = rows.new_empty(share, rows.shape[1])
            features[done : done + len(rows)] = rows
            shown[done : done + len(rows)] = index
            done += len(rows)
            if progress is not None:
                progress(len(rows))
    assert features is not None and done == share
    shown = torch.from_numpy(shown).to(parallel.device)
    return parallel.all_gather(features)[: len(manifest)], parallel.all_gather(shown)[: len(manifest)]


def _plain(crops: Tensor, encoder: Encoder, recipe: Recipe) -> Tensor:
    parameters = torch.zeros(len(crops), 8, device=crops.device)
    parameters[:, ORDER] = NO_JITTER
    parameters[:, BRIGHTNESS:HUE] = 1
    colours = recipe.augmentation
    dtype = next(encoder.parameters()).dtype
    return photometric(crops, parameters, colours.mean, colours.std, dtype=dtype)


@contextmanager
def _evaluating(encoder: nn.Module) -> Iterator[None]:
    mode = encoder.training
    encoder.eval()
    try:
        yield
    finally:
        encoder.train(mode)
