"""A share of labelled images, the same one each time: for evaluations with few labels."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np

from fastmoco.data.errors import DataError
from fastmoco.data.manifest import Manifest
from fastmoco.options import UsageError


def share_of(images: Manifest, fraction: float) -> Manifest:
    """`fraction` of the images of each class, rounded, and at least one.

    Which ones follows from the names of the files alone, by SHA-256: not from the order, from a seed, or from how many
    others there are of another class. A smaller share is part of a larger one.
    """
    labels = images.labels
    assert labels is not None
    if fraction == 1:
        return images
    keys = [hashlib.sha256(os.fsencode(os.path.basename(path))).digest() for path in images.paths]
    order = np.array(sorted(range(len(images)), key=lambda i: (labels[i], keys[i], images.paths[i])), np.int64)
    _, first, row, counts = np.unique(labels[order], return_index=True, return_inverse=True, return_counts=True)
    quota = np.maximum(1, np.floor(counts * fraction + 0.5).astype(np.int64))
    in_quota = np.arange(len(order)) - first[row] < quota[row]
    return images.take(np.sort(order[in_quota]))


def listed(images: Manifest, table: Path) -> Manifest:
    """The images whose file names a text file lists, one a line, as SimCLR's published 1percent.txt does.

    Raises UsageError if the file cannot be read, DataError if it lists none of the images.
    """
    try:
        names = set(table.read_text(encoding="utf-8").split())
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{table} cannot be read ({error}): use a text file with one file name a line") from error
    rows = [i for i, path in enumerate(images.paths) if path in names or os.path.basename(path) in names]
    if not rows:
        raise DataError(f"{table} lists none of the {len(images)} images in {images.root}, as {images.paths[0]}")
    return images.take(np.array(rows, np.int64))
