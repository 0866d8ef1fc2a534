"""The 1x1 convolution between two batch norms against torch's convolution and batch norm, in float64."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastmoco.kernels import conv1x1 as module
from fastmoco.kernels.batch_norm import Measured, Norm, batch_norm_act, normalise
from fastmoco.kernels.conv1x1 import conv1x1, cost
from fastmoco.kernels.tiles import tiles

IMPLS = ("triton", "reference")
EPS, MOMENTUM = 1e-5, 0.1
SHAPE, OUTPUTS, GROUPS = (4, 70, 17, 16), 66, 2  # no number is a multiple of a tile's; 544 rows a group are 3 pieces


class Case:
    """Tensors of one call; `entry` is the batch norm of the layer before, measured, or None."""

    def __init__(
        self,
        shape: tuple[int, ...],
        outputs: int,
        groups: int,
        dtype: torch.dtype,
        device: torch.device,
        normalised: bool = True,
    ) -> None:
        generator = torch.Generator().manual_seed(sum(shape))
        inputs, self.groups = shape[1], groups

        def drawn(*size: int) -> Tensor:
            return torch.randn(size, generator=generator).to(device)

        self.x = (drawn(*shape) + 0.7).to(dtype).contiguous(memory_format=torch.channels_last)
        self.kernel = (drawn(outputs, inputs, 1, 1) / math.sqrt(inputs)).to(dtype)
        self.norm = Norm(drawn(outputs), drawn(outputs), (drawn(outputs), drawn(outputs).abs()))
        self.entry = None
        if normalised:
            moments = torch.stack([drawn(groups, inputs), drawn(groups, inputs).abs() + 0.5])
            self.entry = Measured(drawn(inputs), drawn(inputs), moments)

    def results(self, **options: object) -> dict[str, Tensor]:
        """What `conv1x1` makes of copies of the running statistics."""
        running = tuple(t.clone() for t in self.norm.running)
        arguments = {"groups": self.groups, "entry": self.entry} | options
        y, found = conv1x1(self.x, self.kernel, self.norm._replace(running=running), **arguments)
        return _named(y, found.moments, running)

    def by_torch(self, wide: torch.dtype | None = None) -> dict[str, Tensor]:
        """The same from torch's operators, at the case's own precision or throughout in `wide`."""
        x, kernel = (t if wide is None else t.to(wide) for t in (self.x, self.kernel))
        vectors = wide or torch.float32
        if self.entry is not None:
            weight, bias, (mean, invstd) = (t.to(vectors) for t in self.entry)
            parts = zip(x.to(vectors).chunk(self.groups), mean[..., None, None], invstd[..., None, None])
            normal = torch.cat([(part - m) * i for part, m, i in parts])
            x = (normal * weight[:, None, None] + bias[:, None, None]).relu().to(x.dtype)
        y = F.conv2d(x, kernel)
        moments, updates = [], []
        for part in y.to(vectors).chunk(self.groups):
            running = [t.to(vectors, copy=True) for t in self.norm.running]
            F.batch_norm(part, *running, training=True, momentum=MOMENTUM)
            updates.append(torch.stack(running))
            moments.append(torch.stack([part.mean((0, 2, 3)), (part.var((0, 2, 3), correction=0) + EPS).rsqrt()]))
        return _named(y, torch.stack(moments, 1), torch.stack(updates).mean(0))


def _named(y: Tensor, moments: Tensor, running: tuple[Tensor, Tensor] | Tensor) -> dict[str, Tensor]:
    return {"y": y, "mean": moments[0], "invstd": moments[1], "running mean": running[0], "running var": running[1]}


def assert_within_budget(case: Case, ours: dict[str, Tensor]) -> None:
    """error(ours) <= error(torch at the same precision) + one rounding of y, or of fp32 sums sixteen.

    The largest term of a statistic is y's. Where Triton's interpreter casts to bf16 it cuts off what a GPU rounds, so
    there normalised inputs are too small by up to half a rounding, and so is what is made of them.
    """
    truth, torchs = case.by_torch(torch.float64), case.by_torch()
    cut = module.INTERPRETED.value and case.x.dtype is torch.bfloat16 and case.entry is not None
    for name, exact in truth.items():
        largest = torch.maximum(exact.abs().max(), exact.new_zeros(()) if name == "invstd" else truth["y"].abs().max())
        low = name == "y" and case.x.itemsize == 2
        epsilon = torch.finfo(ours[name].dtype).eps * largest * (1 if low else 16)
        epsilon += torch.finfo(torch.bfloat16).eps / 2 * largest if cut else 0
        error, budget = ((t[name].double() - exact).abs().max() for t in (ours, torchs))
        assert error <= budget + epsilon, f"{name}: {error:.3e} > {budget:.3e} + {epsilon:.3e}"


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalised", [False, True])
def test_error_budget(normalised: bool, dtype: torch.dtype, impl: str, device: torch.device) -> None:
    case = Case(SHAPE, OUTPUTS, GROUPS, dtype, device, normalised)
    assert_within_budget(case, case.results(impl=impl))


@pytest.mark.parametrize("normalised", [False, True])
def test_narrow_layers_have_tiles_of_their_own(normalised: bool, device: torch.device) -> None:
    assert [module._entry(torch.bfloat16, *sides) for sides in ((64, 70), (70, 64), (70, 66))] == [
        "conv1x1",
        "conv1x1",
        "conv1x1.wide",
    ]
    case = Case((4, 70, 9, 16), 60, GROUPS, torch.bfloat16, device, normalised)
    assert_within_budget(case, case.results(impl="triton"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalised", [False, True])
def test_programs_that_take_many_tiles_each(
    normalised: bool, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On few multiprocessors each program loops over rows while the next are on their way; all runs are bit-equal."""
    capability, _ = module.machine(device)
    monkeypatch.setattr(module, "machine", lambda device: (capability, 8))
    row = tiles(module._entry(dtype, 70, OUTPUTS), capability)
    _, split_rows, splits = module._split(row, 2 * 28 * 29, OUTPUTS, GROUPS, 8)
    assert splits >= 3 and split_rows >= 3 * row.block[0]
    case = Case((4, 70, 28, 29), OUTPUTS, GROUPS, dtype, device, normalised)
    first = case.results(impl="triton")
    assert_within_budget(case, first)
    for _ in range(50 if device.type == "cuda" else 1):
        again = case.results(impl="triton")
        assert all(torch.equal(again[name], first[name]) for name in first)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("shape", "outputs", "groups"),
    [
        ((2, 1, 1, 1), 1, 1),
        ((4, 3, 1, 1), 5, 2),
        ((6, 17, 5, 3), 130, 3),
        ((2, 130, 3, 3), 16, 1),
        ((2, 64, 8, 8), 64, 1),
    ],
)
def test_odd_shapes(shape: tuple[int, ...], outputs: int, groups: int, impl: str, device: torch.device) -> None:
    case = Case(shape, outputs, groups, torch.float32, device)
    assert_within_budget(case, case.results(impl=impl))


@pytest.mark.parametrize(
    "wrong",
    [
        {"groups": 1, "entry": None},
        {"entry": None},
        {"eps": 1e-2},
        {"momentum": 0.11},
    ],
)
def test_the_budget_rejects(wrong: dict[str, object], device: torch.device) -> None:
    case = Case(SHAPE, OUTPUTS, GROUPS, torch.float32, device)
    with pytest.raises((AssertionError, RuntimeError), match=" > |size"):
        assert_within_budget(case, case.results(impl="triton", **wrong))


@pytest.mark.parametrize("first", ["like the others", "far off"])
@pytest.mark.parametrize("impl", IMPLS)
def test_large_mean(impl: str, first: str, device: torch.device) -> None:
    """One input channel is constant, and lifts every output to 1e4, where the squares of fp32 numbers cancel."""
    case = Case((4, 8, 16, 16), 4, 2, torch.float32, device, normalised=False)
    case.x[:, 0], case.kernel[:, 0] = 1.0, 1e4
    if first == "far off":
        case.x[0, 0, 0, 0] = 0.0
    ours = case.results(impl=impl)
    rows = ours["y"].unflatten(0, (2, 2)).permute(0, 1, 3, 4, 2).flatten(1, 3)
    exact = (rows.double().var(1, correction=0) + EPS).rsqrt()

    def error(invstd: Tensor) -> float:
        return ((invstd - exact).abs() / exact).max().item()

    naive = (rows.square().mean(1) - rows.mean(1).square()).clamp_min(0)
    assert first == "far off" or error((naive + EPS).rsqrt()) > 0.01  # what this test would catch
    assert error(ours["invstd"]) < 1e-3
    assert (ours["mean"] - rows.double().mean(1)).abs().max() < 8e-3  # eight roundings of the mean


def test_what_it_measures_normalises_like_the_batch_norm_that_reads_y(device: torch.device) -> None:
    case = Case(SHAPE, OUTPUTS, GROUPS, torch.float32, device)
    running, apart = ([t.clone() for t in case.norm.running] for _ in range(2))
    y, measured = conv1x1(
        case.x, case.kernel, case.norm._replace(running=tuple(running)), GROUPS, entry=case.entry, impl="triton"
    )
    expected = batch_norm_act(y, *case.norm[:2], tuple(apart), GROUPS, impl="triton")
    torch.testing.assert_close(normalise(y, measured, impl="triton"), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(running, apart, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_two_runs_are_bit_equal(impl: str, device: torch.device) -> None:
    case = Case(SHAPE, OUTPUTS, GROUPS, torch.bfloat16, device)
    first, second = (case.results(impl=impl) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("normalised", [False, True])
def test_nan_stays_in_its_pixel_and_its_group(normalised: bool, impl: str, device: torch.device) -> None:
    case = Case((4, 5, 3, 3), 6, 2, torch.float32, device, normalised)
    case.x[0, 2, 1, 1] = torch.nan
    found = case.results(impl=impl)
    pixel = found["y"].isnan()
    assert pixel[0, :, 1, 1].all() and pixel.sum() == 6
    assert found["mean"][0].isnan().all() and not found["mean"][1].isnan().any()


@pytest.mark.parametrize("entry", ["conv1x1", "conv1x1.wide"])
@pytest.mark.parametrize(
    ("rows", "outputs", "groups", "processors"),
    [(100352, 128, 8, 132), (1568, 2048, 4, 132), (7, 60, 1, 132), (10**6, 60, 1, 9999)],
)
def test_pieces_cover_every_row_in_whole_tiles(
    rows: int, outputs: int, groups: int, processors: int, entry: str
) -> None:
    row = tiles(entry, 90)
    columns, split_rows, splits = module._split(row, rows, outputs, groups, processors)
    assert split_rows % 128 == 0 and (splits - 1) * split_rows < rows <= splits * split_rows
    assert columns * row.block[1] >= outputs > (columns - 1) * row.block[1]
    programs, resident = columns * groups * splits, processors * row.block[3]
    assert splits <= module.MAX_SPLITS and (programs <= resident or splits == 1)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"x": torch.zeros(4, 3, 2, 2)}, "channels-last"),
        ({"x": torch.zeros(4, 3)}, r"\[N, C, H, W\]"),
        ({"kernel": torch.zeros(5, 4, 1, 1)}, r"contiguous \[outputs, 3, 1, 1\]"),
        ({"kernel": torch.zeros(5, 3, 3, 3)}, r"contiguous \[outputs, 3, 1, 1\]"),
        ({"kernel": torch.zeros(5, 3, 1, 1).bfloat16()}, "kernel is torch.bfloat16"),
        ({"groups": 3}, "do not divide into 3"),
        ({"norm": Norm(torch.ones(3), torch.ones(5))}, r"weight must be contiguous \[5\]"),
        ({"norm": Norm(torch.ones(5), torch.ones(5), (torch.ones(5), torch.ones(4)))}, "running variance"),
        (
            {"entry": Measured(torch.ones(3), torch.ones(3), torch.ones(2, 2, 3))},
            r"moments must be contiguous \[2, 1, 3\]",
        ),
        ({"kernel": torch.zeros(5, 3, 1, 1, requires_grad=True)}, "no backward"),
        ({"impl": "cuda"}, "impl must be"),
    ],
)
def test_refusals(change: dict[str, object], text: str) -> None:
    x = torch.zeros(4, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    arguments = {"x": x, "kernel": torch.zeros(5, 3, 1, 1), "norm": Norm(torch.ones(5), torch.ones(5))} | change
    with pytest.raises(ValueError, match=text):
        conv1x1(**arguments)


@pytest.mark.parametrize("normalised", [False, True])
def test_the_operator_is_well_registered_and_reads_nothing_back(normalised: bool, device: torch.device) -> None:
    case = Case((4, 6, 3, 3), 5, 2, torch.float32, device, normalised)
    entry = case.entry or (None, None, None)
    torch.library.opcheck(module._conv1x1, (case.x, case.kernel, *entry, *case.norm.running, 2, MOMENTUM, EPS))
    expected = case.results(impl="triton")
    with FakeTensorMode() as mode:
        for name in ("x", "kernel"):
            setattr(case, name, mode.from_tensor(getattr(case, name)))
        case.norm = Norm(*map(mode.from_tensor, case.norm[:2]), tuple(map(mode.from_tensor, case.norm.running)))
        case.entry = case.entry and Measured(*map(mode.from_tensor, case.entry))
        fake = case.results(impl="triton")
    assert all((fake[name].stride(), fake[name].dtype) == (t.stride(), t.dtype) for name, t in expected.items())


class Counter:
    """Stands for a Triton function and counts the bytes of the tensors that it is given."""

    def __init__(self, kernel: object, total: list[int]) -> None:
        self.kernel, self.total = kernel, total

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: object, **options: object) -> None:
            self.kernel[grid](*args, **options)
            for name, value in zip(self.kernel.arg_names, args):
                if isinstance(value, Tensor) and name != "partial":  # stays in cache
                    self.total[0] += value.nbytes * (2 if name.startswith("running") else 1)

        return launch


@pytest.mark.parametrize("normalised", [False, True])
def test_cost_is_the_bytes_of_the_tensors(normalised: bool, device: torch.device, monkeypatch) -> None:
    total = [0]
    finishing = module.batch_norm_kernels
    monkeypatch.setattr(module, "convolve", Counter(module.convolve, total))
    monkeypatch.setattr(finishing, "finish_statistics", Counter(finishing.finish_statistics, total))
    case = Case((4, 24, 5, 3), 10, 2, torch.bfloat16, device, normalised)
    case.results(impl="triton")
    nbytes, flops = cost((4, 24, 5, 3), 10, 2, 2, normalised=normalised)
    assert total[0] == nbytes and flops > 2 * 60 * 24 * 10
