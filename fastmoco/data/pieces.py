"""One shard's part of a table of images: made by reading the shard once, and kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from fastmoco.data import cache, tars
from fastmoco.data.errors import DataError
from fastmoco.data.image_table import RECORD, Piece
from fastmoco.data.probe import VERSION, probe

PASSED = "passed "  # before the kind of members that were passed over, in a piece's facts
LARGEST = 2**32 - 1  # bytes of an image that a record can hold


def read(path: str, shown: str, max_pixels: int) -> Piece:
    """Headers of the images in a local tar, which messages call `shown`; raises DataError if it is no sound tar."""
    try:
        members = tars.contents(path)
    except DataError as error:
        raise DataError(str(error).replace(path, shown)) from None
    headers = [
        probe(path, offset, size, max_pixels)
        for offset, size in zip(members.offsets.tolist(), members.sizes.tolist(), strict=True)
    ]
    reasons = [header.reason for header in headers]
    reasons = ["over 4 GiB" if size > LARGEST else why for size, why in zip(members.sizes, reasons, strict=True)]
    good = [i for i in np.argsort(members.offsets, kind="stable").tolist() if not reasons[i]]
    left_out = [(name, why) for name, why in zip(members.names, reasons, strict=True) if why]
    records = np.zeros(len(good), RECORD)
    records["offset"], records["bytes"] = members.offsets[good], members.sizes[good]
    records["size"] = np.array([headers[i][:2] for i in good], np.int32).reshape(-1, 2)
    names = [members.names[i] for i in good]
    labels = [members.labels[i] for i in good]
    counts = Counter({f"{PASSED}{kind}": count for kind, count in members.passed.items()})
    counts["transparent"] = sum(headers[i].alpha for i in good)
    return made(records, names, labels, [*members.rejected, *left_out], counts)


def made(
    records: np.ndarray,
    names: Sequence[str],
    labels: Sequence[str | None],
    left_out: list[tuple[str, str]] | None = None,
    facts: Mapping[str, int] | None = None,
) -> Piece:
    """The piece of `records`, whose names and classes are still to be put in."""
    packed = cache.pack(names)
    records["name_end"] = np.flatnonzero(packed == 0) + 1
    classes = sorted({label for label in labels if label is not None})
    number = {label: code for code, label in enumerate(classes)}
    records["label"] = [-1 if label is None else number[label] for label in labels]
    return Piece(records, packed, classes, left_out or [], dict(facts or {}))


def save(path: Path, piece: Piece, stamp: str, max_pixels: int) -> None:
    """Keep a piece as the file `path`; raises OSError if that fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = [[row[i] for row in piece.left_out] for i in (0, 1)]
    cache.write(
        path,
        records=piece.records,
        names=piece.names,
        classes=cache.pack(piece.classes),
        left_names=cache.pack(columns[0]),
        left_reasons=cache.pack(columns[1]),
        facts=cache.pack(piece.facts),
        counts=np.array([*piece.facts.values()], np.int64),
        state=_state(stamp, max_pixels),
    )


def load(path: Path | BinaryIO, stamp: str, max_pixels: int) -> Piece | None:
    """The piece that was kept for a shard of this stamp; None if there is none, or another."""
    data = cache.load(path)
    if data is None or "state" not in data or not np.array_equal(data["state"], _state(stamp, max_pixels)):
        return None
    left_out = zip(cache.unpack(data["left_names"]), cache.unpack(data["left_reasons"]), strict=True)
    records = data["records"].view(RECORD)
    facts = dict(zip(cache.unpack(data["facts"]), data["counts"].tolist(), strict=True))
    return Piece(records, data["names"], cache.unpack(data["classes"]), list(left_out), facts)


def _state(stamp: str, max_pixels: int) -> np.ndarray:
    return cache.pack([str(VERSION), str(tars.VERSION), str(max_pixels), stamp])
