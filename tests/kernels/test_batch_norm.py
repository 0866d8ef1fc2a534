"""Batch norm + ReLU against torch's own batch norm, group by group, in float64."""

import dataclasses
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from batch_norm_cases import (
    EPS,
    Case,
    assert_within_budget,
    by_torch,
    channels_last,
    check,
    check_twice,
    largest_terms,
    make_case,
    results,
    to,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastmoco.kernels import batch_norm, batch_norm_kernels, batch_norm_plan, reference
from fastmoco.kernels.batch_norm import Norm, batch_norm_act, batch_norm_act_twice, cost
from fastmoco.kernels.dispatch import Machine
from fastmoco.kernels.tiles import TABLE

FORMS = ("none", "plain", "dual")
IMPLS = ("triton", "reference", "auto")  # auto: on a CPU the compiled loops


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("relu", [True, False])
def test_error_budget_of_two_readers(
    form: str, relu: bool, dtype: torch.dtype, impl: str, device: torch.device
) -> None:
    check_twice(make_case((8, 16, 9, 7), form, dtype, device), 4, impl, relu=relu)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("training", [True, False])
def test_two_readers_of_odd_shapes(training: bool, impl: str, device: torch.device) -> None:
    for shape in ((6, 17, 5, 3), (12, 5), (4, 1, 7, 7)):
        check_twice(make_case(shape, "dual", torch.float32, device), 2 if training else 1, impl, training=training)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("form", FORMS)
def test_one_of_two_readers_is_as_one(form: str, impl: str, device: torch.device) -> None:
    """The gradient of a reader that gives none is not made up; and two runs have the same bits."""
    case = make_case((4, 24, 8, 9), form, torch.bfloat16, device)
    one = results(batch_norm_act, case, 2, impl=impl)
    for reader in (0, 1):
        other = results(lambda *given, **how: batch_norm_act_twice(*given, **how)[reader], case, 2, impl=impl)
        assert all(torch.equal(one[name], other[name]) for name in one)
    first, second = (results(batch_norm_act_twice, case, 2, case.grad * 3, impl=impl) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["d_x"], one["d_x"])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("form", FORMS)
def test_autograd_adds_nothing_for_two_readers(form: str, impl: str, device: torch.device) -> None:
    case = make_case((4, 24, 8, 9), form, torch.bfloat16, device)

    def adds(call: Callable) -> int:
        options = {"residual": case.residual, "residual_norm": case.side, "impl": impl}
        pair = call(case.x.requires_grad_(), *case.main, 2, **options)
        with torch.profiler.profile() as profile:
            torch.autograd.backward(pair, [case.grad, case.grad.clone()])
        return sum(event.name == "aten::add_" for event in profile.events())

    def plain(*arguments: object, **options: object) -> tuple[Tensor, Tensor]:
        y = batch_norm_act(*arguments, **options)
        return y.view_as(y), y.view_as(y)

    assert adds(batch_norm_act_twice) < adds(plain)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("relu", [True, False])
def test_error_budget(form: str, relu: bool, dtype: torch.dtype, impl: str, device: torch.device) -> None:
    check(make_case((8, 16, 9, 7), form, dtype, device), 4, impl, relu=relu)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((2, 1, 1, 1), 1),
        ((4, 3, 1, 1), 2),
        ((6, 17, 5, 3), 3),
        ((4, 1, 7, 7), 2),
        ((6, 130, 3, 3), 2),
        ((12, 5), 3),
        ((4, 64, 12, 12), 2),
        ((16, 20, 5, 7), 8),
    ],
)
def test_odd_shapes(shape: tuple[int, ...], groups: int, impl: str, device: torch.device) -> None:
    check(make_case(shape, "dual", torch.float32, device), groups, impl)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_programs_that_take_many_tiles_each(form: str, dtype: torch.dtype, device: torch.device, monkeypatch) -> None:
    """On few multiprocessors each program of a reduction loops, and several share a channel."""
    capability, _ = batch_norm_plan.machine(device)
    monkeypatch.setattr(batch_norm_plan, "machine", lambda device: Machine(capability, 2))
    case = make_case((10, 64, 15, 15), form, dtype, device)
    for kernel in ("batch_norm.statistics", batch_norm._sums_tiles(form == "dual")):
        plan = batch_norm.plan(kernel, case.x, 2)
        assert plan.splits >= 3 and plan.rows > plan.splits * plan.options["BLOCK_ROWS"]
    check(case, 2, "triton")
    check_twice(case, 2, "triton")


@pytest.mark.parametrize("tensors", [1, 2, 8])
def test_the_second_stage_takes_groups_together(tensors: int, device: torch.device, monkeypatch) -> None:
    """Five groups, of which a program of the second stage holds one, two or all at once."""
    whole = batch_norm.finish_options
    monkeypatch.setattr(batch_norm, "finish_options", lambda *given: whole(*given) | {"BLOCK_GROUPS": tensors})
    assert [whole(5, splits, device)["BLOCK_GROUPS"] for splits in (8, 200, batch_norm.MAX_SPLITS)] == [8, 2, 1]
    check(make_case((10, 12, 5, 5), "dual", torch.float32, device), 5, "triton")


def test_a_plan_is_kept_for_all_that_decides_it_and_for_no_tensor(device: torch.device, monkeypatch) -> None:
    x = make_case((4, 24, 5, 5), "none", torch.bfloat16, device).x
    kept = batch_norm.plan("batch_norm.apply", x, 2)
    assert batch_norm.plan("batch_norm.apply", x.clone(), 2) is kept
    row = TABLE["batch_norm.apply"][80]
    monkeypatch.setitem(TABLE, "batch_norm.apply", {80: dataclasses.replace(row, num_warps=2)})
    others = [
        batch_norm.plan("batch_norm.apply", t, groups) for t, groups in ((x, 2), (x[:2], 2), (x[:, :8], 2), (x, 4))
    ]
    assert len({id(plan) for plan in [kept, *others]}) == 5 and others[0].options["num_warps"] == 2
    alive = weakref.ref(x)
    del x
    assert alive() is None


def test_what_may_begin_early_is_launched_so_from_hopper_on_and_nothing_else() -> None:
    """The second stages and what follows them; a reduction, which follows other people's kernels, never."""
    names = ("statistics", "finish", "apply", "sums", "finish", "gradient")
    for capability, overlapping in ((None, False), ((8, 0), False), ((9, 0), True), ((10, 0), True)):
        early = batch_norm_plan.overlapping(capability)
        options = {name: batch_norm_plan.overlaps(f"batch_norm.{name}", early) for name in names}
        assert all(each["DEPENDENT"] is overlapping for each in options.values())
        followers = {name for name, each in options.items() if each.get("launch_pdl")}
        assert followers == ({"finish", "apply", "gradient"} if overlapping else set())
    assert batch_norm_plan.overlaps("batch_norm_pool.pool", True) == {}  # whose kernels do not wait
    with batch_norm_plan.one_after_the_other():
        assert not batch_norm_plan.overlapping((9, 0))
    assert batch_norm_plan.overlapping((9, 0))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="launches overlap on a GPU")
@pytest.mark.parametrize("form", FORMS)
def test_launches_that_overlap_give_the_bits_of_those_that_do_not(form: str, device: torch.device) -> None:
    """What begins early and does not wait reads sums that are not there yet. Many times, of layers large and small."""
    for shape in ((64, 64, 56, 56), (64, 256, 7, 7)):
        case = make_case(shape, form, torch.bfloat16, device)
        with batch_norm_plan.one_after_the_other():
            apart = results(batch_norm_act_twice, case, 2, case.grad * 3, impl="triton")
        for _ in range(20):
            overlapping = results(batch_norm_act_twice, case, 2, case.grad * 3, impl="triton")
            assert all(torch.equal(overlapping[name], value) for name, value in apart.items())


@pytest.mark.parametrize("wrong", [{"groups": 2}, {"eps": 1e-3}, {"momentum": 0.11}, {"relu": False}])
def test_the_budget_rejects(wrong: dict[str, object], device: torch.device) -> None:
    case = make_case((8, 16, 9, 7), "dual", torch.bfloat16, device)
    options = {"groups": 4} | wrong
    truth, torchs = results(by_torch, to(case, torch.float64, torch.float64), 4), results(by_torch, case, 4)
    with pytest.raises(AssertionError, match=" > "):
        actual = results(batch_norm_act, case, **options, impl="triton")
        assert_within_budget(actual, torchs, truth, largest_terms(case, 4, truth))


@pytest.mark.parametrize("impl", IMPLS)
def test_one_group_is_torchs_module(impl: str, device: torch.device) -> None:
    case = make_case((4, 24, 6, 6), "none", torch.float32, device)
    module = nn.BatchNorm2d(24, device=device)
    ours = [t.clone() for t in module.buffers() if t.dim()]
    x = case.x.clone().requires_grad_()
    expected = torch.autograd.grad(module(x).relu(), [x, *module.parameters()], case.grad)
    y = batch_norm_act(x, module.weight, module.bias, tuple(ours), impl=impl)
    for ours_grad, torch_grad in zip(torch.autograd.grad(y, [x, *module.parameters()], case.grad), expected):
        torch.testing.assert_close(ours_grad, torch_grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours, [module.running_mean, module.running_var], rtol=1e-6, atol=1e-7)


class SplitBatchNorm(nn.BatchNorm2d):
    """Statistics of S interleaved splits, as the published CIFAR demo has them: sample n is of split n mod S."""

    def forward(self, x: Tensor, splits: int = 4) -> Tensor:
        n, c, h, w = x.shape
        means, variances = self.running_mean.repeat(splits), self.running_var.repeat(splits)
        y = F.batch_norm(
            x.reshape(-1, c * splits, h, w),
            means,
            variances,
            self.weight.repeat(splits),
            self.bias.repeat(splits),
            True,
            self.momentum,
            self.eps,
        )
        self.running_mean.copy_(means.view(splits, c).mean(0))
        self.running_var.copy_(variances.view(splits, c).mean(0))
        return y.reshape(n, c, h, w)


@pytest.mark.parametrize("impl", IMPLS)
def test_split_batch_norm(impl: str, device: torch.device) -> None:
    """Group after group, x[s::S] is the interleaved form; grouped any other way the result is another one."""
    splits, module = 4, SplitBatchNorm(6, device=device)
    x = make_case((8, 6, 4, 4), "none", torch.float32, device).x
    order = torch.arange(8, device=device).view(-1, splits).T.flatten()
    ours = [torch.zeros(6, device=device), torch.ones(6, device=device)]
    y = torch.empty_like(x)
    y[order] = batch_norm_act(
        channels_last(x[order]), module.weight, module.bias, tuple(ours), splits, relu=False, impl=impl
    ).detach()
    expected = module(x.contiguous())
    torch.testing.assert_close(y, channels_last(expected).detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours, [module.running_mean, module.running_var], rtol=1e-6, atol=1e-6)
    for groups in (splits, 1, 2):  # consecutive samples, and other numbers of groups
        wrong = batch_norm_act(x, module.weight, module.bias, None, groups, relu=False, impl=impl)
        assert (wrong - expected).abs().max() > 0.05


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mean", [1e3, 1e4])
def test_large_mean(mean: float, impl: str, device: torch.device) -> None:
    device = device if impl == "triton" else torch.device("cpu")  # torch's own statistics on a GPU err more
    case = make_case((8, 4, 16, 16), "none", torch.float32, device, mean)
    check(case, 2, impl, relu=False)
    rows = case.x.permute(0, 2, 3, 1).reshape(-1, 4)
    naive = rows.square().mean(0) - rows.mean(0).square()
    assert relative_error(naive, rows, correction=0) > 0.01  # what this test would catch
    running = (torch.zeros(4, device=device), torch.ones(4, device=device))
    batch_norm_act(case.x, case.main.weight, case.main.bias, running, momentum=1.0, impl=impl)
    assert relative_error(running[1], rows, correction=1) < (1e-5 if impl == "triton" else 1e-3)


def relative_error(var: Tensor, rows: Tensor, correction: int) -> float:
    exact = rows.double().var(0, correction=correction)
    return ((var - exact).abs() / exact).max().item()


def test_an_outlier_first_does_not_spoil_the_shift(device: torch.device) -> None:
    case = make_case((4, 4, 16, 16), "none", torch.float32, device, 1e4)
    case.x[0, :, 0, 0] = 0.0
    check(case, 1, "triton", relu=False)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("form", FORMS)
def test_eval_mode(form: str, impl: str, device: torch.device) -> None:
    check(make_case((4, 6, 5, 5), form, torch.float32, device), 1, impl, training=False)
    case = make_case((4, 6, 5, 5), form, torch.float32, device)
    before = results(batch_norm_act, case, 2, training=False, impl=impl)
    assert torch.equal(before["mean_0"], case.main.running[0]) and torch.equal(before["var_0"], case.main.running[1])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("form", FORMS)
def test_two_runs_are_bit_equal(form: str, impl: str, device: torch.device) -> None:
    case = make_case((4, 24, 8, 9), form, torch.bfloat16, device)
    first, second = (results(batch_norm_act, case, 2, impl=impl) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("form", FORMS)
def test_twin_gradients_by_differences(form: str, device: torch.device) -> None:
    case = to(make_case((4, 2, 2, 3), form, torch.float32, device), torch.float64, torch.float64)
    leaves = [case.x, case.main.weight, case.main.bias, case.residual, *(case.side or (None, None))[:2]]
    leaves = [t if t is None else t.clone().requires_grad_() for t in leaves]

    def function(x, weight, bias, residual, residual_weight, residual_bias):
        side = None if residual_weight is None else Norm(residual_weight, residual_bias, None)
        return reference.batch_norm_act(x, weight, bias, None, 2, residual=residual, residual_norm=side)

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_what_is_saved(dtype: torch.dtype, form: str, impl: str, device: torch.device) -> None:
    """The key encoder keeps nothing; a plain residual is not kept, as the output tells its mask; nothing is widened."""
    case = make_case((4, 8, 6, 6), form, dtype, device)
    weight = case.main.weight.clone().requires_grad_()
    snapshots: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        snapshots.append(t)
        return t

    def call() -> Tensor:
        return batch_norm_act(
            case.x, weight, case.main.bias, None, 2, residual=case.residual, residual_norm=case.side, impl=impl
        )

    with torch.autograd.graph.saved_tensors_hooks(keep, keep):
        with torch.no_grad():
            assert call().grad_fn is None and not snapshots
        call()
    assert {t.dtype for t in snapshots if t.numel() == case.x.numel()} == {dtype}
    activations = {t.data_ptr() for t in snapshots if t.numel() == case.x.numel()}
    assert case.x.data_ptr() in activations
    assert (case.residual is not None and case.residual.data_ptr() in activations) == (form == "dual")


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_stays_nan(impl: str, device: torch.device) -> None:
    x = make_case((2, 2, 2, 2), "none", torch.float32, device).x
    x[0, 0, 0, 0] = torch.nan
    y = batch_norm_act(x, x.new_ones(2), x.new_zeros(2), None, impl=impl)
    assert y[:, 0].isnan().all() and not y[:, 1].isnan().any()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"x": torch.zeros(2, 3, 4, 5)}, "channels-last"),
        ({"x": torch.zeros(2, 3, 4)}, r"\[N, C\]"),
        ({"groups": 3}, "do not divide into 3"),
        ({"groups": 0}, "do not divide into 0"),
        ({"x": torch.zeros(0, 3)}, "do not divide"),
        ({"x": torch.zeros(2, 3), "groups": 2}, "more than one value"),
        ({"weight": torch.ones(4)}, "weight must be contiguous"),
        ({"weight": torch.ones(3, dtype=torch.bfloat16)}, "weight must be fp32"),
        ({"running": None, "training": False}, "needs running"),
        ({"running": (torch.zeros(4), torch.ones(3))}, "running mean"),
        ({"residual": torch.zeros(2, 3, dtype=torch.bfloat16)}, "residual must be"),
        ({"residual_norm": Norm(torch.ones(3), torch.ones(3))}, "needs a residual"),
        ({"x": torch.zeros(4, 3).double(), "impl": "triton"}, "not torch.float64"),
        ({"impl": "cuda"}, "impl must be"),
    ],
)
def test_refusals(change: dict[str, object], text: str) -> None:
    arguments = {"x": torch.zeros(4, 3), "weight": torch.ones(3), "bias": torch.zeros(3), "running": None} | change
    with pytest.raises(ValueError, match=text):
        batch_norm_act(**arguments)


@pytest.mark.parametrize("by", ["triton", "loops"])
@pytest.mark.parametrize("form", FORMS)
def test_operators_are_well_registered(form: str, by: str, device: torch.device) -> None:
    if by == "loops":
        pytest.importorskip("numba")
    operators = batch_norm.OPERATORS[by]
    device = torch.device("cpu") if by == "loops" else device
    case = make_case((4, 6, 3, 3), form, torch.float32, device)
    statistics = (case.x, *case.main.running, 2, 0.1, EPS)
    torch.library.opcheck(operators.statistics, statistics)
    torch.library.opcheck(operators.statistics, (case.x, None, None, 2, 0.1, EPS))
    moments = operators.statistics(*statistics)
    side = (None, None, None) if case.side is None else (*case.side[:2], moments)
    torch.library.opcheck(operators.apply, (case.x, *case.main[:2], moments, case.residual, *side, True))
    arguments = (*case.main[:2], moments, case.residual if form == "dual" else None, *side, True, True)
    for second in (None, case.grad.clone()):
        y = case.x.clone() if form == "plain" else None
        torch.library.opcheck(operators.gradients, (case.grad, second, case.x, y, *arguments))


@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_whole_and_fakes(impl: str, device: torch.device) -> None:
    case = make_case((4, 6, 3, 3), "dual", torch.float32, device)
    for call, second in ((batch_norm_act_twice, case.grad * 3), (batch_norm_act, None)):
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        expected, actual = (results(f, case, 2, second, impl=impl) for f in (call, compiled))
        assert all(torch.equal(expected[name], actual[name]) for name in expected)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = results(
            batch_norm_act,
            Case(
                *(
                    mode.from_tensor(t)
                    if isinstance(t, Tensor)
                    else Norm(*(map(mode.from_tensor, t[:2])), tuple(map(mode.from_tensor, t.running)))
                    for t in case
                )
            ),
            2,
            impl=impl,
        )
    assert all(fake[name].stride() == t.stride() and fake[name].dtype == t.dtype for name, t in expected.items())


class Counter:
    """Stands for a Triton function and counts the bytes of the tensors that it is given and uses."""

    def __init__(self, kernel: object, total: list[int]) -> None:
        self.kernel, self.total = kernel, total

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: object, **options: object) -> None:
            self.kernel[grid](*args, **options)
            arguments = dict(zip(self.kernel.arg_names, args)) | options
            name = self.kernel.fn.__name__
            unused = {"partial"}  # stays in cache
            if name in ("sums_kernel", "gradient_kernel") and (not arguments["RELU"] or arguments.get("y") is not None):
                unused |= {"bias", "residual_bias"} | ({"weight", "residual_weight"} if "sums" in name else set())
            for key, value in arguments.items():
                if isinstance(value, Tensor) and key not in unused:
                    self.total[0] += value.nbytes * (2 if key.startswith("running") else 1)

        return launch


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_cost_is_the_bytes_of_the_tensors(
    form: str, relu: bool, twice: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    total = [0]
    for name in ("statistics", "finish_statistics", "apply", "sums", "finish_sums", "gradient"):
        kernel = f"{name}_kernel"
        monkeypatch.setattr(batch_norm_kernels, kernel, Counter(getattr(batch_norm_kernels, kernel), total))
    case, groups = make_case((4, 24, 5, 3), form, torch.bfloat16, device), 2
    options = {"residual": form, "relu": relu, "twice": twice}
    expected = [cost(case.x.shape, 2, groups, backward=backward, **options) for backward in (False, True)]
    arguments = {"residual": case.residual, "residual_norm": case.side, "relu": relu, "impl": "triton"}
    call = batch_norm_act_twice if twice else batch_norm_act
    y = call(case.x.requires_grad_(), *case.main, groups, **arguments)
    assert total[0] == expected[0][0] > 0 and expected[0][1] > 0
    torch.autograd.backward(y, [case.grad, case.grad.clone()] if twice else case.grad)
    assert total[0] == expected[0][0] + expected[1][0]
