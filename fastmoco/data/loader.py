"""Batches on the device, prepared by a background thread: the plan says what, the pipeline does it.

With several ranks an image is decoded once, by the rank that holds it as a query. Its key crop travels as uint8 to the
rank that encodes it, and that rank derives the photometric parameters itself, since the plan is pure. A sample that
turns out to be bad is replaced in the batch that it spoils, and from then on (`quarantine.py`).
"""

from __future__ import annotations

import atexit
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastmoco.data.batch import Batch, assemble
from fastmoco.data.decoded import PIXEL, PixelCache
from fastmoco.data.manifest import DataError, Manifest
from fastmoco.data.pipeline import Decoding, Pipeline
from fastmoco.data.plan import Plan, centre_boxes
from fastmoco.data.quarantine import Quarantine
from fastmoco.data.remote import RemoteShards
from fastmoco.data.request import UNREADABLE, Names, Readers, Repair, Request, fault, read
from fastmoco.data.rewrite import DamagedImage, Reading
from fastmoco.environment import share_of_cores
from fastmoco.recipe import Recipe

if TYPE_CHECKING:
    from fastmoco.parallel import Parallel

Views = Callable[[Tensor, Tensor], Tensor]
READERS = 16  # threads that read files; they wait for the disk, not for a core
# On a GPU at least and at most. Rate = readers / latency of one file: 64 at 10 ms give 6,400 files/s. When files come
# from a cache, many threads spend more time on handing Python's lock to each other than on reading.
GPU_READERS = (8, 64)
READ_AHEAD = 1  # calls of DALI whose files are being read while another is decoded
DECODED_AT_ONCE = 128  # images in a call of DALI for a GPU at least; smaller batches are decoded several at a time
EVALUATION_BATCH = 256
IN_A_ROW = 8  # images that cannot be read, one after the other in a random order: the disk is at fault


@dataclass(frozen=True)
class Loading:
    """How a loader works. What it yields is the same, but for `photometric`, whose two ways differ by rounding."""

    threads: int | None = None
    """Threads that decode; None is this rank's share of the cores."""
    prefetch: int = 2
    """Batches that are prepared ahead of the one in use."""
    hw_decoder_load: float | None = None
    """Share of the JPEGs for a GPU's decoding engine, 0 to 1; None leaves it to the number of threads."""
    photometric: Literal["kernel", "dali"] = "kernel"
    """Whether the step computes the views from crops (kernel), or the loader does (dali)."""
    decoded_bytes: int = 0
    """Memory for decoded images, so that later epochs need not decode them again."""
    kept: PixelCache | None = None
    """These images, on a CPU, where several loaders share them; else a loader that trains has its own."""


class Loader:
    """Iterator of Batch for `steps`, at most `loading.prefetch` batches ahead.

    What it yields depends on the plan and the quarantine alone, not on threads, prefetch or where it starts. Without
    a quarantine the first bad sample raises DecodeError, in the step it belongs to, as does any other error of the
    background thread. All ranks must draw the same steps. Raises ValueError if the plan is for other images or ranks.
    """

    def __init__(
        self,
        images: Manifest,
        plan: Plan,
        parallel: Parallel,
        steps: range,
        loading: Loading = Loading(),
        quarantine: Quarantine | None = None,
    ) -> None:
        if len(images) != len(plan.sizes):
            raise ValueError(f"the plan is for {len(plan.sizes)} images, the manifest has {len(images)}")
        if (plan.world, plan.rank) != (parallel.world, parallel.rank):
            raise ValueError(f"rank {parallel.rank} of {parallel.world} has the plan of {plan.rank} of {plan.world}")
        self._parallel = parallel
        self._views = _dali_views(plan, parallel, loading.threads) if loading.photometric == "dali" else None
        self._exchange_stream = _side_stream(parallel.device) if parallel.world > 1 else None
        if loading.decoded_bytes and loading.kept is None:
            loading = replace(loading, kept=PixelCache(loading.decoded_bytes, parallel.device))
        boxes = partial(_boxes, plan)
        source = ImageSource(images, quarantine, boxes, parallel.device, Reading.of(plan.recipe), loading.kept)
        self._background = Background(partial(_training, source, plan, steps, loading), loading.prefetch)

    @property
    def wait_seconds(self) -> float:
        """Seconds that `next` has blocked so far because no batch was ready."""
        return self._background.wait_seconds

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch, exchange, event = next(self._background)
        if self._parallel.world > 1 and len(exchange.slots):
            # Here and not in the background thread: ranks that stop at the same step have exchanged as often.
            with _on(self._exchange_stream, event):
                outgoing = batch.key_crops
                batch.key_crops = self._parallel.exchange(outgoing, exchange.send_counts, exchange.receive_counts)
                if outgoing.is_cuda:
                    # Its memory is the background thread's stream's, and no one else holds it: a collective that waits
                    # neither keeps nor records what it reads, so the next batch could be written where this is read.
                    outgoing.record_stream(self._exchange_stream)
                event = _event(self._parallel.device)
        tensors = [value for value in vars(batch).values() if isinstance(value, Tensor)]
        batch = _hand_over(batch, tensors, event)
        return batch if self._views is None else _make_views(batch, self._views)

    def close(self) -> None:
        """Stop the thread and free DALI; harmless at any moment and when done twice."""
        self._background.close()
        self._views = None

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class EvaluationLoader:
    """Iterator of (crops uint8 [n, S, S, 3], index int64 [n]) over images in order, each one's centre box.

    `recipe` gives S, `fancy_upsampling` and `max_bad_share`. `indices` chooses images and their order; the last batch
    may be smaller. A bad image makes a warning, and the next good one is shown in its place, with its own index.
    Raises DataError if more are bad than a quarantine allows. `bad` holds the name and the reason of each so far.
    """

    def __init__(
        self,
        images: Manifest,
        recipe: Recipe,
        device: torch.device,
        *,
        indices: np.ndarray | None = None,
        batch_size: int = EVALUATION_BATCH,
        loading: Loading = Loading(),
    ) -> None:
        order = np.arange(len(images)) if indices is None else np.asarray(indices, np.int64)
        batches = [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
        self._length, self._position = len(batches), 0
        self.bad: list[tuple[str, str]] = []
        self._quarantine = Quarantine(images, max_share=recipe.max_bad_share)
        boxes = partial(_centre, images, recipe.crop_size)
        source = ImageSource(images, self._quarantine, boxes, device, Reading.of(recipe), loading.kept)
        self._background = Background(partial(_evaluation, source, recipe, batches, loading), loading.prefetch)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[tuple[Tensor, np.ndarray]]:
        return self

    def __next__(self) -> tuple[Tensor, np.ndarray]:
        crops, index, event = next(self._background)
        while self._quarantine.news:
            bad = self._quarantine.news.popleft()
            self.bad.append((bad.file, bad.reason))
            warnings.warn(f"{bad.file}: {bad.reason}; evaluating {bad.substitute} in its place", stacklevel=2)
        origins = self._quarantine.replace(self._position, index)
        self._position += 1
        return _hand_over((crops, origins), [crops], event)

    def close(self) -> None:
        """Stop the thread and free DALI; harmless at any moment and when done twice."""
        self._background.close()

    def __enter__(self) -> EvaluationLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _End(NamedTuple):
    error: BaseException | None


_running: weakref.WeakSet[Background] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    # Registered after DALI's own, so that it runs first: DALI ends its pipelines, and a thread of ours would take that
    # for an image that cannot be decoded.
    for background in list(_running):
        background.close()


class Background:
    """Iterator over what `make()` generates, produced by a thread at most `depth` items ahead.

    An error in the thread is raised by `next` after the items before it. The generator is made, run and closed in the
    thread, whether it is exhausted, `close` is called, the object is collected or the interpreter exits.
    """

    def __init__(self, make: Callable[[], Generator], depth: int) -> None:
        if depth < 1:
            raise ValueError(f"prefetch is {depth}: use at least 1")
        self.wait_seconds = 0.0
        self._items: SimpleQueue = SimpleQueue()
        self._slots, self._closed = threading.Semaphore(depth - 1), threading.Event()
        # The thread must not refer to this object, or it could never be collected while the thread waits.
        arguments = (make, self._items, self._slots, self._closed)
        self._thread = threading.Thread(target=_fill, args=arguments, name="fastmoco-loader", daemon=True)
        self._finish = weakref.finalize(self, _finish, self._thread, self._slots, self._closed)
        _running.add(self)
        self._thread.start()

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._closed.is_set():
            raise StopIteration
        start = time.perf_counter()
        item = self._items.get()
        self.wait_seconds += time.perf_counter() - start
        if not isinstance(item, _End):
            self._slots.release()
            return item
        self.close()
        raise item.error or StopIteration

    def close(self) -> None:
        """Stop the thread and wait for its end."""
        self._finish()


def _fill(make: Callable, items: SimpleQueue, slots: threading.Semaphore, closed: threading.Event) -> None:
    try:
        with closing(make()) as generator:
            for item in generator:
                items.put(item)
                slots.acquire()
                if closed.is_set():
                    break
        items.put(_End(None))
    except BaseException as error:
        items.put(_End(error))


def _finish(thread: threading.Thread, slots: threading.Semaphore, closed: threading.Event) -> None:
    closed.set()
    slots.release()
    if thread is not threading.current_thread():
        thread.join()


def _training(source: ImageSource, plan: Plan, steps: range, loading: Loading) -> Generator:
    mine = slice(plan.rank * plan.per_rank, (plan.rank + 1) * plan.per_rank)
    samples_of_steps = ((step, plan.samples(step)[mine]) for step in announced(source.manifest, plan, steps))
    with _crops(source, samples_of_steps, len(plan.views), plan.per_rank, plan.recipe, loading) as crops_of_steps:
        for step, crops in zip(steps, crops_of_steps, strict=True):
            yield *assemble(plan, step, crops, source.origins(step, plan.samples(step)[mine])), _event(source.device)


def announced(images: Manifest, plan: Plan, steps: range) -> Iterator[int]:
    """The steps; before each, remote shards of its window and of the next one begin to be fetched.

    The next window may be the first one of another epoch. It has to wait where the cache does not hold two windows,
    because shards that are still wanted would be removed for it; and nothing is fetched that comes after the last step.
    """
    remote, shards = images.source, images.shards
    if not isinstance(remote, RemoteShards) or plan.recipe.order != "windows" or shards is None:
        yield from steps
        return
    window = len(images) * plan.recipe.window_shards // len(images.archives)
    both = sorted((shard.bytes for shard in remote.known.values()), reverse=True)[: 2 * plan.recipe.window_shards]
    if remote.cache is None or sum(both) > remote.cache.limit:
        window = 0
    last: list[str] = []
    try:
        for step in steps:
            ahead = min(window, (steps.stop - 1 - step) * plan.recipe.batch_size)
            names = [images.archives[shard] for each in plan.windows(step, ahead) for shard in each.tolist()]
            if names != last:
                remote.fetch_ahead(names)
            last = names
            yield step
    finally:
        remote.close()


def _evaluation(source: ImageSource, recipe: Recipe, batches: list[np.ndarray], loading: Loading) -> Generator:
    if not batches:
        return
    with _crops(source, enumerate(batches), 1, len(batches[0]), recipe, loading) as crops_of_batches:
        for index, crops in zip(batches, crops_of_batches, strict=True):
            yield crops[0], index, _event(source.device)


@contextmanager
def _crops(
    source: ImageSource,
    samples_of_steps: Iterable[tuple[int, np.ndarray]],
    views: int,
    batch: int,
    recipe: Recipe,
    loading: Loading,
) -> Iterator[Pipeline]:
    per_call = in_one_call(batch, source.device)
    with _on(_side_stream(source.device)), ThreadPoolExecutor(source.readers.most) as readers:
        pipeline = Pipeline(
            source.requests(readers, samples_of_steps, per_call),
            views=views,
            batch_size=batch,
            crop_size=recipe.crop_size,
            device=source.device,
            threads=loading.threads,
            repair=source.repair,
            decoding=Decoding(loading.hw_decoder_load, recipe.fancy_upsampling),
            cache=source.cache,
            per_call=per_call,
        )
        with closing(pipeline):
            yield pipeline


def in_one_call(batch: int, device: torch.device) -> int:
    """Batches of so many images that one call of DALI decodes: on a GPU as many as make DECODED_AT_ONCE images."""
    return -(-DECODED_AT_ONCE // batch) if device.type == "cuda" else 1


def _dali_views(plan: Plan, parallel: Parallel, threads: int | None) -> Views:
    from fastmoco.data.photometric import DaliPhotometric

    colours, rows = plan.recipe.augmentation, plan.per_rank * plan.recipe.views
    threads = threads or share_of_cores()
    return DaliPhotometric(colours.mean, colours.std, batch_size=rows, device=parallel.device, threads=threads)


def _make_views(batch: Batch, views: Views) -> Batch:
    batch.query_crops = views(batch.query_crops, batch.query_parameters)
    if len(batch.key_rows):
        source = torch.argsort(batch.key_rows)
        batch.key_crops = views(batch.key_crops[source], batch.key_parameters[source])
    return batch


def _boxes(plan: Plan, step: int, samples: np.ndarray) -> np.ndarray:
    return np.stack([plan.boxes(plan.epoch(step), samples, view) for view in plan.views])


def _centre(manifest: Manifest, crop_size: int, _: int, samples: np.ndarray) -> np.ndarray:
    return centre_boxes(manifest.sizes[samples], crop_size)[None]


class ImageSource:
    """What to decode: reads ahead, and puts substitutes in the place of bad samples."""

    def __init__(
        self,
        manifest: Manifest,
        quarantine: Quarantine | None,
        boxes: Callable[[int, np.ndarray], np.ndarray],
        device: torch.device,
        reading: Reading = Reading(),
        cache: PixelCache | None = None,
    ) -> None:
        self.reading = reading
        self._row, self._row_step = 0, -1  # unreadable images at the end of the step that had some last
        self.manifest, self.quarantine, self.boxes, self.device, self.cache = manifest, quarantine, boxes, device, cache
        self.readers = Readers(*(GPU_READERS if device.type == "cuda" else (READERS, READERS)))

    @property
    def repair(self) -> Repair | None:
        return self._repair if self.quarantine is not None else None

    def origins(self, step: int, samples: np.ndarray) -> np.ndarray:
        """Samples whose crops stand in the places of `samples`, once those of `step` have been decoded."""
        return samples if self.quarantine is None else self.quarantine.replace(step, samples)

    def requests(
        self, readers: ThreadPoolExecutor, samples_of_steps: Iterable[tuple[int, np.ndarray]], per_call: int = 1
    ) -> Iterator[Request]:
        reading: deque = deque()
        for step, samples in samples_of_steps:
            origins = self.origins(step, samples)
            if self.cache is not None and all(sample in self.cache for sample in origins.tolist()):
                reading.append((step, origins, iter([[PIXEL] * len(origins)])))
            else:
                # The readers are shared by the batches of one call.
                chunks = np.array_split(origins, min(-(-self.readers.count // per_call), len(origins)))
                reading.append((step, origins, readers.map(self._read, chunks)))
            if len(reading) > READ_AHEAD * per_call:
                yield self._request(*reading.popleft())
        while reading:
            yield self._request(*reading.popleft())

    def _request(self, step: int, samples: np.ndarray, chunks: Iterator[list]) -> Request:
        encoded = [data for chunk in chunks for data in chunk]
        names = Names(self.manifest.path, samples)
        return Request(names, encoded, self.manifest.sizes[samples], self.boxes(step, samples), step, samples)

    def _read(self, indices: np.ndarray) -> list[np.ndarray | OSError | DamagedImage]:
        cache = () if self.cache is None else self.cache
        start = time.perf_counter()
        # Here and not where batches are planned: these threads may wait for a disk. A table's rows are then in memory.
        places = [None] * len(indices) if self.manifest.places is None else self.manifest.places[indices].tolist()
        contents = [
            PIXEL if index in cache else read(self.manifest, index, self.reading, place)
            for index, place in zip(indices.tolist(), places, strict=True)
        ]
        self.readers.took(time.perf_counter() - start, sum(each is not PIXEL for each in contents))
        return contents

    def _refuse_absence(self, request: Request, faults: dict[int, str]) -> None:
        # A folder that has gone is no fault of the images in it, and records are for good.
        unread = [faults.get(i, "").startswith(UNREADABLE) for i in range(len(request.encoded))]
        if not any(unread):
            return
        self._row = self._row if request.step == self._row_step + 1 else 0
        self._row_step, longest = request.step, 0
        for error in unread:
            self._row = self._row + 1 if error else 0
            longest = max(longest, self._row)
        reason = self.manifest.absence()
        if longest >= IN_A_ROW and not reason:
            position = unread.index(True)
            reason = f"{request.names[position]}: {faults[position]}, nor can {longest - 1} others after it be read"
        if reason:
            raise DataError(
                f"{reason}: none was noted as bad; bring the images back, and repeat the command with --resume"
            )

    def _repair(self, request: Request, faults: dict[int, str]) -> Request:
        self._refuse_absence(request, faults)
        samples, encoded = request.samples.copy(), list(request.encoded)
        for position, reason in faults.items():
            while reason:
                assert self.quarantine is not None, "without one there is no repair"
                sample = self.quarantine.add(request.step, int(samples[position]), reason)
                samples[position] = sample
                (encoded[position],) = self._read(samples[position : position + 1])
                reason = fault(encoded[position], self.manifest.sizes[sample])
        return self._request(request.step, samples, iter([encoded]))


def _side_stream(device: torch.device) -> torch.cuda.Stream | None:
    if device.type != "cuda":
        return None
    torch.cuda.set_device(device)  # a thread starts on GPU 0, and going back to it makes a context there
    return torch.cuda.Stream(device)


def _on(stream: torch.cuda.Stream | None, after: torch.cuda.Event | None = None) -> Any:
    if stream is None:
        return nullcontext()
    if after is not None:
        stream.wait_event(after)
    return torch.cuda.stream(stream)


def _event(device: torch.device) -> torch.cuda.Event | None:
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


def _hand_over(item: Any, tensors: list[Tensor], event: torch.cuda.Event | None) -> Any:
    if event is not None:  # the consumer's stream waits for the tensors, and their memory waits for that stream
        stream = torch.cuda.current_stream(tensors[0].device)
        stream.wait_event(event)
        for tensor in tensors:
            tensor.record_stream(stream)
    return item
