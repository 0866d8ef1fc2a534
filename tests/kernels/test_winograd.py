"""Winograd's 3x3 convolutions of the CPU against float64, and the transforms' own properties."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("numba")
from fastmoco.kernels.cpu import winograd

# samples, inputs, outputs, height, width: less than a tile, odd sides, columns of channels in ones and in twos, several
# blocks of tiles; by matrix products, with the last columns fewer than are copied together
SHAPES = [
    (2, 16, 48, 1, 1),
    (3, 32, 16, 5, 7),
    (9, 48, 32, 9, 13),
    (5, 64, 128, 4, 9),
    (3, 144, 160, 6, 5),
    (2, 16, 272, 8, 8),
]
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


@pytest.mark.parametrize(("dtype", "tile"), KINDS)
def test_many_blocks_are_added_in_longer_runs(dtype: torch.dtype, tile: winograd.Tile) -> None:
    """More blocks than there are sums of the fewest; the last sum has fewer of them than the others."""
    tensors = make((2, 16, 16, 93, 91), dtype)
    tiles, _ = winograd._sizes(tensors[0], tile)
    assert tiles > winograd.RUN * winograd.SUMS * winograd.TILES
    assert_within_budget(ours(*tensors, tile), tensors)


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
    tensors = make((9, 144, 160, 6, 5), dtype)
    monkeypatch.setattr(winograd, "CHUNK", 1)
    parts = [len(part) for part in winograd._parts(tensors[0], 16, tile)]
    assert sum(parts) == 9 and len(parts) > 1
    monkeypatch.setattr(winograd, "_parts", lambda x, *_: iter(x.split(parts)))
    assert_within_budget(ours(*tensors, tile), tensors)


@pytest.mark.parametrize(("dtype", "tile"), KINDS)
def test_threads_do_not_change_a_bit(dtype: torch.dtype, tile: winograd.Tile) -> None:
    """Block by block of anything; of matrix products, whose sums are a library's, of the transforms."""
    blocks, (x, weight, _) = make((40, 32, 48, 9, 7), dtype), make((5, 144, 160, 9, 7), dtype)

    def bits(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        transformed, image = winograd._transformed_images(x, tile), torch.empty_like(x)
        winograd._transform_back(transformed, image, tile)
        filters = [winograd._filters_for_products(weight, tile, mirrored) for mirrored in (False, True)]
        gradient = winograd._transformed_images(x, tile, gradient=True)
        return [*ours(*blocks, tile).values(), transformed, image, *filters, gradient]

    before = torch.get_num_threads()
    try:
        alone, together = bits(1), bits(3)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_the_process_may_have_another_default_dtype() -> None:
    tensors = make((2, 16, 16, 5, 5), torch.bfloat16)
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
    x, weight, _ = make((3, 16, 16, 6, 6), torch.bfloat16)
    x[1, 2, 3, 3] = float("inf")
    y = winograd.forward(x, weight, tile)
    assert y[[0, 2]].isfinite().all() and not y[1, :, 2:5, 2:5].isfinite().any()


@pytest.mark.parametrize("tile", [2, 4])
def test_the_budget_rejects_weights_that_are_not_mirrored(tile: winograd.Tile, monkeypatch) -> None:
    tensors = make((2, 16, 16, 5, 5), torch.bfloat16)
    transform = winograd._transform_filters
    unmirrored = lambda *given: transform(*(False if each is True else each for each in given))  # noqa: E731
    monkeypatch.setattr(winograd, "_transform_filters", unmirrored)
    with pytest.raises(AssertionError, match="input: "):
        assert_within_budget(ours(*tensors, tile), tensors)
