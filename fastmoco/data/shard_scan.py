"""`data scan` of a set of shards: shard by shard, all of them, a range or a sample, and joined from what is known.

What is found of a shard is its piece (`pieces.py`), kept in the user's cache folder and, with --index, in a folder that
machines share or copy together. Whoever scans the whole set after the ranges are done reads no shard again, and writes
the index. Memory: the pieces of a few shards, a histogram of sizes, and what is left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from fastmoco.data import cache, pieces, shard_set
from fastmoco.data.errors import DataError
from fastmoco.data.full_scan import decode_apart
from fastmoco.data.image_table import Piece, natural
from fastmoco.data.manifest import ONE_COLOUR, SMALL_RANGE, Manifest
from fastmoco.data.rewrite import Reading
from fastmoco.data.shard_set import Progress
from fastmoco.data.shard_source import Fetching, Shard, Source, as_url, indexed, write_index
from fastmoco.options import DataScan, UsageError
from fastmoco.terminal import counted

TOGETHER = 8  # shards that one child decodes: starting it takes seconds
LARGEST_SIDE = 1 << 16  # sides beyond it count as this
DECODED = " decoded"  # behind the stamp of a shard whose images were decoded


def concerns(options: DataScan, path: str) -> bool:
    """Whether a scan goes by shards: behind a URL, with an index, or where the flags say so."""
    by_shards = options.shards is not None or options.sample or options.index is not None
    return bool(by_shards or as_url(path) or indexed(path))


def facts(options: DataScan, path: str, progress: Progress) -> dict[str, Any]:
    """What the shards hold, as JSON-ready data; the index is written where --index asks for it.

    Raises DataError if the source is no set of shards, UsageError if a range names none.
    """
    source = shard_set.source_of(path, Fetching(options.cache_gb, options.cache_dir, options.retry_seconds))
    if source is None:
        raise DataError(f"{path}: is no set of shards alone, which --shards, --sample and --index want", exit_code=2)
    shards = source.shards()
    part = _selection(shards, options)
    shard_set.build(source, part, options.max_pixels, progress, index=options.index)
    if options.full:
        part = _without_undecodable(source, part, options, progress)
    if options.index is not None and len(part) == len(shards):
        write_index(options.index, part)
    facts = _totals(shard_set.piece(source, shard, options.max_pixels) for shard in part)
    return {"root": source.root, "archives": len(part), "of": len(shards), "decoded": options.full, **facts}


def _selection(shards: list[Shard], options: DataScan) -> list[Shard]:
    if options.shards is not None:
        first, last = options.shards
        if not 0 <= first < last <= len(shards):
            raise UsageError(f"--shards {first} {last}: there are {len(shards)}: use 0 to {len(shards)}")
        shards = shards[first:last]
    if 0 < options.sample < len(shards):
        middles = (np.arange(options.sample) + 0.5) * len(shards) / options.sample
        shards = [shards[int(middle)] for middle in middles]
    return shards


def _without_undecodable(source: Source, shards: Sequence[Shard], options: DataScan, progress: Progress) -> list[Shard]:
    """The shards again, each with a piece that leaves out what cannot be decoded."""
    rows = [shard._replace(stamp=shard.stamp + DECODED) for shard in shards]
    remember = options.value_range == DataScan.value_range
    earlier = [shard_set.known(source, row, options.max_pixels, options.index) if remember else None for row in rows]
    missing = [i for i, each in enumerate(earlier) if each is None]
    for at in range(0, len(missing), TOGETHER):
        some = missing[at : at + TOGETHER]
        parts = [shard_set.piece(source, shards[i], options.max_pixels) for i in some]
        results = _decode(source, [shards[i] for i in some], parts, Reading(value_range=options.value_range))
        for i, piece in zip(some, results, strict=True):
            shard_set.keep(source, rows[i], piece, options.max_pixels, options.index)
        progress("decode", at + len(some), len(missing))
    return rows


def _decode(source: Source, shards: list[Shard], parts: list[Piece], reading: Reading) -> list[Piece]:
    with ExitStack() as stack:
        archives = [stack.enter_context(source.local(shard)) for shard in shards]
        records = np.concatenate([part.records for part in parts])
        number = np.repeat(np.arange(len(parts)), [len(part.records) for part in parts])
        places = np.stack([number, records["offset"], records["bytes"].astype(np.int64)], 1)
        names = [name for part in parts for name in cache.unpack(part.names)]
        sizes = np.ascontiguousarray(records["size"])
        images = Manifest("/", names, sizes, archives=archives, places=places)
        checked = list(decode_apart(images, reading=reading)) if names else []
    spans = np.array([each.span for each in checked], np.int64)
    reasons = [each.reason for each in checked]
    bounds = np.cumsum([0, *(len(part.records) for part in parts)])
    rows = [slice(*pair) for pair in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)]
    return [_without(part, reasons[row], spans[row]) for part, row in zip(parts, rows, strict=True)]


def _without(part: Piece, reasons: list[str], spans: np.ndarray) -> Piece:
    """The piece without the images that have a reason against them."""
    names, records = cache.unpack(part.names), part.records
    good = [i for i, reason in enumerate(reasons) if not reason]
    labels = [None if code < 0 else part.classes[code] for code in records["label"][good].tolist()]
    left_out = [*part.left_out, *((name, why) for name, why in zip(names, reasons, strict=True) if why)]
    narrow = Counter(
        one_colour=int((spans[good] <= ONE_COLOUR).sum()),
        small_range=int(((spans[good] > ONE_COLOUR) & (spans[good] <= SMALL_RANGE)).sum()),
    )
    return pieces.made(records[good], [names[i] for i in good], labels, left_out, Counter(part.facts) + narrow)


def _totals(parts: Iterator[Piece]) -> dict[str, Any]:
    """Facts of all pieces together; raises DataError if they hold no image."""
    sides = np.zeros((2, LARGEST_SIDE + 1), np.int64)
    classes: Counter[str] = Counter()
    totals: Counter[str] = Counter()
    first: list[str] = []
    left_out: list[dict[str, str]] = []
    images = size = unlabelled = 0
    for part in parts:
        images, size = images + len(part.records), size + int(part.records["bytes"].sum())
        for side in (0, 1):
            sides[side] += np.bincount(
                np.minimum(part.records["size"][:, side], LARGEST_SIDE), minlength=sides.shape[1]
            )
        labels = part.records["label"]
        unlabelled += int((labels < 0).sum())
        numbers = np.bincount(labels[labels >= 0], minlength=len(part.classes)).tolist()
        classes.update(dict(zip(part.classes, numbers, strict=True)))
        totals.update(part.facts)
        if len(first) < 3:
            first += cache.unpack(part.names)[: 3 - len(first)]
        left_out += [{"file": file, "reason": reason} for file, reason in part.left_out]
    if not images:
        raise DataError(f"no images in the shards ({counted(len(left_out), 'member')} left out)", exit_code=2)
    in_order = {name: classes[name] for name in sorted(classes, key=natural)}
    passed = {name.removeprefix(pieces.PASSED): n for name, n in totals.items() if name.startswith(pieces.PASSED)}
    return {
        "images": images,
        "bytes": size,
        "first": first,
        "classes": {} if unlabelled or len(classes) < 2 else in_order,
        "height": _quantiles(sides[0]),
        "width": _quantiles(sides[1]),
        "transparent": totals["transparent"],
        "one_colour": {"images": totals["one_colour"], "first": None},
        "small_range": {"images": totals["small_range"], "first": None},
        "passed_over": passed,
        "left_out": left_out,
    }


def _quantiles(counts: np.ndarray) -> dict[str, int]:
    total = np.cumsum(counts)
    least, median, most = (int(np.searchsorted(total, max(1, share * total[-1]))) for share in (0, 0.5, 1))
    return {"least": least, "median": median, "most": most}
