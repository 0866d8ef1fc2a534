"""Batch norm + ReLU + max-pool against torch's own, group by group, in float64."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastmoco.kernels import batch_norm, batch_norm_kernels, batch_norm_plan, batch_norm_pool, reference
from fastmoco.kernels.batch_norm_pool import cost
from fastmoco.kernels.dispatch import Machine

IMPLS = ("triton", "reference", "auto")  # auto: on a CPU the compiled loops
LOW = (torch.bfloat16, torch.float16)
EPS = 1e-5


class Case(NamedTuple):
    """The inputs of one call, and the gradients of its two readers."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    running: tuple[Tensor, Tensor]
    grads: tuple[Tensor, Tensor]

    def to(self, dtype: torch.dtype, vectors: torch.dtype) -> "Case":
        """Copies of all, activations and vectors in these dtypes."""
        running = tuple(r.to(vectors, copy=True) for r in self.running)
        grads = tuple(g.to(dtype) for g in self.grads)
        return Case(self.x.to(dtype), self.weight.to(vectors), self.bias.to(vectors), running, grads)


def make_case(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Case:
    generator = torch.Generator().manual_seed(sum(shape))
    samples, channels, height, width = shape

    def activation(*size: int) -> Tensor:
        t = torch.randn(samples, channels, *size, generator=generator).to(device, dtype)
        return t.contiguous(memory_format=torch.channels_last)

    weight = torch.rand(channels, generator=generator) + 0.5
    weight[::3] *= -1  # there the smallest of a window becomes its largest
    bias = torch.randn(channels, generator=generator) * 0.5
    running = (torch.rand(channels, generator=generator), torch.rand(channels, generator=generator) + 0.5)
    pooled = ((height + 1) // 2, (width + 1) // 2)
    vectors = (t.to(device) for t in (weight, bias, *running))
    weight, bias, *running = vectors
    return Case(activation(height, width), weight, bias, tuple(running), (activation(*pooled), activation(*pooled)))


def by_torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running: tuple[Tensor, Tensor],
    groups: int = 1,
    *,
    training: bool = True,
    size: int = 3,
) -> tuple[Tensor, Tensor]:
    """One F.batch_norm a group, then ReLU and max-pooling, whose result autograd knows to have two readers."""
    each = [tuple(r.clone() for r in running) for _ in range(groups)]
    parts = [F.batch_norm(part, *r, weight, bias, training, 0.1, EPS) for part, r in zip(x.chunk(groups), each)]
    for target, values in zip(running, zip(*each)):
        target.copy_(torch.stack(values).mean(0))
    y = F.max_pool2d(torch.cat(parts).relu(), size, 2, size // 2)
    return y.view_as(y), y.view_as(y)


def results(function: Callable, case: Case, groups: int, **options: object) -> dict[str, Tensor]:
    """Output, running statistics and every gradient of one call on copies of the case's tensors."""
    leaves = {name: getattr(case, name).detach().clone().requires_grad_() for name in ("x", "weight", "bias")}
    running = tuple(r.clone() for r in case.running)
    first, second = function(*leaves.values(), running, groups, **options)
    assert torch.equal(first.nan_to_num(), second.nan_to_num())
    grads_by_name = dict(
        zip((f"d_{name}" for name in leaves), torch.autograd.grad([first, second], leaves.values(), case.grads))
    )
    return grads_by_name | {"y": second.detach(), "mean": running[0], "var": running[1]}


def distinct(case: Case) -> Case:
    """The case with values that keep their order and their distance in every dtype: no window has two maxima."""
    order = torch.randperm(case.x.numel(), generator=torch.Generator().manual_seed(1)).to(case.x.device)
    values = torch.linspace(-2, 2, 120, device=case.x.device)[order % 120]  # further apart than bf16's roundings
    return case._replace(x=values.view(case.x.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2).to(case.x.dtype))


def assert_within_budget(case: Case, groups: int, impl: str, **options: object) -> None:
    """error(ours) <= error(torch at the same precision) + a rounding of the largest; x decides ties in both."""
    truth = results(by_torch, case.to(torch.float64, torch.float64), groups, **options)
    torchs = results(by_torch, case, groups, **options)
    ours = results(batch_norm_pool.batch_norm_pool, case, groups, impl=impl, **options)
    for name, exact in truth.items():
        scale = exact.abs().max()
        if name in ("d_weight", "d_bias"):  # sums round as their absolute terms do
            scale = scale + sum(g.double().abs().sum((0, 2, 3)).max() for g in case.grads)
        epsilon = 4 * torch.finfo(torch.float32).eps * scale
        if name in ("y", "d_x"):
            epsilon = epsilon + torch.finfo(case.x.dtype).eps * exact.abs().max()
        error, budget = ((t[name].double() - exact).abs().max() for t in (ours, torchs))
        assert error <= budget + epsilon, f"{name}: {error:.3e} > {budget:.3e} + {epsilon:.3e}"


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("shape", "groups"),
    [((4, 8, 8, 8), 2), ((6, 17, 9, 7), 3), ((2, 3, 1, 2), 1), ((4, 70, 6, 5), 2), ((16, 5, 7, 6), 8)],
)
def test_error_budget_in_fp32(
    shape: tuple[int, ...], groups: int, training: bool, impl: str, device: torch.device
) -> None:
    assert_within_budget(make_case(shape, torch.float32, device), groups, impl, training=training)


@pytest.mark.parametrize("impl", ["triton", "auto"])
@pytest.mark.parametrize("dtype", LOW)
def test_error_budget_in_16_bits(dtype: torch.dtype, impl: str, device: torch.device) -> None:
    """Torch rounds before it compares; where no two values round alike, both pick the same."""
    case = distinct(make_case((4, 8, 9, 8), dtype, device))
    assert_within_budget(case, 2, impl)


def test_the_budget_rejects(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case((4, 8, 8, 8), torch.float32, device)
    passes = batch_norm_pool.LAUNCHES["triton"]
    one_reader = lambda grad, second, *rest: passes.gradients(grad, None, *rest)  # noqa: E731
    monkeypatch.setitem(batch_norm_pool.LAUNCHES, "triton", passes._replace(gradients=one_reader))
    with pytest.raises(AssertionError, match="d_x: .* > "):
        assert_within_budget(case, 2, "triton")


@pytest.mark.parametrize("impl", ["triton", "auto"])
def test_gradients_go_to_the_first_of_equals(impl: str, device: torch.device) -> None:
    """As in torch, where x itself has ties: many of few values."""
    case = make_case((4, 6, 9, 8), torch.float32, device)
    case = case._replace(x=(case.x * 2).round() / 2)
    ours, torchs = results(batch_norm_pool.batch_norm_pool, case, 2, impl=impl), results(by_torch, case, 2)
    torch.testing.assert_close(ours["d_x"], torchs["d_x"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", ["triton", "auto"])
def test_a_channel_of_weight_zero_and_nan(impl: str, device: torch.device) -> None:
    case = make_case((2, 3, 6, 6), torch.float32, device)
    case.weight[0] = 0.0
    case.x[0, 1, 2, 3] = torch.nan
    for training in (True, False):
        ours = results(batch_norm_pool.batch_norm_pool, case, 1, training=training, impl=impl)
        torchs = results(by_torch, case, 1, training=training)
        for name in ("y", "d_x", "d_weight", "d_bias"):
            torch.testing.assert_close(ours[name], torchs[name], rtol=1e-4, atol=1e-5, equal_nan=True)
        assert ours["y"][:, 1].isnan().any() and not ours["y"][:, 0].isnan().any()


@pytest.mark.parametrize("impl", IMPLS)
def test_two_runs_are_bit_equal_and_a_reader_may_be_missing(impl: str, device: torch.device) -> None:
    case = make_case((4, 24, 8, 9), torch.bfloat16, device)
    first, second = (results(batch_norm_pool.batch_norm_pool, case, 2, impl=impl) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    zero = case._replace(grads=(case.grads[0], case.grads[1] * 0))
    expected = results(batch_norm_pool.batch_norm_pool, zero, 2, impl=impl)["d_x"]
    for reader in (0, 1):
        x = case.x.clone().requires_grad_()
        pair = batch_norm_pool.batch_norm_pool(x, case.weight, case.bias, None, 2, impl=impl)
        pair[reader].backward(case.grads[0])
        assert torch.equal(x.grad, expected)


def test_programs_that_take_many_tiles_each(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    capability, _ = batch_norm_plan.machine(device)
    monkeypatch.setattr(batch_norm_plan, "machine", lambda device: Machine(capability, 1))
    case = make_case((4, 64, 20, 20), torch.float32, device)
    plan = batch_norm_plan.plan("batch_norm.statistics", case.x, 2)
    assert plan.rows > plan.splits * plan.options["BLOCK_ROWS"]
    assert_within_budget(case, 2, "triton")


def test_keys_keep_nothing_and_queries_one_byte_a_place(device: torch.device) -> None:
    case, saved = make_case((4, 8, 6, 6), torch.bfloat16, device), []

    def keep(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    call = lambda x: batch_norm_pool.batch_norm_pool(x, *case[1:3], None, 2, impl="triton")  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(keep, keep):
        with torch.no_grad():
            assert call(case.x.requires_grad_())[0].grad_fn is None and not saved
        y, _ = call(case.x)
    sizes = [(t.dtype, t.numel()) for t in saved if t.dim() == 4]
    assert sizes == [(torch.bfloat16, case.x.numel()), (torch.bfloat16, y.numel()), (torch.uint8, y.numel())]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"x": torch.zeros(2, 3, 4, 5)}, "channels-last"),
        ({"x": torch.zeros(4, 3)}, "to be pooled"),
        ({"groups": 3}, "do not divide into 3"),
        ({"impl": "cuda"}, "impl must be"),
        ({"running": None, "training": False}, "needs running"),
    ],
)
def test_refusals(change: dict[str, object], text: str) -> None:
    x = torch.zeros(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    arguments = {"x": x, "weight": torch.ones(3), "bias": torch.zeros(3), "running": None} | change
    with pytest.raises(ValueError, match=text):
        batch_norm_pool.batch_norm_pool(**arguments)


@pytest.mark.parametrize("by", ["triton", "loops"])
def test_operators_are_well_registered(by: str, device: torch.device) -> None:
    if by == "loops":
        pytest.importorskip("numba")
    device = torch.device("cpu") if by == "loops" else device
    case = make_case((4, 6, 5, 4), torch.float32, device)
    moments = batch_norm.OPERATORS[by].statistics(case.x, None, None, 2, 0.1, EPS)
    for keep in (True, False):
        torch.library.opcheck(batch_norm_pool.OPERATORS[by].pool, (case.x, case.weight, case.bias, moments, keep))
    _, peaks, places = batch_norm_pool.OPERATORS[by].pool(case.x, case.weight, case.bias, moments, True)
    for second in (None, case.grads[1]):
        arguments = (case.grads[0], second, case.x, peaks, places, case.weight, case.bias, moments, True)
        torch.library.opcheck(batch_norm_pool.OPERATORS[by].gradients, arguments)


@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_whole_and_fakes(impl: str, device: torch.device) -> None:
    case, call = make_case((4, 6, 5, 4), torch.float32, device), batch_norm_pool.batch_norm_pool
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    expected, actual = (results(f, case, 2, impl=impl) for f in (call, compiled))
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        y, _ = call(mode.from_tensor(case.x), *map(mode.from_tensor, case[1:3]), None, 2, impl=impl)
    assert y.shape == expected["y"].shape and y.stride() == expected["y"].stride()


class Counter:
    """Stands for a Triton function and counts the bytes of the tensors that it is given and uses."""

    def __init__(self, kernel: object, total: list[int]) -> None:
        self.kernel, self.total = kernel, total

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: object, **options: object) -> None:
            self.kernel[grid](*args, **options)
            for key, value in dict(zip(self.kernel.arg_names, args)).items():
                if isinstance(value, Tensor) and key != "partial":  # stays in cache
                    self.total[0] += value.nbytes * (2 if key.startswith("running") else 1)

        return launch


@pytest.mark.parametrize("keep", [True, False])
def test_cost_is_the_bytes_of_the_tensors(keep: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    total = [0]
    for name in ("statistics", "finish_statistics", "sums", "finish_sums"):
        kernel = f"{name}_kernel"
        monkeypatch.setattr(batch_norm_kernels, kernel, Counter(getattr(batch_norm_kernels, kernel), total))
    for kernel in ("pool_kernel", "unpool_kernel"):
        monkeypatch.setattr(batch_norm_pool, kernel, Counter(getattr(batch_norm_pool, kernel), total))
    case = make_case((4, 24, 5, 7), torch.bfloat16, device)
    x = case.x.requires_grad_(keep)
    pair = batch_norm_pool.batch_norm_pool(x, *case[1:4], 2, impl="triton")
    forward, flops = cost(case.x.shape, 2, 2, keep=keep)
    assert total[0] == forward > 0 and flops > 0
    if keep:
        torch.autograd.backward(pair, case.grads)
        assert total[0] == forward + cost(case.x.shape, 2, 2, backward=True)[0]


def test_the_twin_is_float64s_oracle() -> None:
    case = make_case((2, 2, 4, 3), torch.float32, torch.device("cpu")).to(torch.float64, torch.float64)
    leaves = [t.clone().requires_grad_() for t in case[:3]]
    assert torch.autograd.gradcheck(lambda *given: reference.batch_norm_pool(*given, None, 2), leaves)
