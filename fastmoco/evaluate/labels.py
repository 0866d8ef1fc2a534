"""Labelled images for an evaluation: class folders, lists with classes, or a CSV file beside unlabelled images."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastmoco.data import manifest
from fastmoco.data.manifest import DataError, Manifest
from fastmoco.options import UsageError
from fastmoco.recipe import Recipe


def both_sides(
    run: Path, data: Path | None, val: Path | None, labels: Path | None, max_pixels: int = Recipe.max_pixels
) -> tuple[Manifest, Manifest]:
    """Labelled training and validation images; where `data` is None, those that `run` was trained on.

    UsageError where one side is missing or has no classes, DataError where the labels do not fit.
    """
    source = data or json.loads((run / "recipe.json").read_text())["options"].get("data")
    if source is None:
        raise UsageError(f"{run} does not say what it was trained on: name labelled images with --data PATH")
    train, beside = manifest.split(source)
    against = val or beside
    if against is None:
        raise UsageError(f"{source} has no val/ beside a train/: name labelled images with --val PATH")
    bank = one_side(Path(train), labels, max_pixels=max_pixels)
    queries = one_side(Path(against), labels, bank.classes, max_pixels)
    if os.path.realpath(bank.root) == os.path.realpath(queries.root):
        known = len(set(bank.paths) & set(queries.paths))
        if known:
            print(
                f"warning: {known} of the {len(queries)} validation images train, too: the figures are too good; "
                f"name others with --val",
                file=sys.stderr,
            )
    return bank, queries


def one_side(
    path: Path, labels: Path | None, classes: Sequence[str] | None = None, max_pixels: int = Recipe.max_pixels
) -> Manifest:
    """The labelled images of `path`, with the classes numbered as in `classes` where given."""
    if labels is not None:
        return label(manifest.scan(path, max_pixels=max_pixels), labels, classes)
    found = manifest.scan(path, classes=classes, max_pixels=max_pixels)
    if found.labels is None:
        raise UsageError(
            f"{path} has no classes: use one folder per class, a list with classes, or --labels FILE.csv of path,class"
        )
    return found


def label(images: Manifest, table: Path, classes: Sequence[str] | None = None) -> Manifest:
    """The images that a CSV file gives a class, one `path,class` a line, with a header line or without.

    A path is relative to the folder of images, or a file's name alone where that is unique. Images that the file does
    not name are left out. DataError where it names none of them, UsageError where it cannot be read.
    """
    known = read_table(table)
    names = [_look_up(path, known) for path in images.paths]
    kept = np.array([i for i, name in enumerate(names) if name is not None], np.int64)
    if not len(kept):
        raise DataError(f"{table} names none of the {len(images)} images in {images.root}: check its first column")
    present = sorted({name for name in names if name is not None})
    numbering = {name: number for number, name in enumerate(classes or present)}
    unknown = [name for name in present if name not in numbering]
    if unknown:
        raise DataError(f"{table}: class {unknown[0]!r} is not among the {len(numbering)} classes of the training part")
    labels = np.array([numbering[names[i]] for i in kept], np.int64)
    chosen = subset(images, kept)
    return dataclasses.replace(chosen, labels=labels, classes=list(numbering))


def subset(images: Manifest, indices: np.ndarray) -> Manifest:
    """Some of the images, in the order of `indices`."""
    labels = None if images.labels is None else images.labels[indices]
    paths = [images.paths[index] for index in indices.tolist()]
    places = None if images.places is None else images.places[indices]
    return dataclasses.replace(images, paths=paths, sizes=images.sizes[indices], labels=labels, places=places)


def read_table(table: Path) -> dict[str, str]:
    """Class by path, from the first two columns of a CSV file."""
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            rows = [row for row in csv.reader(file) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{table} cannot be read as CSV ({error}): use one path,class a line") from error
    short = next((number for number, row in enumerate(rows, 1) if len(row) < 2), None)
    if short is not None:
        raise UsageError(f"{table}: line {short} has one column: use one path,class a line")
    return {os.path.normpath(row[0].strip()): row[1].strip() for row in rows}


def _look_up(path: str, known: dict[str, str]) -> str | None:
    return known.get(path, known.get(os.path.basename(path)))
