"""Decoded and cut as Pillow does, and an error that names exactly the images at fault."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from data.crop_requests import crops, pipeline, request
from PIL import Image, ImageOps

from fastmoco.data import pipeline as pipeline_module
from fastmoco.data.decoded import PIXEL, PixelCache
from fastmoco.data.manifest import Manifest
from fastmoco.data.request import CPU_BATCH, DecodeError, Request, fault
from fastmoco.environment import share_of_cores
from fastmoco.kernels.resize import resizing


@pytest.mark.parametrize("crop_size", [32, 96, 224])
def test_crops_are_those_of_pillow_for_every_kind_of_file(photo_manifest: Manifest, crop_size: int) -> None:
    batch_request = request(photo_manifest, np.arange(len(photo_manifest)))
    (result,) = crops(batch_request, crop_size=crop_size)
    assert result.shape == (2, len(photo_manifest), crop_size, crop_size, 3) and result.dtype == torch.uint8
    for i, data in enumerate(batch_request.encoded):
        image = Image.open(io.BytesIO(data)).convert("RGB")
        assert (image.height, image.width) == tuple(batch_request.sizes[i])
        for view in range(2):
            top, left, height, width = batch_request.boxes[view, i].tolist()
            box = (left, top, left + width, top + height)
            exact = np.asarray(image.crop(box).resize((crop_size, crop_size), Image.BILINEAR), np.int16)
            difference = np.abs(result[view, i].numpy() - exact)
            assert difference.max() <= 1 and difference.mean() < 0.3, photo_manifest.paths[i]


def test_comparison_with_pillow_sees_a_box_that_is_off_by_one(photo_manifest: Manifest) -> None:
    """Negative control of the test above."""
    plain = np.array([i for i, path in enumerate(photo_manifest.paths) if path.endswith(" jpeg.img")])
    batch_request = request(photo_manifest, plain)
    batch_request.boxes[..., 2:] = np.maximum(batch_request.boxes[..., 2:] - 1, 2)
    moved = batch_request.boxes.copy()
    moved[..., 1] += 1
    result, shifted = crops(batch_request, batch_request._replace(boxes=moved))
    assert (result.int() - shifted.int()).abs().float().mean((2, 3, 4)).min() > 0.3


def test_exif_orientation_is_ignored(photo_manifest: Manifest) -> None:
    index = next(i for i, path in enumerate(photo_manifest.paths) if "rotated" in path)
    shown = ImageOps.exif_transpose(Image.open(photo_manifest.path(index)))
    assert (shown.width, shown.height) == tuple(photo_manifest.sizes[index])  # the file does ask for it
    boxes = np.array([[[0, 0, *photo_manifest.sizes[index]]]], np.int32)
    batch_request = request(photo_manifest, np.array([index]), views=1)._replace(boxes=boxes)
    stored = np.asarray(Image.open(photo_manifest.path(index)).resize((64, 64), Image.BILINEAR), np.int16)
    assert np.abs(crops(batch_request, views=1)[0][0, 0].numpy() - stored).max() <= 1


def test_every_size_of_batch_in_order_and_threads_change_nothing(photo_manifest: Manifest) -> None:
    counts = [1, CPU_BATCH - 1, CPU_BATCH, CPU_BATCH + 1, 100, 2]
    starts = np.cumsum([0, *counts[:-1]])
    batch_requests = [
        request(photo_manifest, np.arange(start, start + n) % len(photo_manifest), seed=n)
        for start, n in zip(starts, counts, strict=True)
    ]
    result = crops(*batch_requests)
    assert [batch.shape[1] for batch in result] == counts
    alone = [crops(one)[0] for one in batch_requests]
    threaded = crops(*batch_requests, threads=3)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(result, alone, threaded, strict=True))


def test_crops_stay_intact_while_later_ones_are_made(photo_manifest: Manifest) -> None:
    batch_request = [request(photo_manifest, np.arange(40), seed=seed) for seed in range(6)]
    refs, copies = [], []
    for batch in pipeline(batch_request):
        refs.append(batch)
        copies.append(batch.clone())
    assert all(torch.equal(a, b) for a, b in zip(refs, copies, strict=True))


def test_one_pixel_and_one_view(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(one_pixel())
    manifest = Manifest(str(tmp_path), ["a.png"], np.array([[1, 1]], np.int32))
    (result,) = crops(request(manifest, np.array([0]), views=1), views=1, crop_size=8)
    assert result.shape == (1, 1, 8, 8, 3) and (result == torch.tensor([10, 20, 30])).all()


def one_pixel() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (1, 1), (10, 20, 30)).save(buffer, "PNG")
    return buffer.getvalue()


BROKEN = {
    "empty": lambda data: data[:0],
    "content": lambda data: data[: len(data) // 2].copy(),
    "text": lambda _: np.frombuffer(b"<html>gone</html>", np.uint8),
}


@pytest.mark.parametrize("positions", [[0], [3, 4, 70], [33, 34, 58]])
@pytest.mark.parametrize("damage", BROKEN)
def test_undecodable_images_are_named_and_nothing_else(
    photo_manifest: Manifest, positions: list[int], damage: str
) -> None:
    good = [request(photo_manifest, np.arange(80), seed=seed) for seed in range(3)]
    bad = good[2]._replace(encoded=list(good[2].encoded))
    for position in positions:
        bad.encoded[position] = BROKEN[damage](bad.encoded[position])
    pipe = pipeline([good[0], good[1], bad, good[0]])
    assert torch.equal(next(pipe), crops(good[0])[0]) and next(pipe).shape[1] == 80
    with pytest.raises(DecodeError) as error:
        next(pipe)
    # Of headers all that are bad, before any content is seen; of contents the first.
    at_fault = [p for p in positions if fault(bad.encoded[p], bad.sizes[p].tolist())] or positions[:1]
    assert error.value.positions == at_fault and len(error.value.reasons) == len(at_fault)
    assert error.value.names == [bad.names[position] for position in at_fault]
    assert str(error.value).startswith(f"{bad.names[positions[0]]}: ")
    assert any(why in str(error.value) for why in ("be decoded", "truncated", "empty file", "not an image"))
    assert "\n" not in str(error.value) and error.value.exit_code == 3
    with pytest.raises(StopIteration):
        next(pipe)


def test_an_image_that_changed_its_size_is_named(photo_manifest: Manifest) -> None:
    batch_request = request(photo_manifest, np.arange(50))
    batch_request.sizes[40] += 1
    with pytest.raises(DecodeError, match="pixels, but was .* when it was scanned") as error:
        crops(batch_request)
    assert error.value.positions == [40]


def test_an_error_of_the_requests_waits_for_its_turn(photo_manifest: Manifest) -> None:
    def requests() -> Iterator[Request]:
        yield request(photo_manifest, np.arange(3))
        yield request(photo_manifest, np.arange(4))
        raise OSError("the disk is gone")

    pipe = pipeline(requests())
    assert [next(pipe).shape[1], next(pipe).shape[1]] == [3, 4]
    with pytest.raises(OSError, match="the disk is gone"):
        next(pipe)


def test_closing_early_and_twice(photo_manifest: Manifest) -> None:
    pipe = pipeline(request(photo_manifest, np.arange(40)) for _ in range(1000))
    next(pipe)
    pipe.close()
    pipe.close()
    pipeline([]).close()
    assert crops() == []


def test_ranks_share_the_cores_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(pipeline_module, "_cpu_crops", lambda *options: calls.append(options[5]))
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(16))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    for ranks, expected in ((None, 16), (1, 16), (3, 5), (8, 2), (32, 1)):
        if ranks:
            monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        pipeline([], threads=None)
        assert share_of_cores() == calls[-1] == expected
    pipeline([], threads=7)
    assert calls[-1] == 7


def _threads_started_by(work: Callable[[], object]) -> int:
    started = []

    def count() -> None:
        before = set(os.listdir("/proc/self/task"))  # by number, because earlier ones may end meanwhile
        torch.set_num_threads(2)
        work()
        started.append(len(set(os.listdir("/proc/self/task")) - before))
        torch.set_num_threads(1)

    thread = threading.Thread(target=count)
    thread.start()
    thread.join()
    return started[0]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads where Linux lists them")
def test_cutting_starts_no_openmp_threads() -> None:
    """They would put those of the training step to sleep (bench/NOTES.md). The control cuts as torch itself does."""
    image = torch.randint(0, 256, (400, 500, 3), dtype=torch.uint8)
    boxes = np.array([[[10, 20, 300, 400]], [[0, 0, 400, 500]]], np.int32)
    crops = torch.zeros(2, 1, 224, 224, 3, dtype=torch.uint8)
    planes = image[10:310, 20:420].permute(2, 0, 1)[None]
    for impl in ("auto", "reference"):
        assert _threads_started_by(resizing([image], boxes, crops, impl)) == 0
    assert _threads_started_by(lambda: F.interpolate(planes, (224, 224), mode="bilinear", antialias=True)) == 1
    expected = F.interpolate(planes, (224, 224), mode="bilinear", antialias=True)[0].permute(1, 2, 0)
    assert torch.equal(crops[0, 0], expected)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads where Linux lists them")
def test_keeping_an_image_starts_no_openmp_threads() -> None:
    """Nor do these; the control copies as torch itself does."""
    image = torch.randint(0, 256, (400, 500, 3), dtype=torch.uint8)
    cache, copy = PixelCache(image.numel()), torch.empty_like(image)
    assert _threads_started_by(lambda: cache.put(0, image)) == 0
    assert _threads_started_by(lambda: copy.copy_(image)) == 1
    assert torch.equal(cache.complete(np.array([0]), [PIXEL], [])[0], image)
