"""Encoded bytes and boxes in, uint8 crops out: each image is decoded once by DALI and cut as often as there are boxes.

On a GPU, DALI decodes ("mixed") and resizes: in one pipeline, or in two where decoded images are kept, so that these
come in between. On a CPU, DALI decodes and a loop of ours resizes: it computes what Pillow does at less than a fifth of
the cost of DALI's resampler. Nothing is drawn here; the boxes come from the plan.
"""

from __future__ import annotations

import itertools
import re
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from nvidia.dali import Pipeline as DaliPipeline
from nvidia.dali import fn, types
from torch import Tensor

from fastmoco.data.decoded import PIXEL, PixelCache
from fastmoco.data.manifest import ONE_COLOUR, CheckResult, Manifest
from fastmoco.data.request import (
    CPU_BATCH,
    NO_BOXES,
    DecodeError,
    Part,
    Repair,
    Request,
    by_request,
    checked_requests,
    joined_parts,
    read,
    small_parts,
    some_of,
    together,
)
from fastmoco.data.rewrite import Reading
from fastmoco.environment import share_of_cores
from fastmoco.kernels.resize import resizing

DEPTH = 2  # batches that DALI works on at once
RESIZED_AT_ONCE = 64  # images a GPU resizes in one launch; bounds the memory of what stands between the two passes
# Share of JPEGs for the GPU's decoding engines, by its name and the least number of decoding threads: the rest goes to
# the multiprocessors, where each image needs a thread for its entropy coding. GPUs without an engine ignore it. Not
# ours: A100 7,000 a second at 0.75 against 5,000 at 1 (NVIDIA/DALI#5362), and 0.65, DALI's default, for even times
# where threads abound (NVIDIA/DALI#6366). An H100 and an H200 have seven engines, and beside a training step the
# multiprocessors have better things to do: MLPerf trained at 0.99 with six threads, and 0.9 was faster end to end than
# 0.65 in NVIDIA/DALI#6366. `bench train` sweeps the share on a GPU.
HW_DECODER_LOADS = {
    "A100": ((6, 0.75), (3, 0.9), (0, 1.0)),
    "H100": ((6, 0.95), (0, 1.0)),
    "H200": ((6, 0.95), (0, 1.0)),
    "": ((12, 0.65), (6, 0.8), (3, 0.9), (0, 1.0)),
}
SHARED_PIXELS = 1 << 20  # of boxes: fewer are resized by one thread, in 3 ms, before another one would have begun
SAMPLE = re.compile(r"sample #(\d+)")  # what DALI's error says of an image it cannot decode
JPEG = b"\xff\xd8"  # how one begins


class Decoding(NamedTuple):
    """How a GPU decodes JPEGs."""

    hw_load: float | None = None
    """Share for the decoding engine, or None for the table's."""
    fancy_upsampling: bool = False
    """Whether colours are interpolated, as the CPU's decoder always does."""

    def options(self, threads: int, gpu: str) -> dict[str, object]:
        """DALI's names for it, on a GPU of that name."""
        loads = next(loads for name, loads in HW_DECODER_LOADS.items() if name in gpu)
        load = next(load for least, load in loads if threads >= least)
        share = load if self.hw_load is None else self.hw_load
        return {"hw_decoder_load": share, "jpeg_fancy_upsampling": self.fancy_upsampling}


class Pipeline:
    """Iterator of uint8 crops [V, n, S, S, 3] on `device`, one tensor for each request, in order.

    Requests are drawn while earlier ones are being decoded. `batch_size` bounds their n, and `views` is their V. On a
    GPU DALI decodes `per_call` requests in one call: a call has a fixed cost, and small ones starve the engine. There
    the crops are ordered on the stream current in the calling thread. `cache`, on `device`, has the pixels of images
    that need not be decoded, and takes those of the others.

    What cannot be decoded is given to `repair`, and only the requests under way are decoded again. Without `repair`
    the iterator raises DecodeError once everything before it has been handed out, and ends. An error from `requests` is
    raised in the same way.
    """

    def __init__(
        self,
        requests: Iterable[Request],
        *,
        batch_size: int,
        crop_size: int,
        views: int,
        device: torch.device,
        threads: int | None = None,
        repair: Repair | None = None,
        decoding: Decoding = Decoding(),
        cache: PixelCache | None = None,
        per_call: int = 1,
    ) -> None:
        valid, threads = checked_requests(requests, repair), threads or share_of_cores()
        if device.type == "cuda":
            options = decoding.options(threads, torch.cuda.get_device_name(device))
            shape = (batch_size, crop_size, views)
            self._crops = _dali_crops(valid, repair, *shape, device, threads, options, cache, per_call)
        else:
            self._crops = _cpu_crops(valid, repair, batch_size, crop_size, views, threads, cache)

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        return next(self._crops)

    def close(self) -> None:
        """Stop and free everything; harmless when done twice."""
        self._crops.close()


def _cpu_crops(
    requests: Iterator[Request],
    repair: Repair | None,
    batch_size: int,
    crop_size: int,
    views: int,
    threads: int,
    cache: PixelCache | None,
) -> Generator[Tensor, None, None]:
    build = partial(_dali, min(batch_size, CPU_BATCH), threads, None, 1, _decode_graph)

    def decoded(several: Iterator[Request]) -> Iterator[tuple[Part, Sequence[Tensor]]]:
        for part, (images,) in _outputs(build, _Feed(small_parts(several), _encoded), repair):
            yield part, _tensors(images)

    with ThreadPoolExecutor(threads) as pool:
        # Batches that are kept whole pass DALI by. Its pipeline ends before the first of them.
        for is_kept, several in itertools.groupby(requests, lambda request: request.is_kept):
            parts = ((together([request]), ()) for request in several) if is_kept else decoded(several)
            for (request, first, total, _), images in parts:
                if first == 0:
                    crops = torch.empty(views, total, crop_size, crop_size, 3, dtype=torch.uint8)
                if cache is not None:
                    images = cache.complete(request.samples, request.encoded, images)
                cut(images, request.boxes, crops[:, first : first + len(images)], pool, threads)
                if first + len(images) == total:
                    yield crops


def cut(images: Sequence[Tensor], boxes: np.ndarray, crops: Tensor, pool: ThreadPoolExecutor, threads: int) -> None:
    """Resize the boxes [V, n, 4] of uint8 `images` [H, W, 3] into `crops` [V, n, S, S, 3], by up to `threads` threads.

    One of them is the calling one, the others are those of `pool`.
    """
    work = resizing(images, boxes, crops)
    more = threads - 1 if boxes[..., 2:].prod(-1).sum() > SHARED_PIXELS else 0
    others = [pool.submit(work) for _ in range(more)]
    work()
    for each in others:
        each.result()


def _dali_crops(
    requests: Iterator[Request],
    repair: Repair | None,
    batch_size: int,
    crop_size: int,
    views: int,
    device: torch.device,
    threads: int,
    decoding: dict[str, object],
    cache: PixelCache | None,
    per_call: int = 1,
) -> Generator[Tensor, None, None]:
    # Tests run it on a CPU too.
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    device_id, decoder = (None, "cpu") if stream is None else (device.index or 0, "mixed")
    parts = joined_parts(requests, per_call)
    decode = partial(_decode_graph, device=decoder, **decoding)
    batch_size *= per_call
    resize = partial(_resize_graph, crop_size=crop_size, at_once=min(batch_size, RESIZED_AT_ONCE))
    build = partial(_dali, batch_size, threads, device_id)
    if cache is None:
        graph = partial(_crop_graph, decode=decode, resize=resize)
        outputs = _outputs(partial(build, 1 + 2 * views, graph), _Feed(parts, _with_corners), repair, stream)
    else:
        decoded = _outputs(partial(build, 1, decode), _Feed(parts, _encoded), repair, stream)
        outputs = _cut_with_cache(decoded, cache, _cutter(batch_size, device_id, 2 * views, resize), stream)
    for part, resized in outputs:
        tensors = [torch.from_dlpack(each.as_tensor()) for each in resized]
        lengths = [len(request.encoded) for request in part.requests]
        for rows in zip(*(each.split(lengths) for each in tensors), strict=True):
            crops = torch.empty(views, len(rows[0]), crop_size, crop_size, 3, dtype=torch.uint8, device=device)
            # The one copy: from here on the memory is torch's, which knows when a later stream is done with it.
            for crop, row in zip(crops, rows, strict=True):
                crop.copy_(row)
            yield crops


def _cut_with_cache(
    decoded: Iterator[tuple[Part, tuple]], cache: PixelCache, cutter: DaliPipeline, stream: torch.cuda.Stream | None
) -> Iterator[tuple[Part, tuple]]:
    if stream is not None:
        cache.lend(stream)
    for part, (images,) in decoded:
        pixels = cache.complete(part.request.samples, part.request.encoded, _tensors(images))
        # Copied, on `stream`: the decoder may have its memory back, ordered on the same stream, when this resumes it.
        # 0 where there is none: for None DALI would ask torch, also where torch has no CUDA.
        cutter.feed_input("images", pixels, layout="HWC", cuda_stream=0 if stream is None else stream)
        for number, corner in enumerate(_with_corners(part)[1:]):
            cutter.feed_input(f"corner{number}", corner)
        cutter.schedule_run()
        yield part, cutter.share_outputs(stream)
        cutter.release_outputs()


def _encoded(part: Part) -> tuple:
    # Never nothing at all, which DALI does not take.
    return ([data for data in part.request.encoded if data is not PIXEL] or [PIXEL],)


def _tensors(images: Sequence) -> list[Tensor]:
    return [torch.from_dlpack(images[i]) for i in range(len(images))]


def _with_corners(part: Part) -> tuple:
    starts = part.request.boxes[..., :2].astype(np.float32)
    ends = starts + part.request.boxes[..., 2:].astype(np.float32)
    corners = [np.ascontiguousarray(corner) for pair in zip(starts, ends, strict=True) for corner in pair]
    return (part.request.encoded, *corners)


class _Feed:
    """DALI's source callback. It keeps the parts whose results are still to come, and their bytes until DALI is done.

    DALI reads the bytes where they are: its own copy takes as long as all else that Python does for a batch, and holds
    Python's lock meanwhile.
    """

    def __init__(self, parts: Iterator[Part], inputs: Callable[[Part], tuple]) -> None:
        self.parts, self.inputs = parts, inputs
        self.pending: deque[Part] = deque()
        self.error: Exception | None = None
        self._inputs: deque[tuple] = deque()  # of the pending parts, in their order
        self._in_use: deque[tuple[tuple, Any]] = deque()  # of those handed out, until a GPU has passed the event

    def hand_over(self, stream: Any) -> None:
        # The first pending part was used. What DALI enqueued for it lies before the event, reads of its bytes included.
        inputs = self._inputs.popleft()
        if stream is None:
            return
        self._in_use.append((inputs, stream.record_event()))
        while self._in_use and self._in_use[0][1].query():
            self._in_use.popleft()

    def forget(self) -> None:
        # DALI's graph holds itself and with it this until Python looks for cycles, and the parts hold decoded images.
        self.parts = iter(())
        for queue in (self.pending, self._inputs, self._in_use):
            queue.clear()

    def __call__(self) -> tuple:
        try:
            self.pending.append(next(self.parts))
        except StopIteration:
            raise
        except Exception as error:
            # Raised from here it would take the batches before it along, so it waits until they are handed out.
            self.error = error
            raise StopIteration from None
        self._inputs.append(self.inputs(self.pending[-1]))
        return self._inputs[-1]


def _outputs(
    build: Callable[[_Feed], DaliPipeline], feed: _Feed, repair: Repair | None, stream: Any = None
) -> Iterator[tuple[Part, tuple]]:
    pipe = build(feed)
    try:
        while True:
            pipe.schedule_run()  # the first time DEPTH runs, as far as there are requests
            try:
                outputs = pipe.share_outputs(stream)
            except StopIteration:
                break
            except RuntimeError as error:
                faults = _faults(build, feed, error, stream)
                pipe._shutdown()  # waits for what it still reads
                feed = _repair(feed, repair, faults)
                pipe = build(feed)  # a failure ends a DALI pipeline
                continue
            yield feed.pending.popleft(), outputs
            pipe.release_outputs()
            feed.hand_over(stream)
        if feed.error:
            raise feed.error
    finally:
        pipe._shutdown()
        feed.forget()


def _repair(feed: _Feed, repair: Repair | None, faults: dict[int, str]) -> _Feed:
    part = feed.pending.popleft()
    wrong = by_request(part, faults)
    first = min(wrong)
    if repair is None and first == 0:
        raise DecodeError.of(part.requests[0].names, wrong[0], part.first)
    if repair is None:  # those before it are handed out first
        halves = [together(part.several[:first]), together(part.several[first:])]
    elif part.several:
        halves = [together([repair(one, wrong[i]) if i in wrong else one for i, one in enumerate(part.several)])]
    else:
        halves = [part._replace(request=repair(part.request, faults))]
    again = _Feed(itertools.chain([*halves, *feed.pending], feed.parts), feed.inputs)
    again.error = feed.error
    feed.forget()
    return again


def _faults(build: Callable[[_Feed], DaliPipeline], feed: _Feed, error: RuntimeError, stream: Any) -> dict[int, str]:
    # DALI says which sample failed and not why: running out of GPU memory looks the same. So blame the image only if
    # the CPU's decoder fails too, or the GPU fails on it alone while it still works otherwise.
    part, match = feed.pending[0], SAMPLE.search(str(error))
    positions = [i for i, data in enumerate(part.request.encoded) if data is not PIXEL]
    position = None
    if match and positions:
        position = positions[int(match[1])]
    elif positions:
        position = _find_by_halves(part, positions)
    if position is None:
        raise error
    alone = some_of(part, [position])
    if _cpu_fails_at(part, [position]):
        return {position: "damaged: cannot be decoded"}
    if stream is not None:
        stream.synchronize()  # raises what has ended the GPU
    failure = _failure(build, _Feed(iter([alone]), feed.inputs))
    if not SAMPLE.search(failure):
        short = "memory" if stream is None else "memory on the GPU"
        reason = failure or f"decoded alone, but not in its batch; is there too little {short}?"
        raise RuntimeError(f"{part.request.names[position]}: {reason}") from error
    return {position: "cannot be decoded on the GPU"}


def _find_by_halves(part: Part, positions: list[int]) -> int | None:
    # The position that a CPU fails at, where DALI's error names none; None if it fails at none.
    if not _cpu_fails_at(part, positions):
        return None
    while len(positions) > 1:
        half = positions[: len(positions) // 2]
        positions = half if _cpu_fails_at(part, half) else positions[len(half) :]
    return positions[0]


def _cpu_fails_at(part: Part, positions: list[int]) -> str:
    build = partial(_dali, len(positions), 1, None, 1, _decode_graph)
    return _failure(build, _Feed(iter([some_of(part, positions)]), _encoded))


def _failure(build: Callable[[_Feed], DaliPipeline], feed: _Feed) -> str:
    pipe = build(feed)
    try:
        pipe.schedule_run()
        pipe.share_outputs()
        return ""
    except RuntimeError as error:
        return str(error)
    finally:
        pipe._shutdown()
        feed.forget()


def _dali(
    batch_size: int, threads: int, device_id: int | None, inputs: int, graph: Callable, source: Callable
) -> DaliPipeline:
    pipe = DaliPipeline(batch_size, threads, device_id, prefetch_queue_depth=DEPTH)
    # Streams as DALI chooses them: one for what the decoder makes, one for what follows. Do not ask for a stream_policy
    # of SINGLE or PER_OPERATOR: an H100's engine for JPEG writes when it is called, not in the order of its stream
    # (pytorch/vision#9606), and where decoder and resizing share a stream, DALI gives the memory of one batch to the
    # next without waiting for an event. Pixels would be overwritten while they are read, with no error.
    kinds = [types.UINT8] + [types.FLOAT] * (inputs - 1)
    with pipe:
        # Without a copy: the feed keeps what it gave until DALI has read it.
        options: dict[str, Any] = {"batch": True, "dtype": kinds, "ndim": [1] * inputs, "no_copy": True}
        nodes = fn.external_source(source=source, num_outputs=inputs, **options)
        pipe.set_outputs(*graph(*nodes))
    pipe.build()
    return pipe


def _decode_graph(encoded: Any, *, device: str = "cpu", **options: Any) -> tuple:
    # As torchvision and Pillow do, the orientation that EXIF asks for is ignored.
    return (fn.decoders.image(encoded, device=device, output_type=types.RGB, adjust_orientation=False, **options),)


def _crop_graph(encoded: Any, *corners: Any, decode: Callable, resize: Callable) -> tuple:
    return resize(*decode(encoded), *corners)


def _resize_graph(image: Any, *corners: Any, crop_size: int, at_once: int) -> tuple:
    resize = partial(
        fn.resize,
        image,
        size=(crop_size, crop_size),
        interp_type=types.INTERP_LINEAR,
        antialias=True,
        minibatch_size=at_once,
    )
    boxes = zip(corners[::2], corners[1::2], strict=True)
    return tuple(resize(roi_start=start, roi_end=end) for start, end in boxes)


def _cutter(batch_size: int, device_id: int | None, corners: int, graph: Callable) -> DaliPipeline:
    # One batch at a time: its input is there when it is run, and decoding goes on meanwhile.
    pipe = DaliPipeline(batch_size, 1, device_id, prefetch_queue_depth=1)
    device = "cpu" if device_id is None else "gpu"
    with pipe:
        images = fn.external_source(name="images", device=device, dtype=types.UINT8, ndim=3, layout="HWC")
        names = [f"corner{number}" for number in range(corners)]
        pipe.set_outputs(*graph(images, *(fn.external_source(name=name, dtype=types.FLOAT, ndim=1) for name in names)))
    pipe.build()
    return pipe


def undecodable(
    manifest: Manifest, threads: int | None = None, reading: Reading = Reading(), at_once: int | None = None
) -> Iterator[CheckResult]:
    """For each image of `manifest`, in order, why it cannot be decoded on the CPU, and how many levels it spans.

    A crash of a decoder ends the process: `full_scan.decode_apart` outlives it.
    """
    reasons: dict[int, str] = {}

    def leave_out(request: Request, faults: dict[int, str]) -> Request:
        reasons.update((int(request.samples[i]), reason) for i, reason in faults.items())
        return request._replace(encoded=[PIXEL if i in faults else data for i, data in enumerate(request.encoded)])

    build = partial(_dali, CPU_BATCH, threads or share_of_cores(), None, 1, _decode_graph)
    requests = _whole(manifest, reading, at_once or CPU_BATCH)
    parts = small_parts(checked_requests(requests, leave_out))
    for part, (images,) in _outputs(build, _Feed(parts, _encoded), leave_out):
        decoded = iter(_tensors(images))
        for sample, data in zip(part.request.samples.tolist(), part.request.encoded, strict=True):
            if data is PIXEL:
                yield CheckResult(reasons.pop(sample), 0)
            else:
                assert isinstance(data, np.ndarray), "checked before"
                span = _span(next(decoded).numpy())
                # A photograph may be faint, but the numbers of a JPEG are what they are meant to be.
                faint = span > ONE_COLOUR and data[:2].tobytes() == JPEG
                yield CheckResult("", 255 if faint else span)


def _span(image: np.ndarray) -> int:
    # Levels that all but the darkest and the brightest hundredth of the pixels lie within, in the channel with most of
    # them; a grid of pixels will do.
    step = max(1, min(image.shape[:2]) // 128)
    grid = np.sort(image[::step, ::step].reshape(-1, image.shape[2]), 0).astype(int)
    edge = len(grid) // 100
    return int((grid[-1 - edge] - grid[edge]).max())


def _whole(manifest: Manifest, reading: Reading, at_once: int) -> Iterator[Request]:
    for at in range(0, len(manifest), at_once):
        samples = np.arange(at, min(at + at_once, len(manifest)))
        sizes = manifest.sizes[samples]
        yield Request([], [read(manifest, i, reading) for i in samples.tolist()], sizes, NO_BOXES, 0, samples)
