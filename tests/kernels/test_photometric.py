"""Photometric augmentation: the twin against NumPy and Pillow, the kernel against the twin in float64."""

import numpy as np
import pytest
import torch
from photometric_cases import (
    NAMES,
    ORDERS,
    draws,
    identity,
    numpy_jitter,
    numpy_views,
    one_jitter,
    order_code,
    photos,
    pillow_jitter,
    pillow_views,
)
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

from fastmoco.kernels import reference
from fastmoco.kernels.dispatch import HAS_NUMBA
from fastmoco.kernels.dispatch import NAMES as DTYPES
from fastmoco.kernels.photometric import cost, photometric
from fastmoco.kernels.reference import (
    BRIGHTNESS,
    CONTRAST,
    FLIP,
    GRAY,
    GRAY_AFTER_JITTER,
    GRAY_BEFORE_JITTER,
    HUE,
    NO_JITTER,
    ORDER,
    SIGMA,
)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def views(crops, parameters, dtype=torch.float64, **options):
    return photometric(crops, parameters, MEAN, STD, dtype=dtype, **options)


def levels(crops, parameters, **options):
    """Views before normalisation, as [N, S, S, 3] in 8-bit levels, from the twin in float64."""
    mean, std = (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)
    return photometric(crops, parameters, mean, std, dtype=torch.float64, **options).permute(0, 2, 3, 1).numpy()


# Twin against NumPy.


@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_twin_equals_numpy_over_whole_chains(kind):
    crops, parameters = photos(24, 17), draws(24, kind)
    truth = numpy_views(crops, parameters)
    assert np.abs(levels(crops, parameters) - truth).max() < 1e-9
    narrow = photometric(crops, parameters, (0.0,) * 3, (1.0,) * 3).permute(0, 2, 3, 1).numpy()
    assert np.abs(255 * narrow - truth).max() < 1e-3


def about_half(x, code, factor):
    return np.clip(factor * x + (1 - factor) * 0.5, 0, 1) if code == 1 else numpy_jitter(x, code, factor)


def test_numpy_comparison_sees_a_wrong_contrast_pivot_and_a_wrong_order():
    crops, parameters = photos(4, 17), draws(4, "v1")
    ours = levels(crops, parameters)
    assert np.abs(ours - numpy_views(crops, parameters, jitter=about_half)).max() > 0.5
    swapped = parameters.clone()
    swapped[:, ORDER] = order_code((3, 2, 1, 0))
    assert np.abs(ours - numpy_views(crops, swapped)).max() > 0.5


@pytest.mark.parametrize("sigma", [0.1, 0.34, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("size", [5, 33])
def test_blur_is_a_true_gaussian_with_reflected_borders(sigma, size):
    crops, parameters = photos(2, size), identity(2)
    parameters[:, SIGMA] = sigma
    assert np.abs(levels(crops, parameters) - numpy_views(crops, parameters)).max() < 1e-9
    wider = parameters.clone()
    wider[:, SIGMA] = 1.2 * sigma
    if sigma >= 0.3:
        assert np.abs(levels(crops, parameters) - numpy_views(crops, wider)).max() > 0.1


# Twin against Pillow, in 8-bit levels. Mean and largest difference of one operation, and where it comes from:
# blending truncates (up to 1); luma and the mean grey are whole levels (0.5 |1 - f| each); hue is truncated to steps of
# 6 levels, of which 255 are a turn but 256 wrap around; Pillow's blur is three boxes that repeat the border.
PILLOW = {
    "gray": (0.3, 0.51),
    "brightness": (0.4, 1.01),
    "contrast": (0.4, 1.7),
    "saturation": (0.45, 1.3),
    "hue": (1.0, 13.0),
    "blur": (0.8, 5.0),
}
BORDER = 7  # where the blurs differ by design


def pillow_case(name):
    if name in NAMES:
        code = NAMES.index(name)
        factors = (-77 / 255, -26 / 255, 13 / 255, 26 / 255, 102 / 255) if name == "hue" else (0.6, 0.8, 1.0, 1.2, 1.4)
        return torch.cat([one_jitter(code, factor) for factor in factors])
    rows = identity(5)
    rows[:, GRAY] = GRAY_AFTER_JITTER if name == "gray" else 0
    rows[:, SIGMA] = torch.tensor([0.5, 0.8, 1.2, 1.6, 2.0]) * (name == "blur")
    return rows


def pillow_difference(name, ours, rows, crops):
    if name not in NAMES:
        return np.abs(ours - pillow_views(crops, rows))[:, BORDER:-BORDER, BORDER:-BORDER]
    code = NAMES.index(name)  # alone: Pillow would round, and its HSV quantise, in the identities too
    factors = rows[:, BRIGHTNESS + code].tolist()
    images = [pillow_jitter(Image.fromarray(crop.numpy()), code, factor) for crop, factor in zip(crops, factors)]
    return np.abs(ours - np.stack([np.asarray(image) for image in images]))


@pytest.mark.parametrize("name", PILLOW)
def test_twin_is_within_rounding_of_pillow(name):
    rows = pillow_case(name)
    crops, (mean, largest) = photos(len(rows), 48), PILLOW[name]
    difference = pillow_difference(name, levels(crops, rows), rows, crops)
    assert difference.mean() < mean and difference.max() < largest
    nothing = pillow_difference(name, levels(crops, identity(len(rows))), rows, crops)
    assert nothing.mean() > 10 * mean  # the bound would see the operation left out


def test_pillow_bound_sees_contrast_about_one_half():
    rows = pillow_case("contrast")
    dark = photos(len(rows), 48) // 3
    half = np.stack([255 * about_half(crop.numpy() / 255, 1, float(row[CONTRAST])) for crop, row in zip(dark, rows)])
    assert pillow_difference("contrast", levels(dark, rows), rows, dark).mean() < PILLOW["contrast"][0]
    assert pillow_difference("contrast", half, rows, dark).mean() > 5 * PILLOW["contrast"][0]


def backwards(parameters):
    codes = parameters[:, ORDER].to(torch.int64)
    turned = sum((codes >> 2 * position & 3) << 6 - 2 * position for position in range(4))
    changed = parameters.clone()
    changed[:, ORDER] = torch.where(codes >= 0, turned, NO_JITTER)
    return changed


@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_whole_chains_stay_near_pillow(kind):
    crops, parameters = photos(48, 48, seed=3), draws(48, kind, seed=3)
    pillow = pillow_views(crops, parameters)
    difference = np.abs(levels(crops, parameters) - pillow).mean((1, 2, 3))
    assert difference.mean() < 1.6 and difference.max() < 3.5
    assert np.abs(levels(crops, backwards(parameters)) - pillow).mean() > 3
    without_hue = parameters.clone()
    without_hue[:, HUE] = 0
    assert np.abs(levels(crops, without_hue) - pillow).mean() > 6


# Properties.


@pytest.mark.parametrize("size", [1, 2, 7, 224])
def test_identity_is_exactly_normalisation(size):
    crops = photos(2, size)
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (MEAN, STD))
    exact = (crops.permute(0, 3, 1, 2).float() / 255 - mean) / std
    assert torch.equal(views(crops, identity(2), torch.float32), exact)


def test_gray_pixels_know_no_hue_or_saturation():
    gray = photos(4, 9)[..., :1].expand(-1, -1, -1, 3).contiguous()
    for code, factor in ((2, 0.3), (3, 0.21)):
        assert np.abs(levels(gray, one_jitter(code, factor, 4)) - gray.numpy()).max() < 1e-12
    assert np.abs(levels(gray, one_jitter(0, 0.5, 4)) - gray.numpy()).max() > 10


def test_a_third_of_a_turn_permutes_the_channels_of_pure_colours():
    crops = torch.zeros(3, 4, 4, 3, dtype=torch.uint8)
    for channel in range(3):
        crops[channel, ..., channel] = 200
    turned = levels(crops, one_jitter(3, 1 / 3, 3))
    assert np.abs(turned - crops.roll(1, 3).numpy()).max() < 1e-4


def test_flip_mirrors_columns_and_twice_is_nothing():
    crops, rows = photos(3, 11), identity(3)
    rows[:, FLIP] = 1
    once = views(crops, rows)
    assert torch.equal(once, views(crops, identity(3)).flip(3)) and not torch.equal(once, views(crops, identity(3)))
    assert torch.equal(views(crops.flip(2).contiguous(), rows), views(crops, identity(3)))


# The kernel.


def plain(crops, parameters, dtype):
    """The same chain by plain torch with everything held in `dtype`: the budget of errors."""
    x = crops.permute(0, 3, 1, 2).to(dtype) / 255
    x = reference._blur_and_flip(reference._jitter_and_gray(x, parameters), parameters)
    mean, std = (torch.tensor(value, dtype=dtype, device=x.device).view(3, 1, 1) for value in (MEAN, STD))
    return (x - mean) / std


IMPLS = ("triton", "auto")  # the kernel, and the loops of a CPU


def check_budget(crops, parameters, dtype, device, impl, rows=None, **options):
    device = torch.device("cpu") if impl == "auto" else device
    crops, parameters = crops.to(device), parameters.to(device)
    rows = None if rows is None else rows.to(device)
    truth = views(crops, parameters, impl="reference")
    ours = views(crops, parameters, dtype, impl=impl, rows=rows, **options)
    budget = (plain(crops, parameters, dtype).double() - truth).abs().amax((1, 2, 3))
    ours = ours if rows is None else ours[rows]
    error = (ours[:, :3].double() - truth).abs().amax((1, 2, 3))
    epsilon = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]  # half a unit at the range's end
    assert (error <= budget + epsilon).all(), (error / (budget + epsilon)).tolist()
    return ours, truth


def alone():
    rows = torch.cat(
        [
            one_jitter(code, factor)
            for code, factor in ((0, 0.6), (0, 1.4), (1, 0.6), (1, 1.4), (2, 0.6), (2, 1.4), (3, -0.5), (3, 0.07))
        ]
    )
    rest = identity(4)
    rest[0, GRAY], rest[1, GRAY], rest[2, FLIP] = GRAY_BEFORE_JITTER, GRAY_AFTER_JITTER, 1
    return torch.cat([rows, rest])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_does_each_operation_alone(dtype, impl, device):
    check_budget(photos(12, 21), alone(), dtype, device, impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_kernel_applies_all_24_orders(impl, device):
    rows = draws(24, "v1")
    rows[:, ORDER] = torch.tensor([order_code(order) for order in ORDERS])
    ours, truth = check_budget(photos(1, 16).expand(24, -1, -1, -1).contiguous(), rows, torch.float32, device, impl)
    assert (ours.double() - truth.roll(1, 0)).abs().amax((1, 2, 3)).min() > 1e-3  # the neighbour's order is noticed


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ["v1", "v2"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_runs_whole_chains_in_any_rows(kind, dtype, impl, device):
    rows = torch.randperm(10, generator=torch.Generator().manual_seed(1))
    check_budget(photos(10, 19), draws(10, kind), dtype, device, impl, rows=rows, channels=4)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 20), (torch.float16, 40), (torch.bfloat16, 67)])
def test_kernel_blurs(dtype, size, impl, device):
    rows = identity(6)
    rows[:, SIGMA] = torch.tensor([0.0, 0.1, 0.34, 1.0, 2.0, 4.0])
    rows[1::2, FLIP] = 1
    ours, truth = check_budget(photos(6, size), rows, dtype, device, impl)
    assert (ours[4].double() - truth[5].flip(2)).abs().max() > 0.1  # another sigma is noticed


@pytest.mark.parametrize("largest", [2.0, 5 / 3, 0.4, 0.0])
def test_a_largest_sigma_bounds_what_is_drawn(largest, device):
    """Squares meet however 3 sigma rounds (5 / 3 in fp32 is above five thirds), and the twin has the same bound."""
    rows = identity(3)
    rows[:, SIGMA] = torch.tensor([largest, 0.3, 4.0])
    crops, rows = photos(1, 67).expand(3, -1, -1, -1).contiguous().to(device), rows.to(device)
    unbounded = views(crops, rows, impl="reference")
    truth = views(crops, rows, impl="reference", max_sigma=largest)
    ours = views(crops, rows, torch.float16, impl="triton", max_sigma=largest)
    assert (ours.double() - truth).abs().max() < 8e-3
    assert (truth[2] - truth[0]).abs().max() < 1e-6 and (truth[2] - unbounded[2]).abs().max() > 0.1
    if largest:
        assert (truth[:2] - unbounded[:2]).abs().max() < 1e-6


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("size", [1, 2, 5])
def test_kernel_blurs_crops_smaller_than_the_radius(size, impl, device):
    rows = identity(2)
    rows[:, SIGMA] = torch.tensor([4.0, 0.5])
    check_budget(photos(2, size), rows, torch.float32, device, impl)


def test_blur_keeps_flat_crops_flat(device):
    rows = identity(2)
    rows[:, SIGMA] = torch.tensor([1.3, 4.0])
    flat = torch.full((2, 24, 24, 3), 255, dtype=torch.uint8)
    check = views(flat.to(device), rows.to(device), torch.float16, impl="triton")
    assert torch.equal(check, views(flat.to(device), identity(2).to(device), torch.float16, impl="triton"))


def test_rows_and_padding_reach_their_place(device):
    crops, rows = photos(5, 12).to(device), torch.tensor([3, 0, 4, 1, 2], device=device)
    parameters = draws(5, "v2", seed=4).to(device)
    for impl in ("reference", *IMPLS):
        straight = views(crops, parameters, torch.bfloat16, impl=impl)
        moved = views(crops, parameters, torch.bfloat16, channels=4, rows=rows, impl=impl)
        assert moved.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(moved[rows, :3], straight) and not torch.equal(moved[:, :3], straight)
        assert not moved[:, 3].any()


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
def test_two_runs_give_the_same_bits_whatever_the_neighbours(impl, device):
    crops, parameters = photos(8, 18).to(device), draws(8, "v2", seed=2).to(device)
    first = views(crops, parameters, torch.float32, impl=impl)
    assert torch.equal(first, views(crops, parameters, torch.float32, impl=impl))
    if impl != "reference":
        assert torch.equal(first[3:5], views(crops[3:5], parameters[3:5], torch.float32, impl=impl))


# As an operator.


def good():
    return {"crops": photos(2, 6), "parameters": identity(2), "mean": MEAN, "std": STD}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crops": photos(2, 6).float()}, "crops must be uint8"),
        ({"crops": photos(2, 6)[:, :4]}, "crops must be uint8"),
        ({"crops": photos(2, 6).permute(0, 2, 1, 3)}, "contiguous"),
        ({"crops": photos(2, 6)[:0], "parameters": identity(0)}, "at least one pixel"),
        ({"parameters": identity(3)}, r"float32 \[2, 8\]"),
        ({"parameters": identity(2).double()}, r"float32 \[2, 8\]"),
        ({"parameters": identity(2).to("meta")}, "must be where crops are"),
        ({"rows": torch.tensor([0, 1], dtype=torch.int32)}, "rows must be"),
        ({"rows": torch.tensor([1, 1])}, "once"),
        ({"mean": (0.5,)}, "three values"),
        ({"std": (0.5, 0.0, 0.5)}, "three values"),
        ({"channels": 5}, "channels must be 3 or 4"),
        ({"max_sigma": 4.5}, "max_sigma must be"),
        ({"dtype": torch.int8}, "dtype must be"),
        ({"dtype": torch.float64, "impl": "triton"}, "impl='reference'"),
        ({"impl": "cuda"}, "impl must be"),
    ],
)
def test_misuse_is_refused(change, message):
    assert photometric(**good()).shape == (2, 3, 6, 6)
    with pytest.raises(ValueError, match=message):
        photometric(**(good() | change))


def test_operator_passes_opcheck_and_fake_tensors():
    operator = torch.ops.fastmoco.photometric.default
    arguments = (photos(2, 6), draws(2, "v2"), list(MEAN), list(STD))
    for by in ("reference", "loops") if HAS_NUMBA else ("reference",):
        torch.library.opcheck(operator, (*arguments, torch.bfloat16, 4, torch.tensor([1, 0]), 2.0, by))
    with FakeTensorMode() as mode:
        crops, rows = (mode.from_tensor(tensor) for tensor in (photos(2, 6), identity(2)))
        fake = views(crops, rows, torch.float16, channels=4)
    assert fake.shape == (2, 4, 6, 6) and fake.dtype == torch.float16
    assert fake.is_contiguous(memory_format=torch.channels_last)


def test_compiled_whole_it_gives_the_same_views():
    crops, parameters = photos(3, 8), draws(3, "v2")
    compiled = torch.compile(lambda c, p: 2 * views(c, p, torch.float32), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(crops, parameters), 2 * views(crops, parameters, torch.float32))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_graph_replays_with_new_parameters():
    crops, parameters = photos(4, 40).cuda(), draws(4, "v2").cuda()
    views(crops, parameters, torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = views(crops, parameters, torch.bfloat16)
    parameters.copy_(draws(4, "v2", seed=9))
    graph.replay()
    assert torch.equal(out, views(crops, parameters, torch.bfloat16))


@pytest.mark.parametrize("rows", [None, torch.tensor([2, 0, 1])])
@pytest.mark.parametrize(("dtype", "channels"), [(torch.bfloat16, 4), (torch.float32, 3)])
def test_cost_counts_the_bytes_of_the_tensors(dtype, channels, rows):
    crops, parameters = photos(3, 10), identity(3)
    out = views(crops, parameters, dtype, channels=channels, rows=rows)
    tensors = [crops, parameters, out] + ([] if rows is None else [rows])
    bytes_moved, flops = cost(3, 10, dtype=dtype, channels=channels, permuted=rows is not None)
    assert bytes_moved == sum(tensor.nbytes for tensor in tensors)
    assert flops < cost(3, 10, dtype=dtype, channels=channels, blurred=0.5)[1]


# Speed, with --benchmark-enable: 32 views of 224 px with v2's draws, one thread; Pillow ends in the same fp32 NCHW.


@pytest.mark.benchmark(group="photometric: 32 views of 224 px")
def test_speed_of_the_twin(benchmark):
    benchmark(views, photos(32, 224), draws(32, "v2"), torch.float32)


@pytest.mark.benchmark(group="photometric: 32 views of 224 px")
def test_speed_of_pillow(benchmark):
    crops, parameters = photos(32, 224), draws(32, "v2")
    mean, std = np.float32(MEAN), np.float32(STD)

    def run():
        return (pillow_views(crops, parameters).astype(np.float32) / np.float32(255) - mean) / std

    assert run().dtype == np.float32
    benchmark(run)


def test_crops_that_begin_between_two_words_are_read_as_well(device: torch.device) -> None:
    crops = torch.randint(0, 256, (2 * 12 * 12 * 3 + 1,), dtype=torch.uint8, device=device)[1:].view(2, 12, 12, 3)
    parameters = torch.zeros(2, 8, device=device)
    parameters[:, ORDER] = NO_JITTER
    assert crops.data_ptr() % 4
    arguments = (parameters, MEAN, STD)
    assert torch.equal(
        photometric(crops, *arguments, impl="triton"), photometric(crops.clone(), *arguments, impl="triton")
    )
