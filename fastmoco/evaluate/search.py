"""`search RUN IMAGE...`: the images of a set that are nearest to given ones by the features of an encoder.

Features are compared by the cosine after the mean feature of the searched set was taken away: what all images share
makes all of them alike and tells none from another.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fastmoco import atomic
from fastmoco.data import manifest
from fastmoco.data.errors import DataError
from fastmoco.data.loader import Loading
from fastmoco.data.manifest import Manifest
from fastmoco.data.pipeline import undecodable
from fastmoco.data.probe import probe
from fastmoco.data.rewrite import Reading
from fastmoco.evaluate.index import Index, Source, index, scan_of
from fastmoco.evaluate.neighbours import nearest
from fastmoco.evaluate.options import Duplicates, Search
from fastmoco.evaluate.pictures import Tile, draw_sheet
from fastmoco.options import UsageError
from fastmoco.runs.run_folder import figures_name, load_encoder, one_rank
from fastmoco.terminal import counted

ROWS_SHOWN, COLUMNS_SHOWN = 24, 12  # of a contact sheet
REMEDY = "look for other images, or save it anew as PNG or JPEG"


def run(options: Search) -> None:
    """Print the neighbours; write search.json and search.png, search-untrained of untrained weights.

    Raises UsageError if an image to look for cannot be read, DataError if there is nothing to search in.
    """
    source, step = open_run(options.run, options, options.untrained)
    queries = query_images(options.images, source.recipe.max_pixels)
    bank = indexed(source, options, "untrained-" if options.untrained else "")
    query_index = _index_of_all(source, queries)
    rows, mean = centred(bank.features)
    near = nearest(rows, centred(query_index.features, mean)[0], options.k + 1)
    neighbours = [_neighbours(query_index.images.path(i), bank.images, near, i, options.k) for i in range(len(queries))]
    out = options.out or options.run
    name = figures_name("search", options.untrained)
    facts = {"run": str(options.run), "step": step, "features": options.features, "data": bank.images.root}
    lines: list[dict[str, Any]] = [
        {"image": query_index.images.path(i), "neighbours": [_as_json(bank.images, *one) for one in each]}
        for i, each in enumerate(neighbours)
    ]
    out.mkdir(parents=True, exist_ok=True)
    atomic.write_json(out / f"{name}.json", {**facts, "images": len(bank.images), "queries": lines})
    sheet = [
        [
            Tile(query_index.images, i),
            *(Tile(bank.images, at, f"{alike:.2f}") for at, alike in each[: COLUMNS_SHOWN - 1]),
        ]
        for i, each in enumerate(neighbours[:ROWS_SHOWN])
    ]
    draw_sheet(out / f"{name}.png", sheet, Reading.of(source.recipe))
    for line in lines:
        print(line["image"])
        for one in line["neighbours"]:
            print(f"  {one['similarity']:.3f}  {one['file']}")
    print(
        f"among {counted(len(bank.images), 'image')}, encoder of {options.run} after step {step}; "
        f"see {out / name}.json and .png"
    )


def _index_of_all(source: Source, queries: Manifest) -> Index:
    try:
        found = index(source, queries)
        if len(found.images) == len(queries):
            return found
    except DataError:  # too many are bad
        pass
    checked = zip(queries.paths, undecodable(queries, reading=Reading.of(source.recipe)), strict=True)
    faults = ((path, result.reason) for path, result in checked if result.reason)
    path, reason = next(faults, (queries.paths[0], "cannot be decoded"))
    raise UsageError(f"{path}: {reason}: {REMEDY}")


def query_images(places: Sequence[Path], max_pixels: int) -> Manifest:
    """The images of files and folders, in order; raises UsageError if a file is missing or no image."""
    files: list[str] = []
    for place in places:
        if place.is_dir():
            inner = manifest.scan(place, max_pixels=max_pixels)
            files += [inner.path(i) for i in range(len(inner))]
        elif place.is_file():
            files.append(os.path.abspath(place))
        else:
            raise UsageError(f"{place}: no such file: check the path")
    files = list(dict.fromkeys(files))
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder, "images.txt")
        table.write_bytes(b"\n".join(map(os.fsencode, files)))
        try:
            images = manifest.scan(table, max_pixels=max_pixels, cache=False)
        except DataError as error:  # none of them is an image
            reason = probe(files[0], max_pixels=max_pixels).reason or str(error)
            raise UsageError(f"{files[0]}: {reason}: {REMEDY}") from None
    if images.rejected:
        path, reason = images.rejected[0]
        raise UsageError(f"{path}: {reason}: {REMEDY}")
    place_of = {path: row for row, path in enumerate(images.paths)}
    return dataclasses.replace(images, root="/").take(place_of[file] for file in files)


def centred(features: Tensor, mean: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Features [n, F] without their `mean` [F], or that of another set, again of unit length; and that mean."""
    mean = features.mean(0) if mean is None else mean
    return F.normalize(features - mean, dim=1), mean


def open_run(run: Path, options: Search | Duplicates, untrained: bool = False) -> tuple[Source, int]:
    """The encoder of `run` as a source of features, and its step."""
    parallel = one_rank(options.device)
    encoder, recipe, step = load_encoder(run, parallel, untrained)
    return Source(encoder, recipe, parallel, options.features, Loading(threads=options.threads or None)), step


def indexed(source: Source, options: Search | Duplicates, mark: str = "") -> Index:
    """The searched set, whose features are kept in RUN/index-*.npz."""
    images = scan_of(options.run, options.data, source.recipe.max_pixels)
    return index(source, images, options.run / f"index-{mark}{options.features}.npz")


def _neighbours(query: str, images: Manifest, near: Any, row: int, k: int) -> list[tuple[int, float]]:
    """Index and similarity of the nearest images of one query, which is none of its own neighbours."""
    pairs = zip(near.rows[row].tolist(), near.similarity[row].tolist(), strict=True)
    mine = os.path.realpath(query)
    return [(at, alike) for at, alike in pairs if os.path.realpath(images.path(at)) != mine][:k]


def _as_json(images: Manifest, at: int, similarity: float) -> dict[str, Any]:
    label = {} if images.labels is None else {"class": images.classes[images.labels[at]]}
    return {"file": images.paths[at], "similarity": similarity, **label}
