"""Decoding as on a GPU: a stand-in for DALI's pipeline fails as one for a GPU does; and tests that need a GPU."""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from data.crop_requests import CPU, crops, pipeline, request
from PIL import Image

from fastmoco.data import pipeline as pipeline_module
from fastmoco.data.decoded import PIXEL, PixelCache
from fastmoco.data.manifest import Manifest
from fastmoco.data.pipeline import Decoding, Pipeline
from fastmoco.data.request import DecodeError, Part, Request

VICTIMS: dict[bytes, int] = {}
JOINED = [1]  # requests that a call of DALI decodes
MESSAGE = "Error in MIXED operator `nvidia.dali.fn.decoders.image`\n\nFailed to decode sample #{} : \nCurrent pipeline"


class Gpu:
    """DALI's pipeline for a CPU, that fails at the images of VICTIMS in the way of one for a GPU.

    Their values are the least batch in which they fail. What looks for damage on a CPU, by plain decoding, never fails.
    """

    message = MESSAGE

    def __init__(self, pipe: object, feed: object) -> None:
        self.pipe, self.feed = pipe, feed
        self.schedule_run, self.release_outputs = pipe.schedule_run, pipe.release_outputs
        self._shutdown = pipe._shutdown

    def share_outputs(self, stream: object = None) -> object:
        inputs = self.feed.inputs(self.feed.pending[0])[0] if self.feed.pending else []
        for number, data in enumerate(inputs):
            if VICTIMS.get(data.tobytes(), 1 << 30) <= len(inputs):
                # What it says of an image that is alone is another message where a test wants it.
                raise RuntimeError((MESSAGE if len(inputs) > 1 else self.message).format(number))
        return self.pipe.share_outputs(stream)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Decode as on a GPU; the sizes of the batches that were decoded to look for damage on a CPU."""
    searches, original = [], pipeline_module._dali

    def build(batch_size: int, *options: object) -> object:
        graph, feed = options[-2:]
        if graph is pipeline_module._decode_graph:
            searches.append(batch_size)
            return original(batch_size, *options)
        return Gpu(original(batch_size, *options), feed)

    def as_on_gpu(requests: object, repair: object, batch: int, size: int, views: int, *rest: object) -> object:
        return pipeline_module._dali_crops(requests, repair, batch, size, views, CPU, rest[0], {}, rest[1], JOINED[0])

    monkeypatch.setattr(pipeline_module, "_dali", build)
    monkeypatch.setattr(pipeline_module, "_cpu_crops", as_on_gpu)
    JOINED[0] = 1
    VICTIMS.clear()
    return searches


def kept_at(manifest: Manifest, batch_request: Request, positions: list[int]) -> tuple[Request, PixelCache]:
    """`batch_request` with some of its images already decoded."""
    cache = PixelCache(10**8)
    for i in positions:
        cache.put(i, torch.from_numpy(np.array(Image.open(manifest.path(i)).convert("RGB"))))
    return batch_request._replace(
        encoded=[PIXEL if i in positions else data for i, data in enumerate(batch_request.encoded)]
    ), cache


def shortened_webp(data: np.ndarray) -> np.ndarray:
    """Half of the file, which says that it is the whole."""
    half = data[: len(data) // 4 * 2].copy()
    half[4:8] = np.frombuffer((len(half) - 8).to_bytes(4, "little"), np.uint8)
    return half


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("damaged", [False, True])
def test_what_only_a_gpu_cannot_decode_is_named_or_repaired(
    photo_manifest: Manifest, gpu: list[int], cached: bool, damaged: bool
) -> None:
    batch_request = request(photo_manifest, np.arange(40))._replace(samples=np.arange(40))
    data, kept = [*batch_request.encoded], None
    data[36] = shortened_webp(data[36]) if damaged else data[36]
    bad = batch_request._replace(encoded=data)
    VICTIMS[data[36].tobytes()] = 1
    if cached:
        bad, kept = kept_at(photo_manifest, bad, [0, 7, 8, 30])
    options = {"batch_size": 40, "crop_size": 32, "views": 2, "device": CPU, "threads": 1, "cache": kept}
    reason = "damaged: cannot be decoded" if damaged else "cannot be decoded on the GPU"
    with pytest.raises(DecodeError) as error:
        list(Pipeline([bad], **options))
    assert error.value.names == [batch_request.names[36]] and error.value.positions == [36]
    assert error.value.reasons == [reason]
    messages = []

    def repair(request: Request, faults: dict[int, str]) -> Request:
        messages.append(faults)
        other = np.append(batch_request.encoded[36], np.uint8(0))  # the same picture: its boxes must fit it
        return request._replace(encoded=[d if i != 36 else other for i, d in enumerate(request.encoded)])

    (result,) = Pipeline([bad], repair=repair, **options)
    assert result.shape[1] == 40 and messages == [{36: reason}]
    assert gpu == [1, 1]  # no other image was decoded to look for the damage


@pytest.mark.usefixtures("gpu")
def test_where_the_gpu_is_to_blame_no_image_is(photo_manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image that is decoded alone, an error that names none, and a GPU that has failed for good."""
    batch_request = request(photo_manifest, np.arange(40))
    options = {"batch_size": 40, "crop_size": 32, "views": 2, "device": CPU, "threads": 1, "repair": pytest.fail}
    VICTIMS[batch_request.encoded[26].tobytes()] = 2
    with pytest.raises(RuntimeError, match=r"026 jpeg.img: decoded alone, but not in its batch.*memory"):
        list(Pipeline([batch_request], **options))
    VICTIMS[batch_request.encoded[26].tobytes()] = 1
    monkeypatch.setattr(Gpu, "message", "CUDA allocation failed")
    with pytest.raises(RuntimeError, match="CUDA allocation failed"):
        list(Pipeline([batch_request], **options))
    part = Part(batch_request, 0, 40)
    feed = pipeline_module._Feed(iter(()), pipeline_module._with_corners)
    feed.pending.append(part)
    for message in ("CUDA allocation failed", "CUDA runtime API error cudaErrorIllegalAddress (700)"):
        with pytest.raises(RuntimeError, match=re.escape(message)):
            pipeline_module._faults(pytest.fail, feed, RuntimeError(message), None)

    class Failed:
        def synchronize(self) -> None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        pipeline_module._faults(pytest.fail, feed, RuntimeError(MESSAGE.format(3)), Failed())


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("cached", [False, True])
def test_several_requests_in_one_call_make_the_crops_of_each_alone(photo_manifest: Manifest, cached: bool) -> None:
    """With a last call that is short, and sizes that differ; decoded images come from a cache or not."""
    counts = [4, 7, 1, 7, 3, 6, 2]
    starts = np.cumsum([0, *counts[:-1]])
    batch_requests = [
        request(photo_manifest, np.arange(start, start + n), seed=n)._replace(samples=np.arange(start, start + n))
        for start, n in zip(starts, counts, strict=True)
    ]
    options = {"batch_size": 7, "crop_size": 32, "views": 2, "device": CPU, "threads": 1}

    def made(count: int) -> list[torch.Tensor]:
        JOINED[0] = count
        kept = None
        if cached:
            _, kept = kept_at(photo_manifest, request(photo_manifest, np.arange(30)), [0, 5, 6, 12, 29])
        arguments = [
            one._replace(encoded=[PIXEL if kept and i in kept else data for i, data in zip(one.samples, one.encoded)])
            for one in batch_requests
        ]
        return list(Pipeline(arguments, cache=kept, **options))

    alone = made(1)
    assert [each.shape[1] for each in alone] == counts
    for count in (2, 3, 8):
        together = made(count)
        assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True)), count


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("bad", [0, 1, 3])
def test_a_bad_image_among_several_requests_is_the_one_of_its_request(photo_manifest: Manifest, bad: int) -> None:
    """Without a repair the requests before it come first, those of the same call too; with one they all come."""
    batch_request = [request(photo_manifest, np.arange(10 * i, 10 * i + 10))._replace(step=i) for i in range(4)]
    victim = batch_request[bad].encoded[6]
    VICTIMS[victim.tobytes()] = 1
    JOINED[0] = 3
    options = {"batch_size": 10, "crop_size": 32, "views": 2, "device": CPU, "threads": 1}
    pipe = Pipeline(batch_request, **options)
    good = [next(pipe) for _ in range(bad)]
    assert all(each.shape[1] == 10 for each in good)
    with pytest.raises(DecodeError) as error:
        next(pipe)
    assert error.value.positions == [6] and error.value.names == [batch_request[bad].names[6]]
    messages = []

    def repair(request: Request, faults: dict[int, str]) -> Request:
        messages.append((request.step, list(faults)))
        # The same picture in other bytes: the boxes must fit what takes its place.
        data = [np.append(each, np.uint8(0)) if each is victim else each for each in request.encoded]
        return request._replace(encoded=data)

    repaired_crops = list(Pipeline(batch_request, repair=repair, **options))
    assert messages == [(bad, [6])] and [each.shape[1] for each in repaired_crops] == [10] * 4
    assert all(torch.equal(a, b) for a, b in zip(good, repaired_crops, strict=False))


@pytest.mark.usefixtures("gpu")
def test_an_error_of_the_requests_waits_for_those_of_its_call(photo_manifest: Manifest) -> None:
    def requests() -> Iterator[Request]:
        yield request(photo_manifest, np.arange(3))
        yield request(photo_manifest, np.arange(4))
        raise OSError("the disk is gone")

    JOINED[0] = 4
    pipe = pipeline(requests())
    assert [next(pipe).shape[1], next(pipe).shape[1]] == [3, 4]
    with pytest.raises(OSError, match="the disk is gone"):
        next(pipe)


def test_bytes_are_kept_until_the_gpu_has_passed_what_reads_them() -> None:
    """DALI reads them where they are, and a GPU is behind the host. A feed that let go of them would lose them here."""
    passed: list[bool] = []

    class Event:
        def __init__(self) -> None:
            self.number = len(passed)
            passed.append(False)

        def query(self) -> bool:
            return passed[self.number]

    class Stream:
        record_event = staticmethod(Event)

    def inputs(_: object) -> tuple:
        arguments.append(np.zeros(3))
        return (arguments[-1],)

    arguments: list[np.ndarray] = []
    feed = pipeline_module._Feed(iter([None] * 4), inputs)
    alive = []
    for _ in range(3):
        alive.append(weakref.ref(feed()[0]))
        arguments.clear()
        feed.pending.popleft()
        feed.hand_over(Stream())
    assert all(each() is not None for each in alive)
    passed[0] = passed[1] = True
    feed()
    feed.hand_over(Stream())
    assert [each() is None for each in alive] == [True, True, False]


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(("batch_size", "expected"), [(40, 40), (200, 64)])
def test_a_gpu_resizes_so_many_images_at_once(
    photo_manifest: Manifest, monkeypatch: pytest.MonkeyPatch, batch_size: int, expected: int
) -> None:
    calls, original = [], pipeline_module.fn.resize

    def resize(*images: object, **options: object) -> object:
        calls.append(options["minibatch_size"])
        return original(*images, **options)

    monkeypatch.setattr(pipeline_module.fn, "resize", resize)
    options = {"batch_size": batch_size, "crop_size": 32, "views": 2, "device": CPU, "threads": 1}
    list(Pipeline([request(photo_manifest, np.arange(5))], **options))
    assert calls == [expected] * 2


def test_the_decoding_engine_takes_more_where_threads_are_few() -> None:
    expected = {
        "NVIDIA A100-SXM4-80GB": [1.0, 0.9, 0.75, 0.75, 0.75],
        "NVIDIA H100 80GB HBM3": [1.0, 1.0, 0.95, 0.95, 0.95],
        "NVIDIA H200": [1.0, 1.0, 0.95, 0.95, 0.95],
        "NVIDIA GeForce RTX 4090": [1.0, 0.9, 0.8, 0.65, 0.65],
    }
    for gpu, loads in expected.items():
        assert [Decoding().options(threads, gpu)["hw_decoder_load"] for threads in (1, 4, 8, 16, 64)] == loads
        assert Decoding(0.3, True).options(8, gpu) == {"hw_decoder_load": 0.3, "jpeg_fancy_upsampling": True}


def test_dali_knows_the_options_of_the_gpu() -> None:
    from nvidia.dali import ops

    schema = ops.decoders.Image(device="cpu").schema
    assert all(schema.HasArgument(name) for name in Decoding().options(1, "any"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_with_fancy_upsampling_makes_the_crops_of_a_cpu(photo_manifest: Manifest) -> None:
    jpegs = np.array([i for i, path in enumerate(photo_manifest.paths) if " jpeg" in path])
    batch_request = request(photo_manifest, jpegs)
    (exact,) = crops(batch_request)
    options = {"batch_size": 200, "crop_size": 64, "views": 2, "device": torch.device("cuda", 0), "threads": 4}
    choices = [Decoding(0.65, fancy) for fancy in (True, False)]
    fancy, plain = (next(Pipeline([batch_request], decoding=choice, **options)).cpu() for choice in choices)
    error, control = ((result.int() - exact.int()).abs().float().mean() for result in (fancy, plain))
    assert error < 2 and error < control


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("kind", "allowed"), [(" jpeg444.", 1.0), (" jpeg.", 2.0)])
def test_the_engine_and_the_multiprocessors_decode_one_image_alike(
    photo_manifest: Manifest, kind: str, allowed: float
) -> None:
    """Each gives the same bits every time; between the two a mean of so many of 255 levels is allowed, more where
    colours are stored at half the size. The control is another image."""
    images = [i for i, path in enumerate(photo_manifest.paths) if kind in path][:2]
    one, other = (request(photo_manifest, np.array([i]), views=1) for i in images)
    options = {"batch_size": 1, "crop_size": 64, "views": 1, "device": torch.device("cuda", 0), "threads": 4}

    def made(batch_request: Request, load: float) -> torch.Tensor:
        (crops,) = Pipeline([batch_request], decoding=Decoding(load), **options)
        return crops.cpu().int()

    for load in (0.0, 1.0):
        assert torch.equal(made(one, load), made(one, load))
    difference, control = ((made(one, 0.0) - made(asked, 1.0)).abs().float().mean() for asked in (one, other))
    assert difference <= allowed < 10 < control
