"""Features of a frozen encoder: centre crops, evaluation mode, unit length."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmoco.data.errors import DataError
from fastmoco.data.loader import EvaluationLoader, Loading
from fastmoco.data.manifest import Manifest
from fastmoco.encoder import Encoder
from fastmoco.kernels.photometric import photometric
from fastmoco.kernels.reference import BRIGHTNESS, HUE, NO_JITTER, ORDER
from fastmoco.parallel import Parallel
from fastmoco.recipe import Recipe

SEARCHING = ("cuda",)  # devices on which a batch of another size costs a search for algorithms


def extract(
    encoder: Encoder, manifest: Manifest, recipe: Recipe, parallel: Parallel, **options: Any
) -> tuple[Tensor, Tensor]:
    """Features [n, F] of every image, and labels int64 [n] (-1 where there are none), on the device.

    An image that turns out to be bad has features and label of the next good one. The rest, `options` too, is as
    `encode` says.
    """
    features, origins = encode(encoder, manifest, recipe, parallel, **options)
    labels = np.full(len(manifest), -1, np.int64) if manifest.labels is None else manifest.labels
    return features, torch.from_numpy(labels).to(parallel.device)[origins]


def encode(
    encoder: Encoder,
    manifest: Manifest,
    recipe: Recipe,
    parallel: Parallel,
    *,
    features: Literal["backbone", "projection"] = "backbone",
    loading: Loading = Loading(),
    batch_size: int = 256,
    normalise: bool = True,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[int], Any] | None = None,
    bad: list[tuple[str, str]] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return features [n, F] of `dtype` and, for each, the index int64 [n] of the image it was computed from.

    That is its own image, or the next good one if its own turned out to be bad. Both tensors are on the device.
    `features` chooses those of the backbone or those after the projection head; they have unit length unless
    `normalise` is false. Each rank encodes its share of the images and gets all features, in the manifest's order; all
    ranks call this. The encoder's mode is put back. `progress` is called with the number of images just encoded. Name
    and reason of each bad image that this rank met are added to `bad`.
    Raises DataError or torch.OutOfMemoryError, on every rank, if images are bad or memory is short on one.
    """
    share = -(-len(manifest) // parallel.world)
    # Every rank encodes equally many, the last images again where the shares do not come out even.
    indices = (np.arange(share) + parallel.rank * share).clip(max=len(manifest) - 1)
    loader = EvaluationLoader(
        manifest, recipe, parallel.device, indices=indices, batch_size=batch_size, loading=loading
    )
    forward = encoder.features if features == "backbone" else encoder
    rows_of_rank, position, sources = None, 0, np.empty(share, np.int64)
    failed: Exception | None = None
    with loader, _evaluating(encoder), torch.no_grad():
        while position < share:
            count = min(batch_size, share - position)
            # A rank that fails goes through the motions, because the others wait for it in `progress`.
            try:
                if failed is None:
                    crops, index = next(loader)
                    crops = _fill(crops, min(batch_size, share))
                    rows = forward(_plain(crops, encoder, recipe))[:count].float().flatten(1)
                    rows = F.normalize(rows, dim=1) if normalise else rows
                    if rows_of_rank is None:
                        rows_of_rank = rows.new_empty(share, rows.shape[1], dtype=dtype)
                    rows_of_rank[position : position + count] = rows
                    sources[position : position + count] = index
            except (DataError, torch.OutOfMemoryError) as error:
                failed = error
            position += count
            if progress is not None:
                progress(count)
    if bad is not None:
        bad += loader.bad
    if failed is None and rows_of_rank is not None and parallel.world > 1:
        failed = _no_room(rows_of_rank, parallel.world)
    if parallel.any(failed is not None):
        raise failed or DataError("another rank could not encode its images")
    assert rows_of_rank is not None
    origins = torch.from_numpy(sources).to(parallel.device)
    return parallel.all_gather(rows_of_rank)[: len(manifest)], parallel.all_gather(origins)[: len(manifest)]


def _no_room(rows: Tensor, world: int) -> Exception | None:
    """The error of a device that has no room for the rows of all ranks: in gathering the others would wait for it."""
    try:
        rows.new_empty(world * rows.shape[0], rows.shape[1])
    except torch.OutOfMemoryError as error:
        return error
    return None


def _fill(crops: Tensor, count: int) -> Tensor:
    # The last batch is as large as the others, because cuDNN looks for algorithms anew at each size: seconds.
    if crops.device.type not in SEARCHING or len(crops) == count:
        return crops
    return F.pad(crops, (0, 0, 0, 0, 0, 0, 0, count - len(crops)))


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
