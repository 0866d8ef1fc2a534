"""`embed RUN`: features of images, one row each, with their file names."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from fastmoco import atomic
from fastmoco.data import manifest
from fastmoco.data.loader import Loading
from fastmoco.data.manifest import Manifest
from fastmoco.evaluate.features import encode
from fastmoco.evaluate.labels import subset
from fastmoco.options import Embed, UsageError, require_new
from fastmoco.runs.run_folder import load_encoder, one_rank


def run(options: Embed) -> None:
    """Write the features: .npz with `features` float32 [n, F], `files` [n] and, where there are classes, `labels`
    int64 [n] and `classes`; .parquet with the columns file, features and label. What cannot be decoded has no row.

    Raises UsageError if the file exists or pyarrow is missing; raises DataError if there are no images.
    """
    assert options.out is not None and options.data is not None
    require_new(options.out)
    save = _save_npz if options.out.suffix == ".npz" else _parquet_writer()
    parallel = one_rank(options.device)
    encoder, recipe, step = load_encoder(options.run, parallel, options.untrained)
    images = manifest.scan(options.data, max_pixels=recipe.max_pixels)
    if manifest.split(options.data)[0] != str(options.data):
        images = dataclasses.replace(images, labels=None, classes=[])  # train and val are no classes
    with tqdm(total=len(images), unit="image", disable=None) as bar:
        features, shown = encode(
            encoder,
            images,
            recipe,
            parallel,
            features=options.features,
            loading=Loading(threads=options.threads or None),
            normalise=options.normalise,
            progress=bar.update,
        )
    good = np.flatnonzero(shown.cpu().numpy() == np.arange(len(images)))
    left_out = len(images.rejected) + len(images) - len(good)
    rows, images = features.cpu().numpy()[good], subset(images, good)
    with atomic.replacing(options.out) as draft:
        save(draft, rows, images)
    print(
        f"{options.out}: {rows.shape[0]} images, {rows.shape[1]} {options.features} features each, encoder of "
        f"{options.run} after step {step}; {left_out} files left out"
    )


def _save_npz(path: Path, features: np.ndarray, images: Manifest) -> None:
    columns: dict[str, Any] = {"features": features, "files": np.array(images.paths)}
    if images.labels is not None:
        columns |= {"labels": images.labels, "classes": np.array(images.classes)}
    with path.open("wb") as file:  # given a name, NumPy would append .npz to it
        np.savez(file, **columns)


def _parquet_writer():
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise UsageError("a .parquet file needs pyarrow: pip install pyarrow, or end --out in .npz") from error

    def names(texts: list[str]) -> arrow.Array:
        try:
            return arrow.array(texts)
        except UnicodeEncodeError:  # one is no UTF-8: then bytes, as the disk has them
            return arrow.array([os.fsencode(text) for text in texts])

    def save(path: Path, features: np.ndarray, images: Manifest) -> None:
        flat = arrow.FixedSizeListArray.from_arrays(arrow.array(features.ravel()), features.shape[1])
        columns = {"file": names(images.paths), "features": flat}
        if images.labels is not None:
            columns["label"] = names([images.classes[label] for label in images.labels])
        parquet.write_table(arrow.table(columns), path)

    return save
