"""Features of images, one row each, with their file names: `embed RUN`, and `fastmoco.embed`."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from tqdm import tqdm

from fastmoco import atomic
from fastmoco.data import manifest
from fastmoco.data.errors import DataError
from fastmoco.data.loader import Loading
from fastmoco.data.manifest import Manifest
from fastmoco.data.shard_source import as_url
from fastmoco.evaluate.features import encode
from fastmoco.options import Embed, UsageError, require_new
from fastmoco.parallel import Parallel
from fastmoco.runs.pretrained import Pretrained
from fastmoco.runs.run_folder import load_encoder, one_rank
from fastmoco.terminal import counted

Place = str | os.PathLike


class Embedding(NamedTuple):
    """Features of n images and which images they are."""

    features: np.ndarray
    """float32 [n, F], a row for each image that could be decoded."""
    images: Manifest
    """The n images: `images.path(i)` is the file of row i, `images.read(i)` its bytes, in an archive, too."""
    left_out: int
    """How many files are no images, or could not be decoded: `rejected` names them."""

    def __repr__(self) -> str:
        """In a line, for notebooks."""
        n, length = self.features.shape
        first = ", ".join(map(repr, self.files[:2])) + (", ..." if n > 2 else "")
        return f"Embedding(features float32 [{n}, {length}], files [{first}], {self.left_out} left out)"

    @property
    def files(self) -> list[str]:
        """[n]: names of the files, relative to the folder that was given."""
        return self.images.paths

    @property
    def rejected(self) -> list[tuple[str, str]]:
        """Name and reason of each file left out, sorted by name."""
        return self.images.rejected

    @property
    def labels(self) -> np.ndarray | None:
        """int64 [n]: class of each image, where the images stand in folders of classes; else None."""
        return self.images.labels

    @property
    def classes(self) -> list[str]:
        """Names of the classes."""
        return self.images.classes


def embed(
    encoder: Pretrained | Place,
    data: Place | Sequence[Place],
    *,
    features: Literal["backbone", "projection"] = "backbone",
    normalise: bool = False,
    device: str = "auto",
    threads: int = 0,
    progress: bool = False,
) -> Embedding:
    """Features of images: one row for each image of `data` that can be decoded.

    `encoder`: what `fastmoco.load` gave, or the folder of a run. `data`: a folder at any depth, a tar archive, a text
    file with one path a line, or a sequence of paths, whose order the rows then have. `features`: before the projection
    head [n, feature_dim], or after it [n, recipe.dim]. `normalise` scales each row to length 1, so that
    `rows @ rows.T` holds cosines. `device`: of a run; an encoder computes where it is. `threads` decode images, 0 is
    all cores. `progress` shows a bar.

    Images are seen as evaluation sees them: their centre square, as `encoder.transform` cuts it. Raises UsageError if
    the folder is no run, CheckpointError if it has no good checkpoint, DataError if there are no images or if a path of
    the sequence does not exist. A file that is there and cannot be decoded is left out, and `rejected` says why.
    """
    if not isinstance(encoder, Pretrained):
        encoder, _, _ = load_encoder(Path(encoder), Parallel.alone(device))
    images, order = _images_of(data, encoder.recipe.max_pixels)
    bad: list[tuple[str, str]] = []
    with tqdm(total=len(images), unit="image", disable=None if progress else True) as bar:
        rows, origins = encode(
            encoder,
            images,
            encoder.recipe,
            Parallel(device=encoder.device),
            features=features,
            loading=Loading(threads=threads or None),
            normalise=normalise,
            progress=bar.update,
            bad=bad,
        )
    good = origins.cpu().numpy() == np.arange(len(images))
    good_rows = order[good[order]]
    rejected = sorted([*images.rejected, *bad])
    kept = dataclasses.replace(images.take(good_rows), rejected=rejected)
    return Embedding(rows.cpu().numpy()[good_rows], kept, len(rejected))


def run(options: Embed) -> None:
    """`embed RUN`. It writes .npz with `features` float32 [n, F], `files` [n] and, where there are classes, `labels`
    int64 [n] and `classes`; or .parquet with the columns file, features and label. What cannot be decoded has no row.

    Raises UsageError if the file exists or pyarrow is missing; raises DataError if there are no images.
    """
    assert options.out is not None and options.data is not None
    require_new(options.out)
    save = _save_npz if options.out.suffix == ".npz" else _parquet_writer()
    encoder, _, step = load_encoder(options.run, one_rank(options.device), options.untrained)
    embedding = embed(
        encoder,
        options.data,
        features=options.features,
        normalise=options.normalise,
        threads=options.threads,
        progress=True,
    )
    with atomic.replacing(options.out) as draft:
        save(draft, embedding.features, embedding.images)
    rows, columns = embedding.features.shape
    print(
        f"{options.out}: {counted(rows, 'image')}, {columns} {options.features} features each, encoder of "
        f"{options.run} after step {step}; {_left_out(embedding, options.data)}"
    )


def _left_out(embedding: Embedding, data: Place) -> str:
    text = f"{counted(embedding.left_out, 'file')} left out"
    if not embedding.left_out:
        return text
    file, reason = embedding.rejected[0]
    example = f"{file}: {reason}" if embedding.left_out == 1 else f"as {file}: {reason}"
    full = " --full" if any("cannot be decoded" in why for _, why in embedding.rejected) else ""  # headers are good
    return f"{text} ({example}): fastmoco data scan{full} {data} lists {'it' if embedding.left_out == 1 else 'them'}"


def _images_of(data: Place | Sequence[Place], max_pixels: int) -> tuple[Manifest, np.ndarray]:
    """The images, and their indices in the order that was asked for."""
    if isinstance(data, (str, os.PathLike)):
        images = manifest.scan(data, max_pixels=max_pixels).in_memory()
        if manifest.split(data)[0] != (as_url(data) or str(data)):
            images = dataclasses.replace(images, labels=None, classes=[])  # train and val are no classes
        return images, np.arange(len(images))
    names = [os.path.abspath(os.fspath(path)) for path in data]
    if not names or any("\n" in name for name in names):
        raise DataError(f"{counted(len(names), 'path')} of images: name at least one, without line breaks", exit_code=2)
    missing = [name for name in names if _is_missing(name)]
    if missing:
        others = f" ({len(missing)} such paths of {len(names)})" if len(missing) > 1 else ""
        raise DataError(f"{missing[0]}: no such file{others}: check the path", exit_code=2)
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder, "images.txt")
        table.write_bytes(os.fsencode("\n".join(dict.fromkeys(names))))
        images = manifest.scan(table, max_pixels=max_pixels, cache=False)
    indices = [images.find(name) for name in names]
    return images, np.array([index for index in indices if index is not None], np.int64)


def _is_missing(path: str) -> bool:
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:  # it may be there: reading it says what is wrong
        return False
    return False


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
