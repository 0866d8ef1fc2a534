"""InfoNCE against the float64 twin by the error budget: our error may not exceed plain torch's in the same dtype."""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastmoco.kernels import info_nce_kernels as kernels
from fastmoco.kernels import reference
from fastmoco.kernels.dispatch import Machine
from fastmoco.kernels.info_nce import _operator, cost, info_nce, scratch_bytes

LOW = [torch.bfloat16, torch.float16]
module = sys.modules[info_nce.__module__]  # whose name in the package is the function's
EPSILON = {torch.float32: 3e-7, torch.bfloat16: 2**-9, torch.float16: 2**-12}  # one rounding of one number


def _inputs(n, size, dim, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z, k, queue = (torch.randn(rows, dim, generator=generator) for rows in (n, n, size))
    likeness = torch.linspace(0, 1, n)[:, None]  # from a stranger, with half the queue above it, to a close relative
    k = F.normalize(likeness * F.normalize(z) + F.normalize(k))
    return 3 * z.to(device), k.to(device, dtype), F.normalize(queue).to(device, dtype)


def _truth(z, k, queue, temperature):
    z = z.double().requires_grad_()
    loss, rank = reference.info_nce(z, k.double(), queue.double(), temperature)
    weights = torch.arange(1, len(z) + 1, dtype=torch.float64, device=z.device)
    (gradient,) = torch.autograd.grad(loss @ weights, z)
    return loss.detach(), rank, gradient


def _ours(z, k, queue, temperature):
    z = z.detach().requires_grad_()
    loss, rank = info_nce(z, k, queue, temperature, impl="triton")
    (gradient,) = torch.autograd.grad(loss @ torch.arange(1, len(z) + 1, dtype=loss.dtype, device=z.device), z)
    return loss.detach(), rank, gradient


def _plain_torch(z, k, queue, temperature):
    # facebookresearch/moco's loss, in the arithmetic autocast would give it.
    z = z.detach().requires_grad_()
    q = F.normalize(z).to(queue.dtype)
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1) / temperature
    loss = F.cross_entropy(logits.float(), torch.zeros(len(z), dtype=torch.long, device=z.device), reduction="none")
    (gradient,) = torch.autograd.grad(loss @ torch.arange(1, len(z) + 1, dtype=loss.dtype, device=z.device), z)
    return loss.detach(), gradient


def _within_budget(z, k, queue, temperature, arguments=None):
    loss, rank, gradient = _truth(z, k, queue, float(temperature))
    our_loss, our_rank, our_gradient = _ours(z, k, queue, temperature if arguments is None else arguments)
    torch_loss, torch_gradient = _plain_torch(z, k, queue, float(temperature))
    epsilon = EPSILON[queue.dtype]
    scale = 1 / float(temperature)
    assert (our_loss - loss).norm() <= (torch_loss - loss).norm() + epsilon * scale * len(z) ** 0.5
    # A gradient is bounded by 2 / (T |z|) a row; what is left of it after cancellation may be far less.
    bound = (torch.arange(1, len(z) + 1, device=z.device) * scale / z.norm(dim=1)).norm()
    assert (our_gradient - gradient).norm() <= (torch_gradient - gradient).norm() + epsilon * bound
    # A rank may differ only by negatives whose true score ties with the positive's, to rounding of the operands.
    q = F.normalize(z.double())
    margin = (q @ queue.double().T - (q * k.double()).sum(1, keepdim=True)).abs()
    ties = (margin < 4 * epsilon).sum(1)
    assert ((our_rank - rank).abs() <= ties).all()


SHAPES = [(1, 1, 16), (1, 300, 48), (7, 257, 80), (13, 512, 128), (130, 200, 64), (3, 130, 256), (2, 65, 512)]


@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
@pytest.mark.parametrize(("n", "size", "dim"), SHAPES)
def test_within_error_budget(device, n, size, dim, dtype):
    _within_budget(*_inputs(n, size, dim, dtype, device), 0.07)


@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
@pytest.mark.parametrize("temperature", [0.01, 0.02, 0.025, 0.2, 1.0])
@pytest.mark.parametrize("on_device", [False, True])
def test_temperatures(device, temperature, on_device, dtype):
    scalar = torch.tensor(temperature, device=device) if on_device else temperature
    _within_budget(*_inputs(5, 150, 32, dtype, device), temperature, scalar)


@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
@pytest.mark.parametrize("temperature", [0.01, 0.025, 0.07])
@pytest.mark.parametrize(("positive", "negative"), [(1, -1), (-1, 1), (1, 1), (-1, -1)])
def test_extreme_logits(device, temperature, positive, negative, dtype):
    z = torch.zeros(3, 32, device=device)
    z[:, 5] = 2.0
    unit = (z / 2).to(dtype)
    loss, rank, gradient = _ours(z, positive * unit, (negative * unit[:1]).repeat(100, 1), temperature)
    expected, expected_rank, _ = _truth(z, positive * unit, (negative * unit[:1]).repeat(100, 1), temperature)
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=1e-5)
    assert torch.equal(rank, expected_rank)
    # All keys lie along the query, so every gradient is normal to its own direction: nought.
    assert gradient.abs().max() < 1e-2


@pytest.mark.parametrize("dtype", LOW)
def test_all_negatives_far_below_still_turn_the_query(device, dtype):
    # What a fixed shift would lose: every fp16 probability at T = 0.07 underflows here, positive and negatives alike.
    z = torch.zeros(2, 16, device=device)
    z[:, 0] = 1.0
    away = F.normalize(torch.tensor([[-1.0, 0.2]], device=device))
    k, queue = torch.zeros(2, 16, device=device), torch.zeros(70, 16, device=device)
    k[:, :2], queue[:, :2] = away, away * torch.tensor([1.0, -1.0], device=device)
    _, _, gradient = _ours(z, k.to(dtype), queue.to(dtype), 0.07)
    _, _, expected = _truth(z, k.to(dtype), queue.to(dtype), 0.07)
    assert (gradient - expected).norm() <= 8 * EPSILON[dtype] * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
def test_keys_equal_to_the_positive_do_not_outscore_it(device, dtype):
    z, k, _ = _inputs(9, 1, 128, dtype, device)
    if device.type == "cpu":
        # The interpreter's products are NumPy's, whose BLAS may round equal columns differently. Of unit vectors of
        # 64 entries of +-1/8 every product and every partial sum is exact, in any order.
        signs = torch.Generator().manual_seed(0)
        z, k = (torch.randint(0, 2, (1, 128), generator=signs) / 4.0 - 1 / 8 for _ in range(2))
        z[:, 64:] = k[:, 64:] = 0
        k = k.to(dtype)
    queue = k[:1].repeat(200, 1)
    _, rank = info_nce(z[:1].repeat(9, 1), k[:1].repeat(9, 1), queue, 0.07, impl="triton")
    assert not rank.any()
    # The control: a positive that is any worse is outscored by all of them.
    sign = float((z[:1] @ k[:1].float().T).sign())
    _, rank = info_nce(sign * z[:1], -k[:1], queue, 0.07, impl="triton")
    assert sign and rank.tolist() == [200]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_order_of_the_queue_does_not_matter(device, dtype):
    z, k, queue = _inputs(11, 400, 64, dtype, device)
    shuffled = queue[torch.randperm(400, generator=torch.Generator().manual_seed(1)).to(device)]
    (loss, rank, gradient), (other, other_rank, turned) = (_ours(z, k, keys, 0.07) for keys in (queue, shuffled))
    assert torch.equal(rank, other_rank)
    torch.testing.assert_close(other, loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(turned, gradient, rtol=2e-3, atol=2e-3 * float(gradient.abs().max()))
    # The control: another queue does change it.
    assert rank.any()
    assert not torch.equal(_ours(z, k, -queue, 0.07)[1], rank)


@pytest.mark.parametrize("temperature", [0.01, 0.07])
def test_two_runs_give_the_same_bits(device, temperature):
    inputs = _inputs(33, 700, 128, torch.bfloat16, device)
    for first, second in zip(_ours(*inputs, temperature), _ours(*inputs, temperature), strict=True):
        assert torch.equal(first, second)


def test_the_number_of_pieces_does_not_matter(device, monkeypatch):
    z, k, queue = _inputs(5, 900, 32, torch.float32, device)
    whole = module._plan
    monkeypatch.setattr(module, "_plan", lambda *a: whole(*a)._replace(pieces=1, tiles_per_piece=1000))
    single = _ours(z, k, queue, 0.01)
    monkeypatch.setattr(module, "_plan", whole)
    assert whole(5, 900, 32, queue.dtype, z.device).pieces > 1
    for one, several in zip(single, _ours(z, k, queue, 0.01), strict=True):
        torch.testing.assert_close(one, several, rtol=1e-5, atol=1e-5)


def test_low_precision_queries_get_gradients_of_their_dtype(device):
    z, k, queue = _inputs(4, 100, 32, torch.bfloat16, device)
    gradient = _ours(z.bfloat16(), k, queue, 0.07)[2]
    assert gradient.dtype == torch.bfloat16
    exact = _truth(z.bfloat16().float(), k, queue, 0.07)[2]
    assert (gradient - exact).norm() <= 2**-6 * exact.norm()


def test_zero_query_is_finite(device):
    z, k, queue = _inputs(3, 50, 16, torch.float32, device)
    loss, rank, _ = _ours(z * 0, k, queue, 0.07)
    torch.testing.assert_close(loss, torch.full_like(loss, 51.0).log(), rtol=1e-5, atol=1e-5)
    assert not rank.any()


def _empty(*shape, dtype=torch.float32):
    return torch.ones(*shape, dtype=dtype)


@pytest.mark.parametrize(
    ("z", "k", "queue", "temperature", "what"),
    [
        (_empty(0, 16), _empty(0, 16), _empty(4, 16), 0.1, "at least one row"),
        (_empty(2, 16), _empty(2, 16), _empty(0, 16), 0.1, "at least one row"),
        (_empty(2, 20), _empty(2, 20), _empty(4, 20), 0.1, "multiple of 16"),
        (_empty(2, 528), _empty(2, 528), _empty(4, 528), 0.1, "multiple of 16"),
        (_empty(2, 16), _empty(3, 16), _empty(4, 16), 0.1, r"needs z_q \[N, D\]"),
        (_empty(2, 16), _empty(2, 16), _empty(4, 32), 0.1, r"needs z_q \[N, D\]"),
        (_empty(2, 16).long(), _empty(2, 16), _empty(4, 16), 0.1, "z_q must be fp32"),
        (_empty(2, 16), _empty(2, 16), _empty(16, 16).T[::2], 0.1, "contiguous"),
        (_empty(2, 16), _empty(2, 16), _empty(4, 16), 0.0, "positive"),
        (_empty(2, 16), _empty(2, 16), _empty(4, 16), float("nan"), "positive"),
        (_empty(2, 16), _empty(2, 16), _empty(4, 16), torch.ones(1), "0-d float"),
    ],
)
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_refuses(z, k, queue, temperature, what, impl):
    with pytest.raises(ValueError, match=what):
        info_nce(z, k, queue, temperature, impl=impl)


def test_the_twin_takes_float64_and_the_kernel_does_not(device):
    z, k, queue = _inputs(4, 100, 32, torch.float64, device)
    loss, rank = info_nce(z.double(), k, queue, 0.07)
    exact, exact_rank = reference.info_nce(z.double(), k, queue, 0.07)
    assert loss.dtype == torch.float64 and torch.equal(loss, exact) and torch.equal(rank, exact_rank)
    with pytest.raises(ValueError, match="not torch.float64"):
        info_nce(z.double(), k, queue, 0.07, impl="triton")


def test_large_projections_of_another_dtype_do_not_overflow_fp16(device):
    z, k, queue = _inputs(5, 90, 32, torch.float16, device)
    (loss, rank, gradient), (other, other_rank, turned) = (_ours(z * s, k, queue, 0.07) for s in (1.0, 2.0**20))
    assert torch.equal(loss, other) and torch.equal(rank, other_rank) and torch.equal(gradient, turned * 2.0**20)


def test_backward_is_one_kernel_and_differentiates_once(device):
    z, k, queue = _inputs(4, 100, 32, torch.bfloat16, device)
    z = z.bfloat16().requires_grad_()
    loss, _ = info_nce(z, k, queue, 0.07, impl="triton")
    ones = torch.ones_like(loss, requires_grad=True)
    with Calls() as calls:
        (gradient,) = torch.autograd.grad(loss, z, ones, create_graph=True)
    assert [name for name in calls.names if name not in ("empty_like", "detach", "unsqueeze")] == ["mul"]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.float().sum().backward()


class Calls(TorchDispatchMode):
    """The names of all operators that are called."""

    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_operator_contract(device):
    z, k, queue = _inputs(3, 70, 16, torch.float32, device)
    torch.library.opcheck(_operator, (z, k, queue, 0.07, None))


def test_traces_whole(device):
    z, k, queue = _inputs(3, 70, 16, torch.float32, device)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(z, k, queue):
        loss, rank = info_nce(z * 2, k, queue, 0.07, impl="triton")
        return loss.mean(), rank

    z.requires_grad_()
    loss, rank = step(z, k, queue)
    (gradient,) = torch.autograd.grad(loss, z)
    eager, eager_rank = info_nce(z * 2, k, queue, 0.07, impl="triton")
    assert torch.equal(loss, eager.mean())
    assert torch.equal(rank, eager_rank)
    torch.testing.assert_close(gradient, torch.autograd.grad(eager.mean(), z)[0])


def test_fake_tensors_pass(device):
    # Fake CUDA tensors need no CUDA; autograd's own threads do.
    with FakeTensorMode(), torch.no_grad():
        z = torch.empty(8, 128, device="cuda")
        queue = torch.empty(1 << 16, 128, device="cuda", dtype=torch.bfloat16)
        loss, rank = info_nce(z, torch.empty_like(z), queue, torch.tensor(0.07, device="cuda"))
    assert (loss.shape, loss.dtype, rank.dtype, loss.device.type) == ((8,), torch.float32, torch.int32, "cuda")
    with FakeTensorMode():
        z = torch.empty(8, 128, device=device, requires_grad=True)
        loss, _ = info_nce(z, torch.empty_like(z), torch.empty(64, 128, device=device), 0.07, impl="triton")
        loss.sum().backward()
    assert z.grad.shape == (8, 128)


def test_extra_memory_stays_under_ten_megabytes(monkeypatch):
    for gpu in (Machine((8, 0), 108), Machine((9, 0), 132), Machine((10, 0), 148)):
        monkeypatch.setattr(module, "machine", lambda device, gpu=gpu: gpu)
        for running in (False, True):
            extra = scratch_bytes(256, 65536, 128, torch.bfloat16, torch.device("cuda", 0), running)
            assert extra <= 10 * 2**20


@pytest.mark.parametrize("temperature", [0.01, 0.07])
def test_extra_memory_formula_counts_what_is_allocated(device, temperature, monkeypatch):
    z, k, queue = _inputs(20, 500, 48, torch.bfloat16, device)
    records = []
    launch = kernels.sweep_kernel, kernels.combine_kernel

    class Spy:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def call(*arguments, **constants):
                records.extend(a for a in arguments if isinstance(a, torch.Tensor))
                return self.kernel[grid](*arguments, **constants)

            return call

    monkeypatch.setattr(kernels, "sweep_kernel", Spy(launch[0]))
    monkeypatch.setattr(kernels, "combine_kernel", Spy(launch[1]))
    z = z.bfloat16()  # as the queue: of another dtype it would be copied
    loss, rank, _ = _operator(z, k, queue, temperature, None)
    given = {t.data_ptr() for t in (z, k, queue, loss, rank)}
    allocated = {t.data_ptr(): t.nbytes for t in records if t.data_ptr() not in given}
    assert sum(allocated.values()) == scratch_bytes(20, 500, 48, queue.dtype, z.device, temperature < 0.025)


def test_cost_counts_the_bytes_of_the_tensors(device):
    z, k, queue = _inputs(6, 90, 48, torch.bfloat16, device)
    k = k.float()
    loss, rank, gradient = _operator(z, k, queue, 0.07, None)
    bytes_moved, flops = cost(6, 90, 48, torch.float32, torch.bfloat16)
    assert bytes_moved == sum(t.nbytes for t in (z, k, queue, loss, rank, gradient))
    # Scores and gradient are a product each, of N rows with the queue and the positive.
    assert flops == 2 * (2 * 6 * 91 * 48)


@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
@pytest.mark.parametrize("temperature", [0.02, 0.07])
def test_keys_of_a_rows_own_id_are_left_out(device, temperature, dtype):
    """Against the float64 twin, and against the queue without those keys, row by row; ids may repeat."""
    z, k, queue = _inputs(9, 130, 32, dtype, device)
    key_ids = torch.randint(0, 20, (130,), generator=torch.Generator().manual_seed(0)).to(device)
    row_ids = torch.arange(9, device=device) * 3
    leaf = z.detach().requires_grad_()
    loss, rank = info_nce(leaf, k, queue, temperature, row_ids=row_ids, key_ids=key_ids, impl="triton")
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    for row in range(9):
        kept = queue[key_ids != row_ids[row]]
        one = z[row : row + 1].double().requires_grad_()
        expected, expected_rank = reference.info_nce(one, k[row : row + 1].double(), kept.double(), temperature)
        (exact,) = torch.autograd.grad(expected.sum(), one)
        scale = EPSILON[dtype] / temperature
        assert (loss[row] - expected[0]).abs() <= 4 * scale
        assert (gradient[row] - exact[0]).norm() <= 4 * scale / z[row].norm() / temperature**0.5
        margin = (
            F.normalize(one.detach()) @ kept.double().T - (F.normalize(one.detach()) * k[row].double()).sum()
        ).abs()
        assert (rank[row] - expected_rank[0]).abs() <= (margin < 4 * EPSILON[dtype]).sum()
    # The control: with its own keys a row's loss is higher.
    assert (info_nce(z, k, queue, temperature, impl="triton")[0] > loss).any()


def test_ids_go_together(device):
    z, k, queue = _inputs(3, 20, 16, torch.float32, device)
    ids = torch.arange(3, device=device)
    for arguments, what in (
        ({"row_ids": ids}, "go together"),
        ({"key_ids": ids}, "go together"),
        ({"row_ids": ids, "key_ids": ids}, r"key_ids must be int64 \[20\]"),
    ):
        with pytest.raises(ValueError, match=what):
            info_nce(z, k, queue, 0.1, **arguments)
