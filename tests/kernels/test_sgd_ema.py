"""The fused update against torch.optim.SGD and a loop over the keys, in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastmoco.kernels.sgd_ema import TensorTable, _ema, _sgd_ema, cost, ema, ema_cost, sgd_ema

# The check multiplies infinities by zero, of which numpy, under the interpreter, speaks.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

IMPLS = ("triton", "reference")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# One element, none, odd, channels-last, one element over a chunk, a scalar.
SHAPES = ((1,), (0,), (7,), (4, 6, 3, 3), (4097,), ())
LR, MOMENTUM, DECAY, M = 0.03, 0.9, 1e-4, 0.99
MASTERS = ("q", "velocity", "k")
GROUPS = (*MASTERS, "q_work", "k_work")


def randoms(shapes: Sequence[tuple[int, ...]], seed: int, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
    return [x.to(memory_format=torch.channels_last) if x.dim() == 4 else x for x in draws]


def gradients(dtype: torch.dtype, seed: int, device: torch.device, shapes: Sequence = SHAPES) -> list[Tensor]:
    return [x.to(dtype) for x in randoms(shapes, 100 + seed, device)]


def make_table(
    work: torch.dtype | None, device: torch.device, shapes: Sequence = SHAPES, masters: torch.dtype = torch.float32
) -> TensorTable:
    """Random masters, zero velocity; working copies of their own, or the masters themselves for None."""
    q, k = ([x.to(masters) for x in randoms(shapes, seed, device)] for seed in (1, 2))
    copies = [x if work is None else x.to(work, copy=True) for x in (*q, *k)]
    return TensorTable(q, [torch.zeros_like(x) for x in q], k, copies[: len(q)], copies[len(q) :])


def flag(device: torch.device) -> Tensor:
    return torch.zeros(1, dtype=torch.int32, device=device)


def step(table: TensorTable, grads: Sequence[Tensor], nonfinite: Tensor | None = None, **options: Any) -> Tensor:
    nonfinite = flag(table.device) if nonfinite is None else nonfinite
    settings = {"lr": torch.tensor(LR, device=table.device), "momentum": MOMENTUM, "weight_decay": DECAY}
    sgd_ema(table, grads, **(settings | {"ema_momentum": M, "nonfinite": nonfinite} | options))
    return nonfinite


def snapshot(table: TensorTable, groups: Sequence[str] = GROUPS) -> list[Tensor]:
    """The bit patterns, so that even a zero that lost its sign is seen."""
    return [bits(tensor).clone() for group in groups for tensor in getattr(table, group)]


def bits(tensor: Tensor) -> Tensor:
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def by_torch(
    table: TensorTable, steps: Sequence[list[Tensor]], dtype: torch.dtype, **options: Any
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Query, velocity and key after torch.optim.SGD and the published loop over the keys."""
    q = [torch.nn.Parameter(x.to(dtype, copy=True)) for x in table.q]
    k = [x.to(dtype, copy=True) for x in table.k]
    optimizer = torch.optim.SGD(q, lr=LR, momentum=MOMENTUM, weight_decay=DECAY, **options)
    for grads in steps:
        for parameter, grad in zip(q, grads, strict=True):
            parameter.grad = grad.to(dtype)
        optimizer.step()
        torch._foreach_lerp_(k, [x.detach() for x in q], 1 - M)
    return [x.detach() for x in q], [optimizer.state[x]["momentum_buffer"] for x in q], k


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_steps_stay_within_the_error_of_torch_in_fp32(impl: str, dtype: torch.dtype, device: torch.device) -> None:
    table = make_table(dtype, device)
    steps = [gradients(dtype, seed, device) for seed in range(6)]
    truth, fp32 = (by_torch(table, steps, kind) for kind in (torch.float64, torch.float32))
    for grads in steps:
        assert step(table, grads, impl=impl).item() == 0
    for name, exact, torchs in zip(MASTERS, truth, fp32, strict=True):
        for ours, true, other in zip(getattr(table, name), exact, torchs, strict=True):
            if ours.numel():
                epsilon = 4 * torch.finfo(torch.float32).eps * true.abs().max()
                assert (ours - true).abs().max() <= (other - true).abs().max() + epsilon, name
    for master, copy in zip((*table.q, *table.k), (*table.q_work, *table.k_work), strict=True):
        assert torch.equal(copy, master.to(dtype))


@pytest.mark.parametrize("foreach", [True, False])
def test_the_twin_is_torch_sgd_to_the_last_bit(foreach: bool) -> None:
    table = make_table(None, torch.device("cpu"))
    steps = [gradients(torch.float32, seed, table.device) for seed in range(20)]
    expected = by_torch(table, steps, torch.float32, foreach=foreach)
    for grads in steps:
        step(table, grads, impl="reference")
    for name, tensors in zip(MASTERS, expected, strict=True):
        assert same(getattr(table, name), tensors), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the interpreter has no fused multiply-add")
def test_the_kernel_is_torch_sgd_to_the_last_bit() -> None:
    table = make_table(None, torch.device("cuda"))
    steps = [gradients(torch.float32, seed, table.device) for seed in range(20)]
    expected = by_torch(table, steps, torch.float32, foreach=True)
    for grads in steps:
        step(table, grads, impl="triton")
    for name, tensors in zip(MASTERS, expected, strict=True):
        assert same(getattr(table, name), tensors), name


@pytest.mark.parametrize("impl", IMPLS)
def test_exact_where_fp32_is_exact(impl: str, device: torch.device) -> None:
    """Multiples of 1/8 and factors that are powers of two never round, so nothing may differ from float64."""
    table, wide = make_table(None, device), make_table(None, device, masters=torch.float64)
    for tensor in (*table.q, *table.k, *wide.q, *wide.k):
        tensor.copy_(tensor.mul(8).round() / 8)
    settings = {"momentum": 0.5, "weight_decay": 0.0625, "ema_momentum": 0.75}
    for seed in range(2):
        grads = [(x * 8).round() / 8 for x in gradients(torch.float32, seed, device)]
        step(table, grads, impl=impl, lr=0.25, **settings)
        step(wide, [x.double() for x in grads], impl="reference", lr=0.25, **settings)
    for name in MASTERS:
        assert all(torch.equal(x.double(), y) for x, y in zip(getattr(table, name), getattr(wide, name), strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_scalars_may_be_floats_or_on_the_device(impl: str, device: torch.device) -> None:
    a, b = make_table(torch.bfloat16, device), make_table(torch.bfloat16, device)
    grads = gradients(torch.bfloat16, 0, device)
    values = {"lr": 0.25, "momentum": 0.5, "weight_decay": 0.125, "ema_momentum": 0.75}  # exact in fp32
    step(a, grads, impl=impl, **values)
    step(b, grads, impl=impl, **{name: torch.tensor(value, device=device) for name, value in values.items()})
    assert same(snapshot(a), snapshot(b))
    step(b, grads, impl=impl, **(values | {"momentum": torch.tensor(0.625, device=device)}))
    step(a, grads, impl=impl, **values)
    assert not same(snapshot(a), snapshot(b))


@pytest.mark.parametrize("impl", IMPLS)
def test_loss_scale_is_divided_out(impl: str, device: torch.device) -> None:
    plain, scaled = make_table(torch.float16, device), make_table(torch.float16, device)
    grads = gradients(torch.float16, 0, device)
    step(plain, grads, impl=impl)
    scale = torch.tensor(1024.0, device=device)
    step(scaled, [x * 1024 for x in grads], impl=impl, grad_scale=scale)
    assert same(snapshot(plain), snapshot(scaled))
    step(plain, grads, impl=impl)
    step(scaled, grads, impl=impl, grad_scale=scale)
    assert not same(snapshot(plain), snapshot(scaled))


@pytest.mark.parametrize("impl", IMPLS)
def test_ema_of_a_constant_decays_geometrically(impl: str, device: torch.device) -> None:
    table = make_table(torch.bfloat16, device)
    start = [k.double() - q.double() for k, q in zip(table.k, table.q, strict=True)]
    for _ in range(8):
        ema(table, 0.9, impl=impl)
    for k, q, gap in zip(table.k, table.q, start, strict=True):
        torch.testing.assert_close(k.double(), q.double() + 0.9**8 * gap, rtol=0, atol=8 * 2**-22)
    assert same(table.k_work, [k.bfloat16() for k in table.k])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("on_device", [False, True])
def test_ema_ends(impl: str, on_device: bool, device: torch.device) -> None:
    """m = 1 keeps the key and m = 0 copies the query, bit by bit, even where they differ by many orders."""
    table = make_table(None, device)
    table.k[4].mul_(1e8)
    keep, copy = (torch.tensor(float(m), device=device) if on_device else float(m) for m in (1, 0))
    before = snapshot(table)
    ema(table, keep, impl=impl)
    assert same(before, snapshot(table))
    ema(table, copy, impl=impl)
    assert same(table.k, table.q) and not same(before, snapshot(table))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_key_equal_to_its_query_stays(impl: str, device: torch.device) -> None:
    """The first update of a run: key equals query, so the order of EMA and SGD cannot matter."""
    table = make_table(torch.bfloat16, device)
    for k, q in zip(table.k, table.q, strict=True):
        k.copy_(q)
    before = snapshot(table, ("q", "k"))
    step(table, gradients(torch.float32, 0, device), impl=impl, lr=0.0, ema_momentum=0.999)
    assert same(before, snapshot(table, ("q", "k")))
    step(table, gradients(torch.float32, 0, device), impl=impl, ema_momentum=0.999)
    assert not same(before[len(SHAPES) :], snapshot(table, ("k",)))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_working_copy_may_be_the_master(impl: str, device: torch.device) -> None:
    apart, shared = make_table(torch.float32, device), make_table(None, device)
    assert shared.q_casts == shared.k_casts == [] and len(apart.q_casts) == len(SHAPES)
    for seed in range(2):
        for table in (apart, shared):
            step(table, gradients(torch.bfloat16, seed, device), impl=impl)
    assert same(snapshot(apart), snapshot(shared))
    parameter = torch.nn.Parameter(torch.ones(5, device=device))
    k = torch.ones(5, device=device)
    table = TensorTable([parameter.data], [torch.zeros_like(k)], [k], [parameter], [k])
    assert table.q_is_work == [True]
    step(table, [torch.ones_like(k)], impl=impl)
    assert (parameter < 1).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("entry", "element", "value"), [(0, 0, "inf"), (4, 4095, "-inf"), (4, 4096, "nan"), (3, 107, "nan"), (5, 0, "inf")]
)
def test_one_bad_gradient_leaves_every_byte(
    impl: str, dtype: torch.dtype, entry: int, element: int, value: str, device: torch.device
) -> None:
    table = make_table(dtype, device)
    table.velocity[4].fill_(-0.0)
    before, grads = snapshot(table), gradients(dtype, 0, device)
    grads[entry].as_strided((grads[entry].numel(),), (1,))[element] = float(value)
    assert step(table, grads, impl=impl).item() == 1
    assert same(before, snapshot(table))


@pytest.mark.parametrize("impl", IMPLS)
def test_the_flag_is_sticky_and_does_not_stop_later_steps(impl: str, device: torch.device) -> None:
    table, clean = make_table(torch.float16, device), make_table(torch.float16, device)
    grads = gradients(torch.float16, 0, device)
    bad = [x.clone() for x in grads]
    bad[2][3] = torch.nan
    nonfinite = step(table, bad, impl=impl)
    step(table, grads, nonfinite, impl=impl)
    assert nonfinite.item() == 1
    untouched = snapshot(clean)
    assert step(clean, grads, impl=impl).item() == 0
    assert same(snapshot(clean), snapshot(table)) and not same(untouched, snapshot(clean))


@pytest.mark.parametrize("impl", IMPLS)
def test_large_finite_gradients_are_not_called_bad(impl: str, device: torch.device) -> None:
    table = make_table(None, device, shapes=((600,),))
    assert step(table, [torch.full((600,), 3e38, device=device)], impl=impl, lr=0.0).item() == 0


@pytest.mark.parametrize("impl", IMPLS)
def test_an_ema_kept_in_bf16_would_stand_still(impl: str, device: torch.device) -> None:
    table = make_table(torch.bfloat16, device, shapes=((64,),))
    table.q[0].fill_(1.5)
    table.k[0].fill_(1.0)
    low = torch.ones(64, dtype=torch.bfloat16)
    for _ in range(4):
        ema(table, 0.999, impl=impl)
        low.lerp_(torch.full_like(low, 1.5), 0.001)
    assert (low == 1).all() and (table.k[0] > 1.0019).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_two_runs_agree_bit_by_bit(impl: str, device: torch.device) -> None:
    a, b = make_table(torch.bfloat16, device), make_table(torch.bfloat16, device)
    for table in (a, b):
        for seed in range(2):
            step(table, gradients(torch.bfloat16, seed, device), impl=impl)
    assert same(snapshot(a), snapshot(b))


def test_gradients_may_move_and_need_no_alignment(device: torch.device) -> None:
    still, moving = make_table(torch.bfloat16, device), make_table(torch.bfloat16, device)
    for seed in range(3):
        grads = gradients(torch.bfloat16, seed, device)
        step(still, grads, impl="triton")
        step(moving, [shift(x, seed) for x in grads], impl="triton")
    assert same(snapshot(still), snapshot(moving))


def shift(tensor: Tensor, by: int) -> Tensor:
    memory = torch.full((tensor.numel() + by,), torch.nan, dtype=tensor.dtype, device=tensor.device)
    return memory.as_strided(tensor.shape, tensor.stride(), by).copy_(tensor)


def test_records_are_sent_only_when_something_moved(device: torch.device) -> None:
    table = make_table(torch.bfloat16, device)
    entries, grads = table.on_device(), gradients(torch.bfloat16, 0, device)
    addresses = [x.data_ptr() for group in table.tensors for x in group]
    outgoing = entries.records(table.tensors, grads)
    step(table, grads, impl="triton")
    ema(table, M, impl="triton")
    assert entries.records(table.tensors, grads) is outgoing
    assert [x.data_ptr() for group in table.tensors for x in group] == addresses
    assert entries.records(table.tensors, [x.clone() for x in grads]) is not outgoing
    as_fp32 = entries.records(table.tensors, [x.float() for x in grads])
    assert (as_fp32[:, 7] & 3).tolist() == [0] * len(grads) and (outgoing[:, 7] & 3).tolist() == [1] * len(grads)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures a CUDA graph")
def test_graph_replays_as_eager_steps_do() -> None:
    device = torch.device("cuda")
    eager, captured = make_table(torch.bfloat16, device), make_table(torch.bfloat16, device)
    static, nonfinite = gradients(torch.bfloat16, 0, device), flag(device)
    lr = torch.tensor(LR, device=device)
    step(make_table(torch.bfloat16, device), static, lr=lr)  # compiles the kernels, which no capture may do
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # the table's first call, so its records travel in the graph
        step(captured, static, nonfinite, lr=lr)
    for seed in range(4):
        grads = gradients(torch.bfloat16, seed, device)
        if seed == 2:
            grads[0][0] = torch.nan
        step(eager, grads)
        torch._foreach_copy_(static, grads)
        step(captured, [x * torch.nan for x in grads])  # an eager call in between must not disturb the graph
        graph.replay()
    assert same(snapshot(eager), snapshot(captured)) and nonfinite.item() == 1


def op_arguments(table: TensorTable, grads: list[Tensor], triton: bool) -> tuple:
    lr = torch.tensor(LR, device=table.device)
    copies = (table.q_casts, table.k_casts)
    rest = ([lr, None, None, None, None], [0.0, MOMENTUM, DECAY, M, 1.0], flag(table.device))
    return (table.handle, triton, table.q, table.velocity, table.k, *copies, grads, *rest)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("work", [None, torch.bfloat16])
def test_operators_keep_their_schema(impl: str, work: torch.dtype | None, device: torch.device) -> None:
    shapes = ((5,), (2, 3, 1, 1))
    table, triton = make_table(work, device, shapes), impl == "triton"
    grads = gradients(torch.float32, 0, device, shapes)
    torch.library.opcheck(_sgd_ema, op_arguments(table, grads, triton))
    torch.library.opcheck(_ema, (table.handle, triton, table.q, table.k, table.k_casts, [None], [M]))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("work", [None, torch.bfloat16])
def test_compiled_step_equals_eager(impl: str, work: torch.dtype | None, device: torch.device) -> None:
    """`aot_eager` hands the operator functionalised copies, so the table's own addresses will not do."""
    shapes = ((5,), (2, 3, 1, 1), (4097,))
    eager, compiled = make_table(work, device, shapes), make_table(work, device, shapes)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def run(grads: list[Tensor], lr: Tensor, nonfinite: Tensor) -> None:
        sgd_ema(compiled, grads, lr, MOMENTUM, DECAY, M, nonfinite, impl=impl)
        ema(compiled, M, impl=impl)

    for seed in range(2):
        grads = gradients(torch.bfloat16, seed, device, shapes)
        step(eager, grads, impl=impl)
        ema(eager, M, impl=impl)
        run(grads, torch.tensor(LR, device=device), flag(device))
    assert same(snapshot(eager), snapshot(compiled))


def test_fake_tensors_pass_through() -> None:
    with FakeTensorMode():
        table = make_table(torch.bfloat16, torch.device("cpu"))
        step(table, gradients(torch.bfloat16, 0, table.device))
        ema(table, M)


@pytest.mark.parametrize("work", [None, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cost_is_the_bytes_of_the_tensors(work: torch.dtype | None, dtype: torch.dtype, device: torch.device) -> None:
    table, grads = make_table(work, device), gradients(dtype, 0, device)
    size = lambda *groups: sum(x.numel() * x.element_size() for group in groups for x in group)  # noqa: E731
    own = [] if work is None else [table.q_work, table.k_work]
    masters = (table.q, table.velocity, table.k)
    assert cost(table, [dtype] * len(grads))[0] == size(*masters, grads) + size(grads) + size(*masters, *own)
    assert ema_cost(table)[0] == size(table.q, table.k) + size(table.k, *own[1:])


def test_bytes_a_parameter_at_bf16() -> None:
    table = make_table(torch.bfloat16, torch.device("meta"), shapes=((1000, 1000),))
    assert cost(table, [torch.bfloat16]) == (32_000_000, 12_000_000) and ema_cost(table) == (14_000_000, 3_000_000)
    assert cost(table, [torch.float32])[0] == 36_000_000


def table_of_one(**changes: Tensor) -> TensorTable:
    entry = dict.fromkeys(GROUPS, torch.zeros(2, 3, 4, 4)) | changes
    return TensorTable(*([tensor] for tensor in entry.values()))


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: TensorTable([], [], [], [], []), "at least one"),
        (lambda: table_of_one(k=torch.zeros(2, 3, 4)), "entry 0: k has shape"),
        (lambda: table_of_one(k=torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last)), "one memory format"),
        (lambda: table_of_one(k=torch.zeros(2, 3, 4, 4).bfloat16()), "entry 0: k is torch.bfloat16"),
        (lambda: table_of_one(k_work=torch.zeros(2, 3, 4, 4).int()), "entry 0: k_work is torch.int32"),
        (lambda: table_of_one(**dict.fromkeys(GROUPS, torch.zeros(2, 6, 4, 4)[:, :3])), "not dense"),
        (lambda: table_of_one(**dict.fromkeys(GROUPS, torch.zeros(3, 1).expand(3, 3))), "not dense"),
        (lambda: table_of_one(q_work=torch.zeros(2, 3, 4, 4, device="meta")), "is on meta"),
    ],
)
def test_tables_that_cannot_work_are_refused(build: Callable[[], TensorTable], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        build()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"grads": []}, "0 gradients"),
        ({"grads": [None]}, "gradient 0 is None"),
        ({"grads": [torch.zeros(2, 3, 4, 4).int()]}, "gradient 0 is torch.int32"),
        ({"grads": [torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last)]}, "one memory format"),
        ({"nonfinite": torch.zeros(1)}, "nonfinite is torch.float32"),
        ({"lr": torch.zeros(2)}, "a scalar is"),
        ({"ema_momentum": torch.zeros((), device="meta")}, "a scalar is"),
        ({"impl": "cuda"}, "impl must be .* not 'cuda'"),
    ],
)
def test_calls_that_cannot_work_are_refused(change: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        step(table_of_one(), **({"grads": [torch.zeros(2, 3, 4, 4)]} | change))


def test_strides_of_single_elements_do_not_matter(device: torch.device) -> None:
    """A 1 x 1 convolution's weight is contiguous and channels-last at once, and its tensors may say either."""
    q = torch.randn(8, 4, 1, 1, device=device)
    k = torch.randn(8, 4, 1, 1, device=device).as_strided((8, 4, 1, 1), (4, 1, 4, 4))
    table = TensorTable([q], [torch.zeros_like(q)], [k], [q], [k])
    expected = k.lerp(q, 0.5)
    ema(table, 0.5, impl="triton")
    assert torch.equal(table.k[0], expected)


def test_double_precision_is_for_the_reference(device: torch.device) -> None:
    table = make_table(None, device, masters=torch.float64)
    with pytest.raises(ValueError, match="not torch.float64"):
        ema(table, M, impl="triton")


BENCHMARK_SHAPES = ((256, 256, 3, 3),) * 3 + ((1024, 256, 1, 1),) * 4 + ((256,),) * 20


@pytest.mark.benchmark(group="sgd_ema on a CPU, fp32")
@pytest.mark.parametrize("contender", ["twin", "torch.optim.SGD(foreach) + _foreach_lerp_"])
def test_speed_of_the_twin(benchmark: Callable[..., None], contender: str) -> None:
    """Compare with `--benchmark-enable`; the twin checks the gradients besides."""
    table = make_table(None, torch.device("cpu"), BENCHMARK_SHAPES)
    parameters = [torch.nn.Parameter(q) for q in table.q]
    for parameter, grad in zip(parameters, gradients(torch.float32, 0, table.device, BENCHMARK_SHAPES), strict=True):
        parameter.grad = grad
    optimizer = torch.optim.SGD(parameters, lr=LR, momentum=MOMENTUM, weight_decay=DECAY, foreach=True)

    def by_torch_optim() -> None:
        optimizer.step()
        torch._foreach_lerp_(table.k, table.q, 1 - M)

    def by_twin() -> None:
        step(table, [parameter.grad for parameter in parameters], impl="reference")

    benchmark(by_twin if contender == "twin" else by_torch_optim)
