"""Whether a GPU decodes what a CPU decodes: different JPEG files, image by image, at several shares of its engine.

The engine for JPEG reports success for every image that it was given. So one that it skipped, or wrote out of order,
shows only as other pixels. Every image is decoded and scaled as training does it, on the device at each share of the
engine, twice, and beside that on the CPU. Counted are images that are further from the CPU's than two decoders and two
resamplers are, and images that the second time are not the first time's bits. The control counts each image beside its
neighbour.
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmoco.bench.journal import Journal
from fastmoco.bench.loader import pictures
from fastmoco.bench.record_files import Row
from fastmoco.data.manifest import Manifest, scan, split
from fastmoco.environment import cores
from fastmoco.recipe import Recipe

COUNT = {"cpu": 48, "cuda": 1024}  # images
BATCH = {"cpu": 16, "cuda": 256}
SHARES = (0.0, 0.65, 1.0)  # of the JPEG files, for the engine
# Levels of 255 on average. Of these pictures at 224 px, on a CPU: colours of a JPEG repeated, and not interpolated, are
# 2.4 away, DALI's resampler from torch's 0.2, and another picture 39 at least.
FAR = 6.0
SAME, AGAIN, UNIT = "decoded as on a CPU", "decoded again", "images differ"
CONTROL = "control: each image beside the next"
# How a file of each kind is saved, in turn: an engine takes some of them, and the rest goes another way.
KINDS: tuple[dict[str, Any], ...] = (
    {},
    {"quality": 75},
    {"subsampling": 0},
    {"progressive": True},
    {},
    {"quality": 98},
    {"subsampling": 1},
    {"grey": True},
)


class DecodingError(RuntimeError):
    """A GPU decoded other pixels than a CPU, or others the second time."""


def run(recipe: Recipe, device: torch.device, *, data: Path | None = None, journal: Journal | None = None) -> list[Row]:
    """Rows of SAME and AGAIN for each share of the engine, in images that differ; any but the control's is a failure.

    `data` are the images; left out, they are made for the occasion.
    """
    journal = journal or Journal()
    if device.type == "cuda":  # the decoder then says how many engines it found
        os.environ.setdefault("DALI_NVIMGCODEC_LOG_LEVEL", "3")
    with _images(data, COUNT[device.type]) as manifest:
        row = functools.partial(Row, unit=UNIT, config={"images": len(manifest), "px": recipe.crop_size})
        exact = rows_of_images(manifest, recipe, torch.device("cpu"), 0.0)
        journal.keep([row(SAME, CONTROL, samples=(_far(exact, exact.roll(1, 0)),))])
        for share in SHARES:
            name = f"engine's share {share:g}"
            with journal.attempt(f"decoding with {name}"):
                first, second = (rows_of_images(manifest, recipe, device, share) for _ in range(2))
                odd = float((first != second).flatten(1).any(1).sum())
                rows = [row(SAME, name, samples=(_far(first, exact),)), row(AGAIN, name, samples=(odd,))]
                journal.keep(rows)
                judge(rows, len(manifest))
        with journal.attempt(CONTROL):
            judge_control(journal.rows[0], len(manifest))
    return journal.rows


def rows_of_images(manifest: Manifest, recipe: Recipe, device: torch.device, share: float) -> Tensor:
    """Every image of `manifest`, whole, scaled to the recipe's crop size: uint8 [n, S, S, 3] on the CPU."""
    from fastmoco.data.pipeline import Decoding, Pipeline
    from fastmoco.data.request import Request, read

    def requests() -> Iterator[Request]:
        for at in range(0, len(manifest), BATCH[device.type]):
            indices = np.arange(at, min(at + BATCH[device.type], len(manifest)))
            sizes = manifest.sizes[indices]
            boxes = np.concatenate([np.zeros_like(sizes), sizes], 1)[None]
            names = [manifest.path(index) for index in indices.tolist()]
            yield Request(names, [read(manifest, index) for index in indices.tolist()], sizes, boxes)

    pipeline = Pipeline(
        requests(), batch_size=BATCH[device.type], crop_size=recipe.crop_size, views=1, device=device,
        threads=cores(), decoding=Decoding(share, recipe.fancy_upsampling),
    )  # fmt: skip
    try:
        return torch.cat([crops[0].cpu() for crops in pipeline])
    finally:
        pipeline.close()


def judge(rows: list[Row], count: int) -> None:
    """Raises DecodingError if an image differs; its text says how many."""
    for row in rows:
        if row.median:
            raise DecodingError(f"{row.median:.0f} of {count} images differ ({row.name}, {row.provider})")


def judge_control(row: Row, count: int) -> None:
    """Raises DecodingError if the comparison would not notice one image in the place of another."""
    if row.median < 0.95 * count:
        raise DecodingError(
            f"the comparison is blind: of {count} images beside their neighbours {row.median:.0f} differ"
        )


def various(folder: Path, count: int) -> Path:
    """`count` different JPEG files of KINDS in `folder`, and of several sizes; returns the folder."""

    def save(item: tuple) -> None:
        number, image = item
        how = {"quality": 90, **KINDS[number % len(KINDS)]}
        image = image.convert("L") if how.pop("grey", False) else image
        width, height = image.size
        image = image.crop((0, 0, width - number % 97, height - number % 61))
        image.save(folder / f"{number:05d}.jpg", **how)

    with ThreadPoolExecutor(cores()) as pool:
        for _ in pool.map(save, enumerate(pictures(count))):
            pass
    return folder


def _far(a: Tensor, b: Tensor) -> float:
    # In pieces, so that a thousand images need no more memory than a few.
    return float(sum(int((x.short() - y.short()).abs().float().flatten(1).mean(1).gt(FAR).sum())
                     for x, y in zip(a.split(64), b.split(64), strict=True)))  # fmt: skip


@contextmanager
def _images(data: Path | None, count: int) -> Iterator[Manifest]:
    if data is not None:
        yield scan(split(data)[0])
        return
    with tempfile.TemporaryDirectory() as folder:
        yield scan(various(Path(folder), count), cache=False)
