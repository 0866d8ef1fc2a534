"""Features of a whole set, kept in the run's folder, so that only the first search in a set has to compute them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fastmoco.data import cache, manifest
from fastmoco.data.loader import Loading
from fastmoco.data.manifest import Manifest
from fastmoco.encoder import Encoder
from fastmoco.evaluate.features import encode
from fastmoco.options import UsageError
from fastmoco.parallel import Parallel
from fastmoco.recipe import Recipe
from fastmoco.runs.facts import read_facts

MOST_BYTES = 1 << 30  # of features that are kept: half a million images of 512 features


class Source(NamedTuple):
    """An encoder and how its features are taken."""

    encoder: Encoder
    recipe: Recipe
    parallel: Parallel
    features: str
    loading: Loading = Loading()


class Index(NamedTuple):
    """Images and their features, the ones that could be decoded."""

    images: Manifest
    features: Tensor
    """float32 [n, F] on the device, unit vectors."""


def scan_of(run: Path, data: Path | None, max_pixels: int) -> Manifest:
    """The images of `data`, or those that `run` was trained on; raises UsageError if it does not say which."""
    source = data or read_facts(run).get("options", {}).get("data")
    if not source:
        raise UsageError(f"{run} does not say what it was trained on: name the images with --data PATH")
    return manifest.scan(manifest.split(source)[0], max_pixels=max_pixels).in_memory()


def index(source: Source, images: Manifest, store: Path | None = None) -> Index:
    """Features of `images`: from the file `store` where it holds those of these images and weights, or computed.

    What was computed replaces the file, unless it is larger than MOST_BYTES.
    """
    key = _key(source, images)
    content = cache.load(store) if store else None
    if content is not None and content["key"].tobytes() == key:
        rows, good = torch.from_numpy(content["features"]), content["good"]
        return Index(images.take(good), rows.to(source.parallel.device))
    with tqdm(total=len(images), unit="image", disable=None) as bar:
        rows, origins = encode(
            source.encoder,
            images,
            source.recipe,
            source.parallel,
            features=source.features,  # type: ignore[arg-type]
            loading=source.loading,
            progress=bar.update,
        )
    good = np.flatnonzero(origins.cpu().numpy() == np.arange(len(images)))
    rows = rows[torch.from_numpy(good).to(rows.device)]
    if store and rows.numel() * 4 <= MOST_BYTES:
        cache.save(store, key=np.frombuffer(key, np.uint8), features=rows.cpu().numpy(), good=good)
    return Index(images.take(good), rows)


def _key(source: Source, images: Manifest) -> bytes:
    """SHA-256 of everything that the features depend on: weights, recipe, and each file's name, size and time."""
    digest = hashlib.sha256()
    for name, value in source.encoder.state_dict().items():
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().numpy().tobytes())
    digest.update(f"{source.recipe}\n{source.features}\n{images.root}\n".encode())
    digest.update(cache.pack(images.paths).tobytes())
    digest.update(images.sizes.tobytes())
    if images.places is not None:
        digest.update(images.places.tobytes())
    files = images.archives or images.paths
    digest.update(np.array([_state(os.path.join(images.root, name)) for name in files], np.int64).tobytes())
    return digest.digest()


def _state(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns
