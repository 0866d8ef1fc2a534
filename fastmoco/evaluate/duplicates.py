"""`duplicates RUN`: groups of images that are nearly the same, by the features of an encoder.

Two images count as the same from a similarity on that the encoder itself gives: what nine of ten images have to a copy
of themselves that was cut by a tenth, made smaller and compressed. Groups are what such pairs connect.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastmoco import atomic
from fastmoco.data import manifest
from fastmoco.data.errors import DataError
from fastmoco.data.manifest import Manifest
from fastmoco.data.rewrite import Reading
from fastmoco.data.transform import decoded
from fastmoco.evaluate.index import Index, Source, index
from fastmoco.evaluate.neighbours import Pairs, groups, nearest, pairs_above
from fastmoco.evaluate.options import Duplicates
from fastmoco.evaluate.pictures import Tile, draw_sheet
from fastmoco.evaluate.search import COLUMNS_SHOWN, ROWS_SHOWN, centred, indexed, open_run
from fastmoco.options import UsageError
from fastmoco.terminal import counted

SAMPLE = 256  # images that the threshold is measured on
ALIKE_SHARE = 0.1  # of the images, whose altered copies may be less similar than the threshold
CUT, SMALLER, QUALITY = 0.05, 0.75, 70  # of an altered copy: cut at each side, its scale, of JPEG


def run(options: Duplicates) -> None:
    """Print how many groups there are; write duplicates.json, duplicates.png and, where asked for, the list."""
    if options.keep is not None and options.keep.exists():
        raise UsageError(f"{options.keep} exists: give --keep another name, or remove it")
    source, step = open_run(options.run, options)
    bank = indexed(source, options)
    rows, mean = centred(bank.features)
    usual = nearest(rows, rows[_sample(len(rows))], 2).similarity[:, -1].median().item()
    threshold = measured_threshold(source, bank, mean) if options.threshold is None else options.threshold
    pairs = pairs_above(rows, threshold)
    families = groups(len(rows), pairs)
    out = options.out or options.run
    out.mkdir(parents=True, exist_ok=True)
    facts = {
        "run": str(options.run),
        "step": step,
        "features": options.features,
        "data": bank.images.root,
        "images": len(bank.images),
        "threshold": threshold,
        "threshold_from": "measured" if options.threshold is None else "given",
        "usual_similarity_of_the_nearest": usual,
        "share_of_pairs_found": pairs.recall,
        "groups": _as_json(bank.images, families, pairs),
    }
    atomic.write_json(out / "duplicates.json", facts)
    sheet = [[Tile(bank.images, i) for i in group[:COLUMNS_SHOWN]] for group in families[:ROWS_SHOWN]]
    if sheet:
        draw_sheet(out / "duplicates.png", sheet, Reading.of(source.recipe))
    more = sum(map(len, families)) - len(families)
    if options.keep is not None:
        _write_list(options.keep, bank.images, families)
    print(
        f"{counted(len(families), 'group')} of near-duplicates among {counted(len(rows), 'image')}, "
        f"{len(rows) - more} with one of a group; "
        f"similarity at least {threshold:.3f} ({facts['threshold_from']}), usual for the nearest other image "
        f"{usual:.3f}; see {out / 'duplicates'}.json" + (" and .png" if sheet else "")
    )
    for line in _doubts(threshold, usual, more, len(rows), pairs):
        print(line)


def measured_threshold(source: Source, bank: Index, mean: Tensor) -> float:
    """The similarity that nine of ten images have at least to themselves cut by a tenth, made smaller and compressed.

    Measured on up to SAMPLE images. Raises DataError if none of them can be altered.
    """
    sample = _sample(len(bank.images))
    with tempfile.TemporaryDirectory() as folder:
        usable = [i for i in sample.tolist() if _write_altered(bank.images, i, Path(folder), Reading.of(source.recipe))]
        if not usable:
            raise DataError(f"{bank.images.root}: none of the images can be altered: give --threshold")
        altered = index(source, manifest.scan(folder, cache=False))
    names = [int(Path(path).stem) for path in altered.images.paths]
    here, there = centred(bank.features[torch.tensor(names)], mean)[0], centred(altered.features, mean)[0]
    return (here * there).sum(1).quantile(ALIKE_SHARE).item()


def _write_altered(images: Manifest, at: int, folder: Path, reading: Reading) -> bool:
    try:
        plain = Image.fromarray(decoded(images.read(at), reading))
    except (DataError, OSError):  # damaged, or of a kind that Pillow does not read
        return False
    width, height = plain.size
    box = (CUT * width, CUT * height, (1 - CUT) * width, (1 - CUT) * height)
    size = max(1, round(SMALLER * width)), max(1, round(SMALLER * height))
    plain.resize(size, box=box, reducing_gap=2).save(folder / f"{at}.jpg", quality=QUALITY)
    return True


def _sample(count: int) -> np.ndarray:
    return np.unique(np.linspace(0, count - 1, min(SAMPLE, count)).astype(np.int64))


def _as_json(images: Manifest, families: list[list[int]], pairs: Pairs) -> list[dict[str, Any]]:
    number = {index: place for place, group in enumerate(families) for index in group}
    weakest: dict[int, float] = {}
    for one, alike in zip(pairs.first.tolist(), pairs.similarity.tolist(), strict=True):
        weakest[number[one]] = alike  # pairs come with the most alike first
    return [
        {"files": [images.paths[i] for i in group], "least_similar_pair": weakest[place]}
        for place, group in enumerate(families)
    ]


def _write_list(path: Path, images: Manifest, families: list[list[int]]) -> None:
    if images.places is not None and (images.places[:, 0] >= 0).any():
        raise UsageError("--keep lists files, and these images are in tar archives: unpack them, or leave it out")
    area = images.sizes.astype(np.int64).prod(1)
    left_out = {i for group in families for i in group if i != max(group, key=lambda each: (area[each], -each))}
    lines = []
    for i in range(len(images)):
        if i not in left_out:
            label = "" if images.labels is None else f"\t{images.classes[images.labels[i]]}"
            lines.append(os.path.abspath(images.path(i)) + label)
    with atomic.replacing(path) as draft:
        draft.write_bytes(os.fsencode("\n".join(lines) + "\n"))


def _doubts(threshold: float, usual: float, more: int, count: int, pairs: Pairs) -> list[str]:
    lines = []
    if threshold <= usual or 2 * more > count:
        lines.append(
            "warning: the encoder hardly tells these images apart, so the groups mean little: train it for longer, or "
            "give a larger --threshold"
        )
    if pairs.recall < 1:
        lines.append(f"note: found by faiss, which compares only likely pairs: {pairs.recall:.1%} of them, by a sample")
    return lines
