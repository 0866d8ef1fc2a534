"""The loader: image pairs a second from JPEG files, beside what others would use for the same work.

The work: read and decode each image once, cut two boxes, resize them to S x S with antialiasing, hand over uint8. All
use the same number of threads and find the files in the operating system's cache. A provider that was started draws the
batches it had prepared before the clock starts, and none is timed while another works ahead: on a CPU every sample
starts its provider anew, on a GPU, where a start takes seconds, all samples of a provider are taken in a row.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastmoco.bench.journal import Journal
from fastmoco.bench.record_files import Row, matches
from fastmoco.data.batch import Batch
from fastmoco.data.loader import Loader, Loading
from fastmoco.data.manifest import Manifest, scan, split
from fastmoco.data.pipeline import Decoding, cut
from fastmoco.data.plan import Plan
from fastmoco.environment import cores
from fastmoco.kernels.photometric import photometric
from fastmoco.parallel import Parallel
from fastmoco.recipe import Recipe

IMAGE_SIZE = (375, 500)  # pixels: about ImageNet's median
QUALITY = 90
PREFETCH = 2  # batches that a loader has ready before the clock starts
BATCHES, PAIRS = 3, 256  # a sample draws at least so many
# A GPU takes so many of them in a blink, while it warms up: its clocks, and the memory that DALI asks for.
WARM_UP = {"cpu": PREFETCH + 1, "cuda": 10}  # batches drawn before the clock starts
SECONDS = {"cpu": 0.0, "cuda": 1.0}  # that a sample lasts at least
FIELDS = 64  # of noise, from which all photographs are cut
OURS, PILLOW, DALI, DECODE = "fastmoco", "Pillow, NumPy", "DALI, file reader", "DALI, decoding alone"
RESIZE, ALONE = "resizing alone", "decoding alone + resizing alone"
KERNEL, CHAIN = "fastmoco, photometric kernel", "fastmoco, photometric in DALI"

ORDER = (OURS, PILLOW, DALI, DECODE, RESIZE, KERNEL, CHAIN)  # of rows

Source = Callable[[], AbstractContextManager[Callable[[], object]]]


def run(
    recipe: Recipe,
    device: torch.device,
    *,
    rounds: int = 5,
    data: Path | None = None,
    only: str = "",
    skip: str = "",
    journal: Journal | None = None,
) -> list[Row]:
    """Pairs a second and processor time of the loaders that `only` and `skip` leave; raises ValueError if none is left.

    The journal has the rows so far after every start of a loader. One that fails is noted there and costs its own rows.

    The bound of the rates is DALI reading and decoding and doing nothing else; that of the processor time on a CPU is
    decoding and resizing, each measured alone. Finished views are crops after the photometric chain, float32.
    """
    with images(data, max(64, recipe.batch_size)) as manifest:
        available = sources(recipe, manifest, device)
        names = {name for name in available if matches(name, only) and not (skip and matches(name, skip))}
        if not names:
            raise ValueError(f"nothing to time is left: the loaders are {'; '.join(available)}")
        # What the others are compared with comes first, so that rows are whole as they come in.
        order = sorted(available, key=lambda name: name not in (DECODE, RESIZE))
        selection = {name: available[name] for name in order if name in names or name in (DECODE, RESIZE)}
        journal = journal or Journal()
        samples: dict[str, list[_Sample]] = {name: [] for name in selection}
        side = "x".join(str(int(value)) for value in np.median(manifest.sizes, 0)[::-1])
        config = {"px": recipe.crop_size, "batch": recipe.batch_size, "image": f"{side} JPEG", "threads": cores()}
        config |= {"crops": "on the GPU, Pillow's in host memory"} if device.type == "cuda" else {}
        starts, each = (1, rounds) if device.type == "cuda" else (rounds, 1)
        for _ in range(starts):
            for name, source in selection.items():
                with journal.attempt(name):
                    samples[name] += _samples(source, recipe.batch_size, device, each)
                    journal.keep(_rows(samples, config))
    return journal.rows


def _rows(samples: dict[str, list[_Sample]], config: dict) -> list[Row]:
    samples = {name: samples[name] for name in ORDER if samples.get(name)}
    if DECODE not in samples:  # which all rates are compared with, and which is timed first
        return []
    rates = {name: tuple(sample.pairs_per_second for sample in timings) for name, timings in samples.items()}
    busy = {name: tuple(sample.cpu_ms for sample in timings) for name, timings in samples.items()}
    decode, views = float(np.median(rates[DECODE])), (KERNEL, CHAIN)
    crops = [name for name in samples if name not in (*views, RESIZE)]
    rows = [Row("loader", name, "pairs/s", rates[name], config, PILLOW, decode) for name in crops]
    rows += [
        Row("loader, finished views", name, "pairs/s", rates[name], config, CHAIN, decode)
        for name in views
        if name in samples
    ]
    bound = None
    if RESIZE in samples and len(samples[RESIZE]) == len(samples[DECODE]):
        busy[ALONE] = tuple(map(sum, zip(busy[DECODE], busy[RESIZE], strict=True)))
        bound, crops = float(np.median(busy[ALONE])), [*crops, ALONE]
    crops.remove(DECODE)
    name, unit = "loader, processor time", "CPU ms/pair"
    return rows + [Row(name, provider, unit, busy[provider], config, PILLOW, bound) for provider in crops]


def sources(recipe: Recipe, manifest: Manifest, device: torch.device) -> dict[str, Source]:
    """The loaders by name; each opens to a call that gives one batch of `recipe.batch_size` pairs."""
    table: dict[str, Source] = {
        OURS: lambda: _ours(recipe, manifest, device),
        PILLOW: lambda: pillow(recipe, manifest),
        DALI: lambda: _dali(recipe, manifest, device, crops=True),
        DECODE: lambda: _dali(recipe, manifest, device, crops=False),
        KERNEL: lambda: _finished_views(recipe, manifest, device),
        CHAIN: lambda: _ours(recipe, manifest, device, photometric="dali"),
    }
    return table | ({RESIZE: lambda: _resizing(recipe, manifest)} if device.type == "cpu" else {})


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
        return np.stack([np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box)) for box in corners])

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
    """`count` JPEG files of `pictures` in `folder`; returns the folder."""

    def save(item: tuple[int, Image.Image]) -> None:
        number, image = item
        image.save(folder / f"{number:05d}.jpg", quality=QUALITY)

    with ThreadPoolExecutor(cores()) as pool:
        for _ in pool.map(save, enumerate(pictures(count))):
            pass
    return folder


def pictures(count: int) -> Iterator[Image.Image]:
    """`count` different pictures of 1/f noise, whose sizes and spectra are a photograph's.

    Beyond FIELDS they are earlier ones, moved around their edges, which noise of this kind does not show.
    """
    generator = np.random.default_rng(0)
    height, width = IMAGE_SIZE
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]) + 1 / width
    fields: list[np.ndarray] = []
    for number in range(count):
        if number < FIELDS:
            spectrum = np.fft.rfft2(generator.standard_normal((3, height, width))) / frequency
            pixels = np.fft.irfft2(spectrum, (height, width))
            pixels = 128 + 50 * (pixels - pixels.mean()) / pixels.std()
            fields.append(np.clip(pixels, 0, 255).astype(np.uint8).transpose(1, 2, 0))
            yield Image.fromarray(fields[-1])
        else:
            turns = number // FIELDS
            yield Image.fromarray(np.roll(fields[number % FIELDS], (37 * turns, 91 * turns), (0, 1)))


@contextmanager
def images(data: Path | None, count: int) -> Iterator[Manifest]:
    """The manifest of `data` (its train/ where there is one), or of `count` photographs made for the occasion."""
    if data is not None:
        manifest = scan(split(data)[0])
        if not os.path.isfile(manifest.path(0)):
            raise ValueError(f"{data} holds archives: give bench a folder of image files, which all loaders can read")
        yield manifest
        return
    with tempfile.TemporaryDirectory() as folder:
        yield scan(photographs(Path(folder), count), cache=False)


class _Sample(NamedTuple):
    pairs_per_second: float
    cpu_ms: float


def _samples(source: Source, pairs: int, device: torch.device, count: int) -> list[_Sample]:
    with source() as draw:
        for _ in range(WARM_UP[device.type]):
            draw()
        _wait(device)
        return [_sample(draw, pairs, device) for _ in range(count)]


def _sample(draw: Callable[[], object], pairs: int, device: torch.device) -> _Sample:
    least, batches = max(BATCHES, PAIRS // pairs), 0
    start, busy = time.perf_counter(), time.process_time()
    while batches < least or time.perf_counter() - start < SECONDS[device.type]:
        draw()
        batches += 1
    _wait(device)
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    return _Sample(batches * pairs / seconds, busy * 1e3 / (batches * pairs))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _ours(
    recipe: Recipe, manifest: Manifest, device: torch.device, photometric: Literal["kernel", "dali"] = "kernel"
) -> Iterator[Callable[[], Batch]]:
    parallel, plan = Parallel(device=device), Plan(recipe, manifest.sizes)
    loading = Loading(cores(), PREFETCH, photometric=photometric)
    with Loader(manifest, plan, parallel, range(1 << 30), loading) as loader:
        yield lambda: next(loader)


@contextmanager
def _finished_views(recipe: Recipe, manifest: Manifest, device: torch.device) -> Iterator[Callable[[], object]]:
    colours = recipe.augmentation
    with _ours(recipe, manifest, device) as draw:

        def views() -> tuple[Tensor, Tensor]:
            batch = draw()
            key = photometric(batch.key_crops, batch.key_parameters, colours.mean, colours.std, rows=batch.key_rows)
            return photometric(batch.query_crops, batch.query_parameters, colours.mean, colours.std), key

        yield views


@contextmanager
def _resizing(recipe: Recipe, manifest: Manifest) -> Iterator[Callable[[], None]]:
    plan, size = Plan(recipe, manifest.sizes), recipe.crop_size
    boxes = np.stack([plan.boxes(0, plan.samples(0), view) for view in (0, 1)])
    whole = [np.array(Image.open(manifest.path(sample)).convert("RGB")) for sample in plan.samples(0).tolist()]
    decoded = [torch.from_numpy(image) for image in whole]
    with ThreadPoolExecutor(cores()) as pool:

        def batch() -> None:
            cut(decoded, boxes, torch.empty(2, len(decoded), size, size, 3, dtype=torch.uint8), pool, cores())

        yield batch


@contextmanager
def _dali(recipe: Recipe, manifest: Manifest, device: torch.device, *, crops: bool) -> Iterator[Callable[[], object]]:
    from nvidia.dali import fn, pipeline_def, types

    scale, ratio = recipe.augmentation.crop_scale, recipe.augmentation.crop_ratio
    on_gpu, decoding = device.type == "cuda", _decoding(recipe, device)

    @pipeline_def(
        batch_size=recipe.batch_size,
        num_threads=cores(),
        device_id=(device.index or 0) if on_gpu else None,
        prefetch_queue_depth=PREFETCH,
        seed=recipe.seed,
    )
    def graph() -> tuple:
        encoded, _ = fn.readers.file(files=[os.fspath(manifest.path(i)) for i in range(len(manifest))])
        image = fn.decoders.image(encoded, output_type=types.RGB, **decoding)  # type: ignore[call-overload]
        if not crops:
            return image
        options: dict[str, Any] = {
            "size": recipe.crop_size,
            "random_area": scale,
            "random_aspect_ratio": ratio,
            "antialias": True,
        }
        return tuple(fn.random_resized_crop(image, **options) for _ in range(2))

    pipeline = graph()
    pipeline.build()
    # On a GPU ordered on a stream, as ours are, which does not wait for the pixels.
    yield partial(pipeline.run, torch.cuda.current_stream(device)) if on_gpu else pipeline.run


def _decoding(recipe: Recipe, device: torch.device) -> dict[str, object]:
    if device.type == "cpu":
        return {"device": "cpu"}
    decoding = Decoding(fancy_upsampling=recipe.fancy_upsampling)
    return {"device": "mixed", **decoding.options(cores(), torch.cuda.get_device_name(device))}
