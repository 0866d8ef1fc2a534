"""`fastmoco data scan`: what a set of images holds, and every file that a run would have to do without."""

from __future__ import annotations

import sys
import time
from functools import partial
from typing import Any

import numpy as np
from tqdm import tqdm

from fastmoco import atomic
from fastmoco.data import manifest, shard_scan
from fastmoco.data.full_scan import decode_apart
from fastmoco.data.manifest import ONE_COLOUR, SMALL_RANGE, Manifest
from fastmoco.data.rewrite import Reading
from fastmoco.options import DataScan, require_file
from fastmoco.terminal import counted

SHOWN = 20  # files named for each reason; --json names all
GIB = 2**30


def run(options: DataScan) -> None:
    """Print what the images in `options.path`, and in the val/ beside its train/, are; write them to `options.json`."""
    if options.json is not None:  # before minutes of scanning
        require_file(options.json, "json")
    train, val = manifest.split(options.path)
    remember = options.value_range == DataScan.value_range  # what was found with another range is no use to a run
    parts, classes, decode = {}, None, None
    if options.full:
        reading = Reading(value_range=options.value_range)
        decode = partial(decode_apart, reading=reading)
    for name, path in (("training", train), ("validation", val)):
        if path is None:
            continue
        began = time.perf_counter()
        with Bar() as bar:
            if shard_scan.concerns(options, path):
                part = shard_scan.facts(options, path, bar.show)
            else:
                images = manifest.scan(
                    path,
                    classes=classes,
                    max_pixels=options.max_pixels,
                    decode=decode,
                    cache=remember,
                    progress=bar.show,
                )
                classes = images.classes or None
                part = facts(images, options.full)
        parts[name] = part | {"seconds": time.perf_counter() - began}
        print("\n".join(_lines(name if val else "images", parts[name])))
    if options.json is not None:
        atomic.write_json(options.json, parts)


def facts(images: Manifest, full: bool) -> dict[str, Any]:
    """What a scan found, as JSON-ready data."""
    low, median, high = np.percentile(images.sizes, (0, 50, 100), axis=0).astype(int).tolist()
    per_class = [] if images.labels is None else np.bincount(images.labels, minlength=len(images.classes)).tolist()
    return {
        "root": images.root,
        "archives": len(images.archives),
        "images": len(images),
        "bytes": images.bytes,
        "first": images.paths[:3],
        "classes": dict(zip(images.classes, per_class, strict=True)) if per_class else {},
        "height": {"least": low[0], "median": median[0], "most": high[0]},
        "width": {"least": low[1], "median": median[1], "most": high[1]},
        "transparent": images.transparent,
        "one_colour": _narrow(images, -1, ONE_COLOUR),
        "small_range": _narrow(images, ONE_COLOUR, SMALL_RANGE),
        "decoded": full,
        "passed_over": images.passed,
        "left_out": [{"file": path, "reason": reason} for path, reason in images.rejected],
    }


def _narrow(images: Manifest, above: int, most: int) -> dict[str, Any]:
    # How many images span so many levels, and the first of them; None if they were not decoded.
    if images.spans is None:
        return {"images": None, "first": None}
    rows = np.flatnonzero((images.spans.astype(int) > above) & (images.spans <= most))
    return {"images": len(rows), "first": images.paths[rows[0]] if len(rows) else None}


class Bar:
    """A progress bar for each thing that a scan does; nothing where stderr is no terminal."""

    def __init__(self) -> None:
        self._what = ""
        self._bar: tqdm | None = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def show(self, what: str, count: int, total: int) -> None:
        """The scan's `progress`."""
        if what != self._what:
            self._close()
            self._what = what
            self._bar = tqdm(total=total, desc=what, unit=" files", leave=False, disable=not sys.stderr.isatty())
        assert self._bar is not None
        self._bar.update(count - self._bar.n)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _lines(title: str, part: dict[str, Any]) -> list[str]:
    counts = sorted(part["classes"].values())
    classes = f"{len(counts)}, of {counts[0]} to {counts[-1]} images" if counts else "none: only kNN needs them"
    many = part.get("of", part["archives"])
    some = f"{part['archives']} of " if many != part["archives"] else ""
    archives = f" in {some}{counted(many, 'archive')}" if part["archives"] else ""
    how = "each decoded once" if part["decoded"] else "headers only: --full decodes each"
    return [
        f"{title:<12}{part['images']}{archives} in {part['root']} ({part['bytes'] / GIB:.3g} GiB)",
        f"  first     {', '.join(part['first'])}",
        f"  classes   {classes}",
        *(
            f"  {side:<10}{part[side]['least']} to {part[side]['most']}, median {part[side]['median']}"
            for side in ("height", "width")
        ),
        f"  checked   {how}, {part['seconds']:.1f} s",
        *_remarks(part),
        *_kinds_passed_over(part["passed_over"]),
        f"  left out  {len(part['left_out'])}",
        *_rejections(part["left_out"]),
    ]


def _remarks(part: dict[str, Any]) -> list[str]:
    lines = []
    if part["transparent"]:
        lines.append(f"  seen      {part['transparent']} with transparency, shown over --background of pretrain")
    texts = {"one_colour": "nearly one colour", "small_range": f"use at most {SMALL_RANGE} of 255 levels"}
    for name, text in texts.items():
        if part[name]["images"]:
            example = f", as {part[name]['first']}" if part[name]["first"] else ""
            lines.append(f"  seen      {part[name]['images']} {text}{example}")
    if len(lines) > bool(part["transparent"]):
        lines.append("            where numbers do not span their type (12 bits in 16), give --value-range LOW HIGH")
    return lines


def _kinds_passed_over(counts: dict[str, int]) -> list[str]:
    kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(counts.items()))
    return [f"  passed    {kinds}: neither images nor classes"] if kinds else []


def _rejections(left_out: list[dict[str, str]]) -> list[str]:
    by_reason: dict[str, list[str]] = {}
    for entry in left_out:
        by_reason.setdefault(entry["reason"], []).append(entry["file"])
    lines = []
    for reason, files in sorted(by_reason.items(), key=lambda item: -len(item[1])):
        lines += [f"    {reason}: {len(files)}", *(f"      {file}" for file in files[:SHOWN])]
        if len(files) > SHOWN:
            lines.append(f"      and {len(files) - SHOWN} more: --json FILE lists all")
    return lines
