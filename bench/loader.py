"""The loader: image pairs a second from JPEG files, beside what others would use for the same work.

The work: read and decode each image once, cut two boxes, resize them to S x S with antialiasing, hand over uint8. All
use the same number of threads and find the files in the operating system's cache. Every sample starts a provider anew
and draws the batches it had prepared before the clock starts, so that none is timed while another works ahead.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastmoco.bench.report import Row
from fastmoco.data.loader import Loader
from fastmoco.data.manifest import Manifest, scan, split
from fastmoco.data.plan import Plan
from fastmoco.environment import cores
from fastmoco.parallel import Parallel
from fastmoco.recipe import Recipe

IMAGE_SIZE = (375, 500)  # pixels: about ImageNet's median
QUALITY = 90
PREFETCH = 2  # batches that a loader has ready before the clock starts
BATCHES = 3  # batches in a sample
PILLOW, DECODE = "Pillow, NumPy", "DALI, decoding alone"

Source = Callable[[], AbstractContextManager[Callable[[], object]]]


def run(
    recipe: Recipe, device: torch.device, *, rounds: int = 5, data: Path | None = None, only: str = ""
) -> list[Row]:
    """Pairs a second of every loader; the bound is DALI reading and decoding and doing nothing else."""
    with images(data, max(64, recipe.batch_size)) as manifest:
        found = sources(recipe, manifest, device)
        chosen = {name: source for name, source in found.items() if only in name or name == DECODE}
        samples: dict[str, list[float]] = {name: [] for name in chosen}
        for _ in range(rounds):
            for name, source in chosen.items():
                samples[name].append(recipe.batch_size / _seconds_per_batch(source, device))
        side = "x".join(str(int(value)) for value in np.median(manifest.sizes, 0)[::-1])
    config = {"px": recipe.crop_size, "batch": recipe.batch_size, "image": f"{side} JPEG", "threads": cores()}
    bound = float(np.median(samples[DECODE]))
    return [Row("loader", name, "pairs/s", tuple(rates), config, PILLOW, bound) for name, rates in samples.items()]


def sources(recipe: Recipe, manifest: Manifest, device: torch.device) -> dict[str, Source]:
    """The loaders by name; each opens to a call that gives one batch of `recipe.batch_size` pairs."""
    return {
        "fastmoco": lambda: _ours(recipe, manifest, device),
        PILLOW: lambda: pillow(recipe, manifest),
        "DALI, file reader": lambda: _dali(recipe, manifest, device, crops=True),
        DECODE: lambda: _dali(recipe, manifest, device, crops=False),
    }


@contextmanager
def pillow(recipe: Recipe, manifest: Manifest, threads: int | None = None) -> Iterator[Callable[[], np.ndarray]]:
    """A two-view loader of Pillow and NumPy: the same boxes as ours, cut by a pool of threads (0: by the caller).

    Its call gives uint8 [B, 2, S, S, 3].
    """
    plan, size, steps = Plan(recipe, manifest.sizes), recipe.crop_size, iter(range(1 << 30))
    threads = cores() if threads is None else threads

    def pair(sample: int, boxes: np.ndarray) -> np.ndarray:
        image = Image.open(manifest.path(sample)).convert("RGB")
        corners = [(left, top, left + width, top + height) for top, left, height, width in boxes.tolist()]
        return np.stack([np.asarray(image.resize((size, size), Image.BILINEAR, box=box)) for box in corners])

    def batch(each: Callable) -> np.ndarray:
        step = next(steps)
        samples, epoch = plan.samples(step), plan.epoch(step)
        boxes = np.stack([plan.boxes(epoch, samples, view) for view in (0, 1)], 1)
        return np.stack(list(each(pair, samples.tolist(), boxes)))

    if not threads:
        yield lambda: batch(map)
        return
    with ThreadPoolExecutor(threads) as pool:
        yield lambda: batch(pool.map)


def photographs(folder: Path, count: int) -> Path:
    """`count` JPEG files of 1/f noise in `folder`, whose sizes and spectra are a photograph's; returns the folder."""
    generator = np.random.default_rng(0)
    height, width = IMAGE_SIZE
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]) + 1 / width
    for number in range(count):
        spectrum = np.fft.rfft2(generator.standard_normal((3, height, width))) / frequency
        pixels = np.fft.irfft2(spectrum, (height, width))
        pixels = 128 + 50 * (pixels - pixels.mean()) / pixels.std()
        image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8).transpose(1, 2, 0))
        image.save(folder / f"{number:05d}.jpg", quality=QUALITY)
    return folder


@contextmanager
def images(data: Path | None, count: int) -> Iterator[Manifest]:
    """The manifest of `data` (its train/ where there is one), or of `count` photographs made for the occasion."""
    if data is not None:
        found = scan(split(data)[0])
        if not os.path.isfile(found.path(0)):
            raise ValueError(f"{data} holds archives: give bench a folder of image files, which all loaders can read")
        yield found
        return
    with tempfile.TemporaryDirectory() as folder:
        yield scan(photographs(Path(folder), count), cache=False)


def _seconds_per_batch(source: Source, device: torch.device) -> float:
    with source() as draw:
        for _ in range(PREFETCH + 1):
            draw()
        _wait(device)
        started = time.perf_counter()
        for _ in range(BATCHES):
            draw()
        _wait(device)
        return (time.perf_counter() - started) / BATCHES


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _ours(recipe: Recipe, manifest: Manifest, device: torch.device) -> Iterator[Callable[[], object]]:
    parallel, plan = Parallel(device=device), Plan(recipe, manifest.sizes)
    with Loader(manifest, plan, recipe, parallel, stop_step=1 << 30, threads=cores(), prefetch=PREFETCH) as loader:
        yield lambda: next(loader)


@contextmanager
def _dali(recipe: Recipe, manifest: Manifest, device: torch.device, *, crops: bool) -> Iterator[Callable[[], object]]:
    from nvidia.dali import fn, pipeline_def, types

    scale, ratio = recipe.augmentation.crop_scale, recipe.augmentation.crop_ratio
    on_gpu = device.type == "cuda"

    @pipeline_def(
        batch_size=recipe.batch_size,
        num_threads=cores(),
        device_id=(device.index or 0) if on_gpu else None,
        prefetch_queue_depth=PREFETCH,
        seed=recipe.seed,
    )
    def graph() -> tuple:
        encoded, _ = fn.readers.file(files=[os.fspath(manifest.path(i)) for i in range(len(manifest))])
        image = fn.decoders.image(encoded, device="mixed" if on_gpu else "cpu", output_type=types.RGB)
        if not crops:
            return image
        cut = {"size": recipe.crop_size, "random_area": scale, "random_aspect_ratio": ratio, "antialias": True}
        return tuple(fn.random_resized_crop(image, **cut) for _ in range(2))

    pipeline = graph()
    pipeline.build()
    yield pipeline.run
