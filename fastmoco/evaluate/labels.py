"""Labelled images for an evaluation: class folders, lists with classes, or a CSV file beside unlabelled images."""

from __future__ import annotations

import codecs
import csv
import dataclasses
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastmoco.data import manifest
from fastmoco.data.cache import printable
from fastmoco.data.manifest import DataError, Manifest
from fastmoco.evaluate.rate import fold_of
from fastmoco.options import UsageError
from fastmoco.recipe import Recipe
from fastmoco.runs.facts import read_facts
from fastmoco.terminal import counted


def both_sides(
    run: Path, data: Path | None, val: Path | None, labels: Path | None, max_pixels: int = Recipe.max_pixels
) -> tuple[Manifest, Manifest]:
    """Labelled training and validation images; where `data` is None, those that `run` was trained on.

    Where no validation images are named and none stand beside the others, a fifth of each class validates and does not
    train: the same images each time. Raises UsageError if one side is missing or has no classes, DataError if the
    labels do not fit.
    """
    source = data or read_facts(run)["options"].get("data")
    if source is None:
        raise UsageError(f"{run} does not say what it was trained on: name labelled images with --data PATH")
    train, beside = manifest.split(source)
    against = val or beside
    if against is None:
        return _set_aside(one_side(Path(train), labels, max_pixels=max_pixels))
    bank = one_side(Path(train), labels, max_pixels=max_pixels)
    queries = one_side(Path(against), labels, bank.classes, max_pixels)
    if os.path.realpath(bank.root) == os.path.realpath(queries.root):
        common = len(set(bank.paths) & set(queries.paths))
        if common:
            print(
                f"warning: {common} of the {len(queries)} validation images train, too: the figures are too good; "
                f"name others with --val",
                file=sys.stderr,
            )
    return bank, queries


def _set_aside(images: Manifest) -> tuple[Manifest, Manifest]:
    assert images.labels is not None
    validates = fold_of(images.labels) == 0
    if not validates.any():
        raise UsageError(f"{images.root} has one image of each class: name labelled images to validate with --val PATH")
    print(
        f"note: no val/ beside {images.root}: {validates.sum()} of the {len(images)} images validate and do not train, "
        f"the same share of each class; name others with --val",
        file=sys.stderr,
    )
    return images.take(np.flatnonzero(~validates)), images.take(np.flatnonzero(validates))


def one_side(
    path: Path, labels: Path | None, classes: Sequence[str] | None = None, max_pixels: int = Recipe.max_pixels
) -> Manifest:
    """The labelled images of `path`, with the classes numbered as in `classes` where given.

    The table `labels` serves a side whose images it names; another side has to have classes of its own.
    """
    if labels is not None:
        images = manifest.scan(path, max_pixels=max_pixels).in_memory()
        # ImageNet's table names the validation images alone.
        if images.labels is None or _classes_of(images, labels)[0]:
            return label(images, labels, classes)
    images = manifest.scan(path, classes=classes, max_pixels=max_pixels).in_memory()
    if images.labels is None:
        raise UsageError(
            f"{path} has no classes: use one folder per class, a list with classes, or --labels FILE.csv of path,class"
        )
    return images


def label(images: Manifest, table: Path, classes: Sequence[str] | None = None) -> Manifest:
    """The images that a CSV file gives a class, one `path,class` a line, with a header line or without.

    A path is absolute or relative to the folder of images, with the folder's name in front or without, or a file's name
    alone, with its ending or without, where that is unique. Images that the file does not name are left out. Raises
    DataError if it names none of them, if a line fits several images or has no class, or if an image gets two;
    UsageError if the file cannot be read.
    """
    names, idle = _classes_of(images, table)
    _note_idle(images, table, idle)
    if not names:
        raise DataError(
            f"{table} names none of the {len(images)} images in {images.root}, as {images.paths[0]}: check its first "
            f"column"
        )
    rows = np.array(sorted(names), np.int64)
    present = sorted(set(names.values()))
    numbering = {name: number for number, name in enumerate(classes or present)}
    unknown = [name for name in present if name not in numbering]
    if unknown:
        raise DataError(f"{table}: class {unknown[0]!r} is not among the {len(numbering)} classes of the training part")
    labels = np.array([numbering[names[i]] for i in rows.tolist()], np.int64)
    part = images.take(rows)
    return dataclasses.replace(part, labels=labels, classes=list(numbering))


class Row(NamedTuple):
    """One line of a table of classes."""

    line: int
    path: str
    label: str


def read_table(table: Path) -> list[Row]:
    """The first two columns of a CSV file."""
    data = table.read_bytes().removeprefix(codecs.BOM_UTF8)
    if b"\0" in data:
        raise UsageError(f"{table} cannot be read as CSV (it holds zeros, as UTF-16 does): save it as UTF-8")
    try:
        reader = csv.reader(io.StringIO(os.fsdecode(data), newline=""))  # names of files may hold any bytes
        rows = [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        raise UsageError(f"{table} cannot be read as CSV ({error}): use one path,class a line") from error
    wide = next((row for _, row in rows if len(row) > 2), None)
    if wide is not None:
        told = ", ".join(wide[:2])
        print(f"note: of {table} the first two columns are read, as path and class: {told}", file=sys.stderr)
    short = next((line for line, row in rows if len(row) < 2), None)
    if short is not None:
        raise UsageError(f"{table}: line {short} has one column: use one path,class a line")
    return [Row(line, row[0].strip(), row[1].strip()) for line, row in rows]


def _note_idle(images: Manifest, table: Path, idle: list[Row]) -> None:
    # A table may be of both sides; but a word on it, because names may also differ in case, folder or encoding.
    if idle:
        how = "" if _is_utf8(idle[0].path) else ", which is not UTF-8"
        name = "names" if len(idle) == 1 else "name"
        print(
            f"note: {counted(len(idle), 'line')} of {table} {name} none of the images in {images.root}, "
            f"the first is line {idle[0].line}, {printable(idle[0].path)}{how}",
            file=sys.stderr,
        )


def _classes_of(images: Manifest, table: Path) -> tuple[dict[int, str], list[Row]]:
    """Class by index of the images that a table names, and its lines that name none."""
    finder = _Finder(images)
    classes: dict[int, tuple[int, str]] = {}
    idle: list[Row] = []
    for number, row in enumerate(read_table(table)):
        matches = finder.find(row.path)
        if number == 0 and not matches:
            continue  # a header
        if row.label in finder.paths:
            raise DataError(f"{table}: line {row.line}: its second column names an image: put the path first")
        if not matches:
            idle.append(row)
        if not row.path or not row.label:
            raise DataError(f"{table}: line {row.line}, {row.path or repr(row.label)}: an empty cell")
        if len(matches) > 1:
            several = " and ".join(images.paths[i] for i in matches[:2])
            raise DataError(f"{table}: line {row.line}, {row.path}: may be {several}: give its path")
        for index in matches:
            line, before = classes.setdefault(index, (row.line, row.label))
            if before != row.label:
                raise DataError(f"{table}: line {row.line}, {row.path}: {row.label}, but {before} in line {line}")
    return {index: name for index, (_, name) in classes.items()}, idle


def _is_utf8(text: str) -> bool:
    try:
        os.fsencode(text).decode()
    except UnicodeDecodeError:
        return False
    return True


class _Finder:
    """Indices of images by what tables call them."""

    def __init__(self, images: Manifest) -> None:
        self.root = images.root
        self.paths: dict[str, list[int]] = {}
        self.bare: dict[str, list[int]] = {}
        self.stems: dict[str, list[int]] = {}
        for index, path in enumerate(images.paths):
            base = os.path.basename(path)
            for names, name in ((self.paths, path), (self.bare, base), (self.stems, os.path.splitext(base)[0])):
                names.setdefault(name, []).append(index)

    def find(self, name: str) -> list[int]:
        """The images that a name may mean, by the first of its meanings that fits any."""
        path = os.path.normpath(name)
        inner = os.path.relpath(path, self.root) if os.path.isabs(path) else path
        prefix = os.path.basename(self.root) + os.sep
        meanings = [(self.paths, each) for each in (path, inner, path.removeprefix(prefix), path.replace("\\", "/"))]
        if os.sep not in path:
            meanings += [(self.bare, path), (self.stems, path)]
        return next((names[each] for names, each in meanings if each in names), [])
