"""Winograd's 3x3 convolutions of the CPU against float64, and the transforms' own properties."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("numba")
from fastmoco.kernels.cpu import winograd

# samples, inputs, outputs, height, width: less than a tile, odd sides, more channels than are transformed at once
SHAPES = [(2, 3, 5, 1, 1), (3, 8, 4, 5, 7), (2, 70, 66, 4, 9), (1, 64, 130, 2, 3), (5, 17, 16, 8, 8)]
KINDS = [(torch.float32, 2), (torch.bfloat16, 2), (torch.bfloat16, 4)]
PRODUCTS = ("forward", "input", "weight")


def make(shape: tuple[int, ...], dtype: torch.dtype, draw=torch.randn) -> tuple[Tensor, Tensor, Tensor]:
    """Images, weights and the gradient of the output, channels-last."""
    samples, inputs, outputs, height, width = shape
    generator = torch.Generator().manual_seed(sum(shape))
    sizes = ((samples, inputs, height, width), (outputs, inputs, 3, 3), (samples, outputs, height, width))
    tensors = (draw(*size, generator=generator).to(dtype) for size in sizes)
    x, weight, grad = (tensor.contiguous(memory_format=torch.channels_last) for tensor in tensors)
    return x, weight, grad


def ours(x: Tensor, weight: Tensor, grad: Tensor, tile: winograd.Tile) -> dict[str, Tensor]:
    """The three products."""
    products = (
        winograd.forward(x, weight, tile),
        winograd.input_gradient(grad, weight, tile),
        winograd.weight_gradient(grad, x, tile),
    )
    return dict(zip(PRODUCTS, products, strict=True))


def torchs(x: Tensor, weight: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """The same by torch, in the type of the tensors."""
    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = F.conv2d(*leaves, padding=1)
    return dict(zip(PRODUCTS, (y.detach(), *torch.autograd.grad(y, leaves, grad)), strict=True))


def assert_within_budget(found: dict[str, Tensor], tensors: tuple[Tensor, Tensor, Tensor]) -> None:
    """error(ours) <= error(torch in the same type) + one rounding to bf16, or four to fp32, in which sums are made."""
    dtype = tensors[0].dtype
    x, weight, grad = (tensor.double() for tensor in tensors)
    truth, plain = torchs(x, weight, grad), torchs(*tensors)
    for name, exact in truth.items():
        error, budget = ((t[name].double() - exact).abs().max() for t in (found, plain))
        epsilon = torch.finfo(dtype).eps * exact.abs().max() * (4 if dtype == torch.float32 else 1)
        assert error <= budget + epsilon, f"{name}: {error:.3e} > {budget:.3e} + {epsilon:.3e}"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "tile"), KINDS)
def test_error_budget(dtype: torch.dtype, tile: winograd.Tile, shape: tuple[int, ...]) -> None:
    tensors = make(shape, dtype)
    found = ours(*tensors, tile)
    assert_within_budget(found, tensors)
    assert all(each.dtype == dtype and each.is_contiguous(memory_format=torch.channels_last) for each in found.values())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_small_tiles_of_whole_numbers_are_exact(shape: tuple[int, ...]) -> None:
    """Its points are 0, 1 and -1: quarters of whole numbers are fp32 numbers, and so is each sum."""

    def draw(*size: int, generator: torch.Generator) -> Tensor:
        return torch.randint(-8, 9, size, generator=generator)

    tensors = make(shape, torch.float32, draw)
    found, exact = ours(*tensors, 2), torchs(*(tensor.double() for tensor in tensors))
    assert all(torch.equal(found[name].double(), exact[name]) for name in PRODUCTS)


def test_large_tiles_keep_fp32s_digits_but_for_a_factor_of_eight() -> None:
    """What bf16's rounding, a thousand times as coarse as 8 of fp32's, never shows."""
    tensors = make((4, 128, 128, 14, 14), torch.float32)
    found, exact = ours(*tensors, 4), torchs(*(tensor.double() for tensor in tensors))
    plain = torchs(*tensors)
    for name in PRODUCTS:
        error, budget = ((each[name].double() - exact[name]).square().mean() ** 0.5 for each in (found, plain))
        assert error <= 8 * budget


@pytest.mark.parametrize(("dtype", "tile"), KINDS)
def test_several_chunks_are_one_batch(dtype: torch.dtype, tile: winograd.Tile, monkeypatch) -> None:
    tensors = make((5, 8, 6, 6, 5), dtype)
    monkeypatch.setattr(winograd, "CHUNK", 1)
    parts = [len(part) for part in winograd._parts(tensors[0], 6, tile)]
    assert sum(parts) == 5 and len(parts) > 1
    assert_within_budget(ours(*tensors, tile), tensors)


@pytest.mark.parametrize(("dtype", "tile"), KINDS)
def test_transforms_have_the_bits_of_one_thread(dtype: torch.dtype, tile: winograd.Tile) -> None:
    x, weight, _ = make((5, 70, 66, 9, 7), dtype)

    def bits(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        transformed = winograd._transformed_images(x, tile)
        image, count = torch.empty_like(x), winograd._sizes(x, tile)
        winograd.LOOPS[dtype].inverse_transform(count[0], x=image, transformed=transformed, **count[1])
        filters = winograd._transformed_filters(weight, tile, mirrored=True)
        return [transformed, image, filters, winograd._transformed_images(x, tile, gradient=True)]

    before = torch.get_num_threads()
    try:
        alone, together = bits(1), bits(3)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_the_process_may_have_another_default_dtype() -> None:
    tensors = make((2, 8, 8, 5, 5), torch.bfloat16)
    expected = ours(*tensors, 4)
    torch.set_default_dtype(torch.float64)
    try:
        found = ours(*tensors, 4)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(found[name], expected[name]) for name in PRODUCTS)


@pytest.mark.parametrize("tile", [2, 4])
def test_what_is_not_finite_stays_in_its_image(tile: winograd.Tile) -> None:
    """Training stops at a loss that is NaN: it must be one, and no other image's results may suffer."""
    x, weight, _ = make((3, 8, 8, 6, 6), torch.bfloat16)
    x[1, 2, 3, 3] = float("inf")
    y = winograd.forward(x, weight, tile)
    assert y[[0, 2]].isfinite().all() and not y[1, :, 2:5, 2:5].isfinite().any()


@pytest.mark.parametrize("tile", [2, 4])
def test_the_budget_rejects_weights_that_are_not_mirrored(tile: winograd.Tile, monkeypatch) -> None:
    tensors = make((2, 8, 8, 5, 5), torch.bfloat16)
    transformed_filters = winograd._transformed_filters
    monkeypatch.setattr(
        winograd, "_transformed_filters", lambda weight, size, mirrored: transformed_filters(weight, size, False)
    )
    with pytest.raises(AssertionError, match="input: "):
        assert_within_budget(ours(*tensors, tile), tensors)
