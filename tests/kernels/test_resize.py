"""Boxes resized to crops: the compiled loop has the bits of torch's operator, and both are what a triangle gives."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from torch import Tensor

from fastmoco.kernels import dispatch, resize
from fastmoco.kernels.resize import resizing

SIZES = (1, 2, 5, 7, 16, 24, 33, 112)


def pictures(count: int, least: int, most: int, seed: int = 0) -> list[Tensor]:
    """Noise of random sizes, a third of it black and white: the sums of these reach both ends of a byte."""
    random = np.random.default_rng(seed)
    shapes = random.integers(least, most + 1, (count, 2))
    arrays = [random.integers(0, 256, (height, width, 3), dtype=np.uint8) for height, width in shapes]
    arrays[::3] = [np.where(array < 128, 0, 255).astype(np.uint8) for array in arrays[::3]]
    return [torch.from_numpy(array) for array in arrays]


def boxes_in(images: list[Tensor], size: int, views: int = 2, seed: int = 0) -> np.ndarray:
    """Random boxes [V, n, 4]; some have a side of one pixel, or of `size`, or all of the image."""
    random, result = np.random.default_rng(seed), np.empty((views, len(images), 4), np.int32)
    for place in np.ndindex(result.shape[:2]):
        sides = np.array(images[place[1]].shape[:2])
        wanted = np.choose(random.integers(0, 6, 2), [1, size, sides, *random.integers(1, sides + 1, (3, 2))])
        result[place][2:] = np.minimum(wanted, sides)
        result[place][:2] = random.integers(0, sides - result[place][2:] + 1)
    return result


def crops_of(images: list[Tensor], boxes: np.ndarray, size: int, threads: int = 1, **options: str) -> Tensor:
    crops = torch.full((*boxes.shape[:2], size, size, 3), 77, dtype=torch.uint8)
    work = resizing(images, boxes, crops, **options)
    helpers = [threading.Thread(target=work) for _ in range(threads)]
    for helper in helpers:
        helper.start()
    for helper in helpers:
        helper.join()
    return crops


def exact(image: Tensor, box: list[int], size: int) -> np.ndarray:
    """In float64, less the rounding between the passes."""
    top, left, height, width = box

    def matrix(length: int) -> np.ndarray:
        scale = length / size
        centers, inputs = (np.arange(size)[:, None] + 0.5) * scale, np.arange(length) + 0.5
        weights = np.maximum(1 - np.abs(inputs - centers) / max(scale, 1), 0)
        return weights / weights.sum(1, keepdims=True)

    cut = image.numpy()[top : top + height, left : left + width].astype(np.float64)
    return np.einsum("yh,xw,hwc->yxc", matrix(height), matrix(width), cut)


@pytest.mark.parametrize("size", SIZES)
def test_the_loop_has_the_bits_of_torchs_operator(size: int) -> None:
    for most in (9, 60, 20 * size if size < 24 else 300):
        images = pictures(30, 1, most, seed=size)
        boxes = boxes_in(images, size, seed=most)
        expected = crops_of(images, boxes, size, impl="reference")
        for threads in (1, 2):
            assert torch.equal(crops_of(images, boxes, size, threads), expected), (most, threads)


def test_every_length_from_1_to_400() -> None:
    images = [image for length in range(1, 401) for image in pictures(1, length, length, seed=length)]
    boxes = np.array([[[0, 0, *image.shape[:2]] for image in images]])
    for size in (32, 48):
        thin = [image[:, :3].contiguous() for image in images] + [image[:3].contiguous() for image in images]
        both = np.concatenate([boxes, boxes], 1)
        both[0, :400, 3], both[0, 400:, 2] = np.minimum(both[0, :400, 3], 3), np.minimum(both[0, 400:, 2], 3)
        assert torch.equal(crops_of(thin, both, size), crops_of(thin, both, size, impl="reference"))


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_crops_are_what_a_triangle_gives(impl: str) -> None:
    images = pictures(12, 1, 90)
    boxes = boxes_in(images, 24)
    crops = crops_of(images, boxes, 24, impl=impl)
    for view, i in np.ndindex(boxes.shape[:2]):
        error = np.abs(crops[view, i].numpy() - exact(images[i], boxes[view, i].tolist(), 24))
        assert error.max() < 1.01 + 255 * 2**-12  # half a level for each pass, and weights of at least 12 digits


@pytest.mark.parametrize("which", [0, 1, 2, 3])
def test_a_box_that_is_off_by_one_would_be_seen(which: int) -> None:
    """Control."""
    images = pictures(4, 60, 90)
    boxes = np.array([[[5, 6, 41, 43]] * 4])
    expected = crops_of(images, boxes, 24)
    boxes[..., which] += 1
    assert not torch.equal(crops_of(images, boxes, 24), expected)


def test_nothing_beyond_the_crops_and_the_images_is_touched() -> None:
    """Crops are slices of a larger tensor, and what surrounds an image in memory has no part in them."""
    images, size = pictures(6, 30, 50), 7
    boxes = np.array([[[0, 0, *image.shape[:2]] for image in images]] * 2)
    expected = crops_of(images, boxes, size, impl="reference")
    for noise in (0, 255):
        block = torch.full((sum(image.numel() + 40 for image in images),), noise, dtype=torch.uint8)
        held, at = [], 20
        for image in images:
            held.append(block[at : at + image.numel()].view(image.shape).copy_(image))
            at += image.numel() + 40
        room = torch.full((2, 8, size, size, 3), noise, dtype=torch.uint8)
        resizing(held, boxes, room[:, 1:7])()
        assert torch.equal(room[:, 1:7], expected)
        assert (room[:, [0, 7]] == noise).all()


def test_no_images_and_no_views() -> None:
    resizing([], np.empty((2, 0, 4), np.int32), torch.empty(2, 0, 8, 8, 3, dtype=torch.uint8))()
    resizing(pictures(1, 3, 3), np.empty((0, 1, 4), np.int32), torch.empty(0, 1, 8, 8, 3, dtype=torch.uint8))()


@pytest.mark.parametrize("box", [(-1, 0, 3, 3), (0, 0, 0, 3), (0, 3, 4, 6), (8, 0, 1, 1)])
def test_a_box_that_is_not_inside_its_image_is_refused(box: tuple) -> None:
    image, crops = torch.zeros(8, 8, 3, dtype=torch.uint8), torch.zeros(1, 1, 4, 4, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match="not inside its image"):
        resizing([image], np.array([[box]]), crops)
    resizing([image], np.array([[(5, 5, 3, 3)]]), crops)()


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64])
def test_a_box_whose_end_its_type_does_not_hold_is_refused(dtype: type) -> None:
    """Top and height of 8 bits may add up to 400, which is 144 in 8 bits; and the largest top, of any type, to -1."""
    most, crops = int(np.iinfo(dtype).max), torch.zeros(1, 1, 4, 4, 3, dtype=torch.uint8)
    image = torch.zeros(120, 120, 3, dtype=torch.uint8)
    for box in ((100, 0, 100, 100), (0, 101, 100, 100), (most, 0, 1, 1), (0, most, 1, 1), (0, 0, most, 1)):
        with pytest.raises(ValueError, match="not inside its image"):
            resizing([image], np.array([[box]], dtype), crops)
    resizing([image], np.array([[(20, 20, 100, 100)]], dtype), crops)()


@pytest.mark.parametrize("dtype", [np.float32, np.float64, bool, object])
def test_boxes_of_other_types_are_refused(dtype: type) -> None:
    """NaN is neither less than 0 nor more than a side."""
    image, crops = torch.zeros(8, 8, 3, dtype=torch.uint8), torch.zeros(1, 1, 4, 4, 3, dtype=torch.uint8)
    box = np.full((1, 1, 4), np.nan) if np.dtype(dtype).kind == "f" else np.ones((1, 1, 4))
    with pytest.raises(ValueError, match="boxes are integers"):
        resizing([image], box.astype(dtype), crops)


def test_wrong_tensors_are_refused() -> None:
    image, box = torch.zeros(8, 8, 3, dtype=torch.uint8), np.array([[[0, 0, 8, 8]]])
    crops = torch.zeros(1, 1, 4, 4, 3, dtype=torch.uint8)
    for wrong in (image.float(), image.permute(1, 0, 2), image[..., :1].contiguous(), image.to("meta")):
        with pytest.raises(ValueError, match="images are uint8"):
            resizing([wrong], box, crops)
    for wrong in (crops.int(), crops[..., :2, :], crops.transpose(2, 3), crops.to("meta")):
        with pytest.raises(ValueError, match="crops are uint8"):
            resizing([image], box, wrong)
    with pytest.raises(ValueError, match="do not go with"):
        resizing([image, image], box, crops)


@pytest.mark.skipif(not hasattr(torch, "quint8"), reason="torch is about to drop it")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_a_type_whose_name_has_uint8_in_it_is_refused() -> None:
    image, crops = (torch.empty(shape, dtype=torch.quint8) for shape in ((8, 8, 3), (1, 1, 4, 4, 3)))
    with pytest.raises(ValueError, match="crops are uint8"):
        resizing([image], np.array([[[0, 0, 8, 8]]]), crops)


def test_without_numba_torch_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    from fastmoco.kernels.cpu import resize as loop

    images = pictures(3, 20, 30)
    boxes = boxes_in(images, 8)
    expected = crops_of(images, boxes, 8)
    monkeypatch.setattr(resize, "HAS_NUMBA", False)
    monkeypatch.setattr(loop, "resizing", None)
    assert dispatch.HAS_NUMBA and torch.equal(crops_of(images, boxes, 8), expected)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("size", [32, 224])
def test_benchmark(size: int, impl: str, benchmark: object) -> None:
    """64 boxes."""
    images = pictures(32, 2 * size, 3 * size)
    boxes = boxes_in(images, size)
    crops = torch.empty(2, 32, size, size, 3, dtype=torch.uint8)
    benchmark(lambda: resizing(images, boxes, crops, impl)())
