"""Convolutions on a CPU, by each of their ways, against float64."""

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastmoco.kernels import convolution
from fastmoco.kernels.convolution import Instructions, Layer, choose, conv2d, cost, saving

WAYS = ("direct", "product", "widened", "winograd")
KINDS: tuple[Instructions, ...] = ("amx", "bf16 at full rate", "bf16 at half rate", "none")
# inputs, outputs, kernel, stride, height, width, samples
SHAPES = [
    (8, 16, 3, 1, 5, 7, 3),
    (5, 3, 3, 2, 7, 6, 2),
    (16, 8, 1, 1, 4, 3, 2),
    (7, 9, 1, 2, 5, 5, 2),
    (3, 8, 7, 2, 11, 9, 2),
    (6, 4, 3, 1, 1, 1, 1),
    (16, 48, 3, 1, 6, 5, 2),
]
WHOLE = SHAPES[-1]  # columns of 16 channels, which Winograd's algorithm asks for


def has(way: str, shape: tuple[int, ...]) -> bool:
    """Whether a layer can be made in this way."""
    return way != "winograd" or (shape[2:4] == (3, 1) and shape[0] % 16 == shape[1] % 16 == 0)


def make(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, int, int]:
    inputs, outputs, kernel, stride, height, width, samples = shape
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(samples, inputs, height, width, generator=generator)
    weight = torch.randn(outputs, inputs, kernel, kernel, generator=generator)
    x, weight = (t.to(dtype).contiguous(memory_format=torch.channels_last) for t in (x, weight))
    return x, weight, stride, kernel // 2


def results(x: Tensor, weight: Tensor, stride: int, padding: int, function=F.conv2d) -> dict[str, Tensor]:
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = function(x, weight, stride=stride, padding=padding)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16).to(y.dtype)  # in all
    grads = torch.autograd.grad(y, (x, weight), grad.contiguous(memory_format=torch.channels_last))
    return {"y": y.detach(), "x": grads[0], "weight": grads[1]}


def assert_within_budget(ours: dict[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> None:
    """error(ours) <= error(torch in `dtype`) + one rounding to bf16, or four to fp32, in which sums are made."""
    x, weight, stride, padding = make(shape, dtype)
    truth, torchs = results(x.double(), weight.double(), stride, padding), results(x, weight, stride, padding)
    for name, exact in truth.items():
        error, budget = ((t[name].double() - exact).abs().max() for t in (ours, torchs))
        epsilon = torch.finfo(dtype).eps * exact.abs().max() * (4 if dtype == torch.float32 else 1)
        assert error <= budget + epsilon, f"{name}: {error:.3e} > {budget:.3e} + {epsilon:.3e}"


@pytest.fixture
def by(monkeypatch):
    """by(forward, input, weight): every layer takes these ways from now on."""

    def take(*ways: str) -> None:
        if "winograd" in ways:
            pytest.importorskip("numba")
        choice = dict(zip(("forward", "input", "weight"), ways, strict=True))
        monkeypatch.setattr(convolution, "choose", lambda layer, product, *_: choice[product])
        convolution._ways.cache_clear()

    yield take
    convolution._ways.cache_clear()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_error_budget(way: str, shape: tuple[int, ...], by) -> None:
    if not has(way, shape):
        pytest.skip("for 3x3 layers of stride 1 and columns of 16 channels")
    by(way, way if shape[3] == 1 else "direct", way)
    ours = results(*make(shape), function=conv2d)
    assert_within_budget(ours, shape)
    assert all(ours[name].is_contiguous(memory_format=torch.channels_last) for name in ("y", "x", "weight"))
    assert {t.dtype for t in ours.values()} == {torch.bfloat16}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("way", ["product", "winograd"])
def test_error_budget_in_fp32(way: str, shape: tuple[int, ...], by) -> None:
    if not has(way, shape):
        pytest.skip("for 3x3 layers of stride 1 and columns of 16 channels")
    by(way, way if shape[3] == 1 else "direct", way)
    ours = results(*make(shape, torch.float32), function=conv2d)
    assert_within_budget(ours, shape, torch.float32)
    assert all(ours[name].is_contiguous(memory_format=torch.channels_last) for name in ("y", "x", "weight"))


@pytest.mark.parametrize("way", ["product", "winograd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_do_not_depend_on_where_memory_lies(dtype: torch.dtype, way: str, by) -> None:
    """A run that is resumed finds its tensors elsewhere."""
    by(way, way, way)
    shape = (96, 64, 3, 1, 5, 3, 7)
    x, weight, stride, padding = make(shape, dtype)

    def moved(t: Tensor, offset: int) -> Tensor:
        rows = t.permute(0, 2, 3, 1)
        flat = torch.empty(t.numel() + offset, dtype=dtype)[offset:]
        return flat.copy_(rows.reshape(-1)).view(rows.shape).permute(0, 3, 1, 2)

    def gradients(offset: int) -> list[Tensor]:
        leaves = [moved(t, offset).requires_grad_() for t in (x, weight)]
        y = conv2d(*leaves, stride=stride, padding=padding)
        grad = torch.linspace(-1, 1, y.numel()).to(dtype).view_as(y)
        return [y.detach(), *torch.autograd.grad(y, leaves, grad)]

    expected = gradients(0)
    for offset in (1, 3, 8):
        assert all(torch.equal(a, b) for a, b in zip(gradients(offset), expected, strict=True))


def _sliced(t: Tensor) -> Tensor:
    samples, channels, height, width = t.shape
    room = t.new_full((samples, 2 * channels, height + 1, width + 2), torch.nan)
    return room[:, ::2, 1:, 1:-1].copy_(t)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels first": Tensor.contiguous,
    "sliced": _sliced,
    "expanded": lambda t: t[:1].expand(t.shape),
    "turned": lambda t: t.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["x", "weight", "grad"])
@pytest.mark.parametrize("way", ["product", "winograd"])
def test_a_tensor_may_lie_in_memory_in_any_way(way: str, which: str, layout: str, by) -> None:
    """Results are, to the bit, those of a copy that is channels-last."""
    by(way, way, way)
    x, weight, stride, padding = make(WHOLE, torch.float32)
    grad = torch.randn(2, 48, 6, 5, generator=torch.Generator().manual_seed(0))
    tensors = {"x": x, "weight": weight, "grad": grad.contiguous(memory_format=torch.channels_last)}

    def gradients(x: Tensor, weight: Tensor, grad: Tensor) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in (x, weight)]
        y = conv2d(*leaves, stride=stride, padding=padding)
        return [y.detach(), *torch.autograd.grad(y, leaves, grad)]

    odd = LAYOUTS[layout](tensors[which])
    assert not odd.is_contiguous(memory_format=torch.channels_last)
    copied = odd.contiguous(memory_format=torch.channels_last)
    found, expected = (gradients(**tensors | {which: each}) for each in (odd, copied))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_what_is_widened_takes_fp32s_faster_way(by, monkeypatch) -> None:
    """With few rows and large weights a product; each tensor of the backward pass is widened once."""
    shape = (64, 64, 3, 1, 2, 2, 2)
    by("widened", "widened", "widened")
    monkeypatch.setattr(convolution, "LARGE_WEIGHTS", 64 * 64 * 9)
    seen, windows = [], convolution._windows
    monkeypatch.setattr(convolution, "_windows", lambda x, *given: seen.append(x.dtype) or windows(x, *given))
    ours = results(*make(shape), function=conv2d)
    assert seen == [torch.float32] * 3
    assert_within_budget(ours, shape)


@pytest.mark.parametrize(("input_way", "weight_way"), list(itertools.permutations(WAYS, 2)))
def test_gradients_may_take_different_ways(input_way: str, weight_way: str, by) -> None:
    by("direct", input_way, weight_way)
    assert_within_budget(results(*make(WHOLE), function=conv2d), WHOLE)


def test_the_budget_rejects_a_wrong_product(by, monkeypatch) -> None:
    by("product", "product", "product")
    windows = convolution._windows
    monkeypatch.setattr(convolution, "_windows", lambda *given: windows(*given).flip(1))
    with pytest.raises(AssertionError, match=" > "):
        assert_within_budget(results(*make(SHAPES[0]), function=conv2d), SHAPES[0])


@pytest.mark.parametrize("way", ["product", "widened", "winograd"])
@pytest.mark.parametrize("needs", ["x", "weight"])
def test_only_the_gradient_that_is_wanted(needs: str, way: str, by, monkeypatch) -> None:
    def unwanted(*_: object) -> Tensor:
        raise AssertionError("a gradient that nobody asked for")

    monkeypatch.setattr(convolution, "weight_gradient" if needs == "x" else "input_gradient", unwanted)
    by("direct", way, way)
    x, weight, stride, padding = make(WHOLE)
    leaf = (x if needs == "x" else weight).requires_grad_()
    conv2d(x, weight, stride=stride, padding=padding).float().sum().backward()
    assert leaf.grad is not None and (weight if needs == "x" else x).grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_types_are_torchs_to_the_bit(dtype: torch.dtype, by) -> None:
    by("product", "product", "product")
    x, weight, stride, padding = make(SHAPES[0], dtype)
    expected = F.conv2d(x, weight, stride=stride, padding=padding)
    assert torch.equal(conv2d(x, weight, stride=stride, padding=padding), expected)


def test_autocast_is_torchs(by) -> None:
    by("product", "product", "product")
    x, weight, stride, padding = make(SHAPES[0], torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = conv2d(x, weight, stride=stride, padding=padding)
        assert torch.equal(y, F.conv2d(x, weight, stride=stride, padding=padding)) and y.dtype == torch.bfloat16


def test_the_reference_is_torchs(by) -> None:
    by("product", "product", "product")
    x, weight, stride, padding = make(SHAPES[0])
    expected = F.conv2d(x, weight, stride=stride, padding=padding)
    assert torch.equal(conv2d(x, weight, stride=stride, padding=padding, impl="reference"), expected)
    with pytest.raises(ValueError, match="impl must be"):
        conv2d(x, weight, impl="triton")


def test_fake_tensors_have_the_shape(by) -> None:
    by("product", "product", "product")
    with FakeTensorMode():
        x, weight = torch.empty(2, 8, 9, 9, dtype=torch.bfloat16), torch.empty(4, 8, 3, 3, dtype=torch.bfloat16)
        y = conv2d(x.contiguous(memory_format=torch.channels_last), weight.requires_grad_(), stride=2, padding=1)
        y.sum().backward()
    assert y.shape == (2, 4, 5, 5) and weight.grad.shape == weight.shape


def test_fake_tensors_never_reach_a_compiled_loop(monkeypatch) -> None:
    """They have no memory: Winograd's algorithm would read at address 0."""
    monkeypatch.setattr(convolution, "instructions", lambda: "bf16 at half rate")
    ways, seen = convolution._ways, []
    monkeypatch.setattr(convolution, "_ways", lambda *given: seen.append(ways(*given)) or seen[-1])
    shape = (64, 64, 3, 1, 4, 4, 8)
    conv2d(*make(shape)[:2], padding=1)
    with FakeTensorMode() as mode:
        x, weight, *_ = make(shape)
        conv2d(mode.from_tensor(x), mode.from_tensor(weight), padding=1)
    assert [each.forward for each in seen] == ["winograd" if convolution.HAS_NUMBA else "widened", "widened"]


ODD: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "weights of fewer channels": lambda x, weight: (x, weight[:, :8]),
    "weights of more channels": lambda x, weight: (x[:, :8], weight),
    "a kernel that is not square": lambda x, weight: (x, weight[..., :1]),
    "a kernel larger than the image": lambda x, weight: (x[:, :, :1, :1], F.pad(weight, (1, 1, 1, 1))),
    "no outputs": lambda x, weight: (x, weight[:0]),
    "no images": lambda x, weight: (x[:0], weight),
    "one image without a batch": lambda x, weight: (x[0], weight),
    "weights on another device": lambda x, weight: (x, weight.to("meta")),
    "negated views": lambda x, weight: (torch._neg_view(x), torch._neg_view(weight)),
    "a layout of oneDNN": lambda x, weight: (x.to_mkldnn(), weight),
}


@pytest.mark.parametrize("change", ODD.values(), ids=ODD)
@pytest.mark.parametrize("way", ["product", "winograd"])
def test_what_does_not_fit_is_torchs(way: str, change: Callable, by) -> None:
    """Its result or its words: a loop would read beyond what is there."""
    by(way, way, way)
    x, weight = change(*make(WHOLE, torch.float32)[:2])

    def told(function: Callable) -> object:
        try:
            return function(x, weight, padding=1)
        except (RuntimeError, NotImplementedError) as error:
            return str(error)

    ours, torchs = told(conv2d), told(F.conv2d)
    if not isinstance(torchs, Tensor):
        assert ours == torchs
        return
    assert (ours.shape, ours.dtype, ours.layout) == (torchs.shape, torchs.dtype, torchs.layout)
    # Beside weights without numbers torch's result has none either: what its memory held.
    assert weight.is_meta or torch.equal(ours.to_dense(), torchs.to_dense())


@pytest.mark.parametrize("way", ["product", "winograd"])
def test_a_backward_pass_under_autocast_is_as_one_without(way: str, by) -> None:
    """Its products would be rounded to bf16, and a loop would read them as fp32."""
    by(way, way, way)
    x, weight = (t.requires_grad_() for t in make((256, 64, 3, 1, 4, 4, 2), torch.float32)[:2])
    y = conv2d(x, weight, padding=1)
    expected = torch.autograd.grad(y.square().sum(), (x, weight), retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(y.square().sum(), (x, weight))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_trace_is_torchs(by) -> None:
    """While torch.jit traces, sizes are tensors."""
    by("winograd", "winograd", "winograd")
    x, weight, stride, padding = make(WHOLE)
    traced = torch.jit.trace(lambda x: conv2d(x, weight, stride=stride, padding=padding), x, check_trace=False)
    assert torch.equal(traced(2 * x), F.conv2d(2 * x, weight, stride=stride, padding=padding))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_channels_strided_are_not_onednns(dtype: torch.dtype) -> None:
    """Of less than 16 channels its weights' gradient writes beyond its memory (torch 2.13 and 2.14, channels-last)."""
    for kind in KINDS:
        assert choose(Layer(8, 16, 1, 2, 0, 25088), "weight", kind, dtype) == "product"
        assert choose(Layer(16, 16, 1, 2, 0, 25088), "weight", kind, torch.float32) == "direct"


@pytest.mark.parametrize("by", KINDS)
def test_the_rule_names_a_way_that_there_is(by: Instructions) -> None:
    """No product for the input's gradient of a strided layer; nothing but torch's where nothing was measured."""
    for inputs, outputs, kernel, stride in itertools.product((3, 64, 512), (16, 500, 2048), (1, 3, 7), (1, 2)):
        for rows in (1, 128, 512, 2048, 100352):
            layer = Layer(inputs, outputs, kernel, stride, kernel // 2, rows)
            ways = {product: choose(layer, product, by) for product in ("forward", "input", "weight")}
            wide = {product: choose(layer, product, by, torch.float32) for product in ways}
            assert set(ways.values()) <= set(WAYS) and set(wide.values()) <= {"direct", "product", "winograd"}
            shape = (inputs, outputs, kernel, stride)
            assert has("winograd", shape) or "winograd" not in {*ways.values(), *wide.values()}
            assert all(choose(layer, product, by, loops=False) != "winograd" for product in ways)
            assert stride == 1 or "product" not in (ways["input"], wide["input"])
            if kernel == 1 and stride > 1 and inputs < 16:  # which oneDNN cannot be trusted with
                ways.pop("weight"), wide.pop("weight")
            assert by not in ("amx", "none") or set(ways.values()) == {"direct"}
            assert by in ("amx", "bf16 at half rate") or set(wide.values()) == {"direct"}


def test_the_layers_that_were_measured_in_fp32() -> None:
    """A ResNet-18 at 64 px and a ResNet-50 at 224 px, batch 32, as bench/NOTES.md has them."""
    small, wide = Layer(512, 512, 3, 1, 1, 128), Layer(512, 512, 3, 1, 1, 1568)
    middle, opening, last = (
        Layer(256, 256, 3, 1, 1, 512),
        Layer(256, 512, 3, 2, 1, 128),
        Layer(2048, 512, 1, 1, 0, 1568),
    )
    found = {
        layer: [choose(layer, each, "bf16 at half rate", torch.float32) for each in ("forward", "input", "weight")]
        for layer in (small, wide, middle, opening, last)
    }
    assert found == {
        small: ["product"] * 3,
        wide: ["winograd"] * 3,
        middle: ["winograd"] * 3,
        opening: ["product", "direct", "product"],
        last: ["product"] * 3,
    }


def test_what_is_saved_is_what_the_rule_takes(monkeypatch) -> None:
    """A bound counts what is multiplied: 4 times less in bf16, 2.25 in fp32, and nothing less without the loops."""
    wide, strided = Layer(256, 256, 3, 1, 1, 6272), Layer(256, 256, 3, 2, 1, 1568)
    monkeypatch.setattr(convolution, "HAS_NUMBA", True)
    monkeypatch.setattr(convolution, "instructions", lambda: "bf16 at half rate")
    assert [saving(wide, dtype) for dtype in (torch.bfloat16, torch.float32)] == [4, 2.25]
    assert cost(wide, 1, torch.float32)[1] == 6 * 6272 * 256 * 256 * 9 / 2.25
    assert saving(strided, torch.bfloat16) == 1
    monkeypatch.setattr(convolution, "HAS_NUMBA", False)
    assert saving(wide, torch.bfloat16) == 1


@pytest.mark.parametrize(
    ("actual", "kind"),
    [
        ({}, "none"),
        ({"avx512_bf16": False, "cpu_name": "Intel Xeon"}, "none"),
        ({"avx512_bf16": True, "cpu_name": "Intel Xeon"}, "bf16 at half rate"),
        ({"avx512_bf16": True, "cpu_name": "AMD EPYC"}, "bf16 at full rate"),
        ({"avx512_bf16": True, "amx_bf16": True, "cpu_name": "Intel Xeon"}, "amx"),
    ],
)
def test_processors(actual: dict, kind: str, monkeypatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: actual)
    assert convolution.instructions.__wrapped__() == kind
