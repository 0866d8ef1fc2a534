"""NT-Xent against formulas in float64 written here, its gradient over ranks, and what breaks it."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastmoco.kernels.nt_xent import _columns_operator, _rows_operator, cost, nt_xent

FORMS = ("all", "across", "one-sided")


def draw(n: int, dim: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z_a, other = (torch.randn(n, dim, generator=generator, dtype=torch.float64) for _ in range(2))
    likeness = torch.linspace(0.1, 1, n, dtype=torch.float64)[:, None]  # from strangers to close relatives
    return (3 * z_a).to(dtype), (likeness * z_a + other).to(dtype)


def masked_cross_entropies(z_a: Tensor, z_b: Tensor, temperature: float) -> Tensor:
    """The four blocks of SimCLR's code (objective.py), halved: it adds the means of both views."""
    a, b = F.normalize(z_a, dim=1), F.normalize(z_b, dim=1)
    n, far = len(a), 1e9
    same = torch.eye(n, dtype=a.dtype) * far
    logits_a = torch.cat([a @ b.T / temperature, a @ a.T / temperature - same], 1)
    logits_b = torch.cat([b @ a.T / temperature, b @ b.T / temperature - same], 1)
    target = torch.arange(n)
    return (F.cross_entropy(logits_a, target) + F.cross_entropy(logits_b, target)) / 2


def equation_one(z_a: Tensor, z_b: Tensor, temperature: float) -> Tensor:
    """The paper's sum over i of -log(exp(s_ij) / sum over k != i of exp(s_ik)), row by row."""
    z, n = F.normalize(torch.cat([z_a, z_b]), dim=1), len(z_a)
    s, total = z @ z.T / temperature, 0.0
    for i in range(2 * n):
        j, others = (i + n) % (2 * n), [k for k in range(2 * n) if k != i]
        total = total - (s[i, j] - torch.logsumexp(s[i, others], 0))
    return total / (2 * n)


def across(z_a: Tensor, z_b: Tensor, temperature: float) -> Tensor:
    s, target = F.normalize(z_a, dim=1) @ F.normalize(z_b, dim=1).T / temperature, torch.arange(len(z_a))
    return (F.cross_entropy(s, target) + F.cross_entropy(s.T, target)) / 2


def one_sided(z_a: Tensor, z_b: Tensor, temperature: float) -> Tensor:
    s = F.normalize(z_a, dim=1) @ F.normalize(z_b, dim=1).T / temperature
    return F.cross_entropy(s, torch.arange(len(z_a)))


ORACLES = {"all": masked_cross_entropies, "across": across, "one-sided": one_sided}


def with_gradients(function: Callable[..., Tensor], z_a: Tensor, z_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    z_a, z_b = z_a.detach().requires_grad_(), z_b.detach().requires_grad_()
    loss = function(z_a, z_b)
    return loss.detach(), *torch.autograd.grad(loss, (z_a, z_b))


def assert_equal_in_float64(actual: tuple, expected: tuple) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("temperature", [0.05, 0.5])
@pytest.mark.parametrize(("n", "dim"), [(1, 16), (2, 16), (23, 32), (70, 16)])
@pytest.mark.parametrize("form", FORMS)
def test_the_twin_is_the_formula(form: str, n: int, dim: int, temperature: float) -> None:
    z_a, z_b = draw(n, dim)
    expected = with_gradients(lambda a, b: ORACLES[form](a, b, temperature), z_a, z_b)
    actual = with_gradients(lambda a, b: nt_xent(a, b, temperature, form=form)[0], z_a, z_b)
    assert_equal_in_float64(actual, expected)


def test_both_ways_to_write_it_down_are_one() -> None:
    z_a, z_b = draw(9, 16)
    actual = with_gradients(lambda a, b: nt_xent(a, b, 0.1)[0], z_a, z_b)
    assert_equal_in_float64(actual, with_gradients(lambda a, b: equation_one(a, b, 0.1), z_a, z_b))


def test_a_row_left_among_its_own_keys_is_another_loss() -> None:
    """Control: log Z with the row itself in it."""
    z_a, z_b = draw(9, 16)
    z = F.normalize(torch.cat([z_a, z_b]), dim=1)
    wrong = F.cross_entropy(z @ z.T / 0.1, torch.arange(18).roll(9))
    assert wrong - nt_xent(z_a, z_b, 0.1)[0] > 0.1


@pytest.mark.parametrize("form", FORMS)
def test_ranks_are_counted_without_row_and_positive(form: str) -> None:
    z_a, z_b = draw(11, 16)
    a, b = F.normalize(z_a, dim=1), F.normalize(z_b, dim=1)
    rows, keys, own = {
        "all": (torch.cat([a, b]), torch.cat([a, b]), range(22)),
        "across": (torch.cat([a, b]), None, None),
        "one-sided": (a, b, None),
    }[form]
    expected = []
    for i, row in enumerate(rows):
        among = keys if keys is not None else (b, a)[i // 11]
        scores = among @ row
        partner = (i + 11) % 22 if form == "all" else i % 11
        others = [k for k in range(len(among)) if k != partner and (own is None or k != i)]
        expected.append(int((scores[others] > scores[partner]).sum()))
    assert nt_xent(z_a, z_b, 0.1, form=form)[1].tolist() == expected and sum(expected)


def test_chance_is_the_logarithm_of_all_others() -> None:
    """At a high temperature nothing tells rows apart: ln(2N - 1), and ln(N) from the other view alone."""
    z_a, z_b = draw(50, 16)
    for form, count in (("all", 99), ("across", 50), ("one-sided", 50)):
        assert nt_xent(z_a, z_b, 1e7, form=form)[0].item() == pytest.approx(math.log(count), abs=1e-6)


class Ranks:
    """A batch over `world` ranks in one process; `shuffled`: rows of the second view stand anywhere."""

    def __init__(self, z_a: Tensor, z_b: Tensor, world: int, shuffled: bool, impl: str = "auto") -> None:
        batch, self.impl = len(z_a), impl
        self.world, n = world, batch // world
        order = torch.arange(batch)
        if shuffled:
            order = torch.randperm(batch, generator=torch.Generator().manual_seed(1))
        places = [
            torch.cat([torch.arange(r * n, (r + 1) * n), batch + order[r * n : (r + 1) * n]]) for r in range(world)
        ]
        self.places, self.z = places, torch.cat([z_a, z_b])

    def losses(self, temperature: float, form: str, pulls: bool = True) -> tuple[Tensor, Tensor]:
        """Mean loss, and the gradient [2B, D] that DistributedDataParallel's average would be made of.

        Rounds of gathering are played one after the other: what is not gathered yet is missing once.
        """
        order = torch.argsort(torch.cat(self.places))
        known: list[Tensor] = []
        for rounds in (1, 2, 2):  # what is sent: embeddings; then log Z as well; then both, and both are known
            outgoing: list[list[Tensor]] = [[] for _ in range(rounds)]
            results = [self._one(rank, temperature, form, known, order, outgoing) for rank in range(self.world)]
            known = [torch.cat(parts)[order] for parts in outgoing]
        loss = torch.stack([loss for loss, _ in results]).mean()
        return loss, torch.cat([gradient for _, gradient in results])[order] / self.world

    def _one(self, rank: int, temperature: float, form: str, known: list, order: Tensor, outgoing: list) -> tuple:
        place, calls = self.places[rank], iter(range(2))

        def gather(rows: Tensor) -> Tensor:
            at = next(calls)
            if at < len(outgoing):
                outgoing[at].append(rows)
            return known[at] if at < len(known) else rows.new_ones(len(order), *rows.shape[1:])

        views = [self.z[half].clone().requires_grad_() for half in place.chunk(2)]
        loss, _ = nt_xent(*views, temperature, form=form, gather=gather, rows=place, impl=self.impl)
        return loss.detach(), torch.cat(torch.autograd.grad(loss, views))


@pytest.mark.parametrize("shuffled", [False, True], ids=["in order", "shuffled"])
@pytest.mark.parametrize("world", [1, 2, 4, 8])
@pytest.mark.parametrize("form", FORMS)
def test_ranks_give_what_one_rank_gives(form: str, world: int, shuffled: bool) -> None:
    z_a, z_b = draw(24, 16)
    expected = with_gradients(lambda a, b: ORACLES[form](a, b, 0.1), z_a, z_b)
    loss, gradient = Ranks(z_a, z_b, world, shuffled).losses(0.1, form)
    assert_equal_in_float64((loss, *gradient.chunk(2)), expected)


def test_keys_without_gradient_have_the_right_direction_and_half_the_length() -> None:
    """Control of the test above: what a gather without gradient gives, which a look at the loss would not find."""
    z_a, z_b = draw(24, 16)
    _, *whole = with_gradients(lambda a, b: masked_cross_entropies(a, b, 0.1), z_a, z_b)

    def detached(a: Tensor, b: Tensor) -> Tensor:
        z, keys = F.normalize(torch.cat([a, b]), dim=1), F.normalize(torch.cat([a, b]).detach(), dim=1)
        s = (z @ keys.T / 0.1).masked_fill(torch.eye(48, dtype=torch.bool), -math.inf)
        return F.cross_entropy(s, torch.arange(48).roll(24))

    _, *part = with_gradients(detached, z_a, z_b)
    right, wrong = (torch.cat(each).flatten() for each in (whole, part))
    assert F.cosine_similarity(right, wrong, dim=0) > 0.98
    assert 0.45 < wrong.norm() / right.norm() < 0.55


def test_low_precision_has_gradients_of_its_dtype_and_a_wide_loss() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        z_a, z_b = draw(12, 16, dtype)
        expected = with_gradients(lambda a, b: masked_cross_entropies(a, b, 0.2), z_a.double(), z_b.double())
        actual = with_gradients(lambda a, b: nt_xent(a, b, 0.2)[0], z_a, z_b)
        assert (actual[0].dtype, actual[1].dtype) == (torch.float32, dtype)
        torch.testing.assert_close(actual[0].double(), expected[0], rtol=8 * torch.finfo(dtype).eps, atol=0)


def test_it_scales_with_the_gradient_that_comes_in() -> None:
    z_a, z_b = draw(5, 16)
    once = with_gradients(lambda a, b: nt_xent(a, b, 0.2)[0], z_a, z_b)
    scaled = with_gradients(lambda a, b: nt_xent(a, b, 0.2)[0] * 1024, z_a, z_b)
    for plain, more in zip(once, scaled, strict=True):
        torch.testing.assert_close(more, 1024 * plain, rtol=1e-14, atol=0)


# The kernel, in the interpreter where there is no GPU


EPSILON = {torch.float32: 3e-7, torch.bfloat16: 2**-9, torch.float16: 2**-12}  # one rounding of one number


def in_plain_torch(form: str, z_a: Tensor, z_b: Tensor, temperature: float, dtype: torch.dtype) -> tuple:
    """What autocast would compute: products in `dtype`, the rest in fp32."""
    a, b = z_a.detach().requires_grad_(), z_b.detach().requires_grad_()
    p, q = (F.normalize(z.float(), dim=1).to(dtype) for z in (a, b))
    n, target = len(a), torch.arange(len(a), device=a.device)

    def loss(one: Tensor, other: Tensor) -> Tensor:
        logits = [one @ other.T / temperature]
        if form == "all":
            itself = torch.eye(n, dtype=torch.bool, device=a.device)
            logits.append((one @ one.T / temperature).masked_fill(itself, -math.inf))
        return F.cross_entropy(torch.cat(logits, 1).float(), target)

    total = loss(p, q) if form == "one-sided" else (loss(p, q) + loss(q, p)) / 2
    return total.detach(), *torch.autograd.grad(total, (a, b))


@pytest.mark.parametrize(
    ("n", "dim", "temperature", "dtype"),
    [(n, dim, t, dtype) for n, dim, t in [(1, 16, 0.1), (13, 48, 0.05), (40, 64, 0.1)] for dtype in EPSILON]
    + [(13, 48, 0.02, dtype) for dtype in EPSILON]  # with a running maximum
    + [(20, 128, 0.5, torch.bfloat16)],
)
@pytest.mark.parametrize("form", FORMS)
def test_the_kernel_keeps_within_the_error_budget(
    form: str, n: int, dim: int, temperature: float, dtype: torch.dtype, device: torch.device
) -> None:
    """|truth - ours| <= |truth - plain torch in this dtype| + one rounding of the largest there can be."""
    z_a, z_b = (z.to(device) for z in draw(n, dim, dtype))
    exact = [z.double() for z in (z_a, z_b)]
    truth = with_gradients(lambda a, b: nt_xent(a, b, temperature, form=form, impl="reference")[0], *exact)
    ours = with_gradients(lambda a, b: nt_xent(a, b, temperature, form=form, impl="triton")[0], z_a, z_b)
    plain = in_plain_torch(form, z_a, z_b, temperature, dtype)
    # NumPy, which multiplies for the interpreter, may round each product and each sum, where torch has fused ones.
    roundings = dim**0.5 if dtype == torch.float32 else 1
    bounds = [1 / temperature, *(2 / (temperature * n * z.norm(dim=1)) for z in exact)]
    for actual, expected, other, bound in zip(ours, truth, plain, bounds, strict=True):
        size = torch.as_tensor(bound, dtype=torch.float64).norm()
        budget = (other.double() - expected).norm() + roundings * EPSILON[dtype] * size
        assert (actual.double() - expected).norm() <= budget


@pytest.mark.parametrize("dtype", EPSILON)
@pytest.mark.parametrize("form", FORMS)
def test_ranks_of_the_kernel_are_exact_but_for_ties(form: str, dtype: torch.dtype, device: torch.device) -> None:
    """With the positive among the swept keys, products of two shapes would make it outscore itself."""
    z_a, z_b = (z.to(device) for z in draw(40, 64, dtype))
    rank = nt_xent(z_a, z_b, 0.1, form=form, impl="triton")[1]
    exact = nt_xent(z_a.double(), z_b.double(), 0.1, form=form, impl="reference")[1]
    a, b = F.normalize(z_a.double(), dim=1), F.normalize(z_b.double(), dim=1)
    queries, keys = {"all": (torch.cat([a, b]), torch.cat([a, b])), "one-sided": (a, b)}.get(form, (None, None))
    if form == "across":
        scores = torch.cat([a @ b.T, b @ a.T])
    else:
        scores = queries @ keys.T
    positive = (a * b).sum(1).repeat(1 if form == "one-sided" else 2)
    ties = ((scores - positive[:, None]).abs() < 4 * EPSILON[dtype]).sum(1)
    assert ((rank - exact).abs() <= ties).all() and rank.any()
    # Of rows of 64 entries of +-1 every product and partial sum is exact, in any order: the interpreter's products
    # are NumPy's, whose BLAS may round equal columns differently.
    signs = torch.randint(0, 2, (1, 64), generator=torch.Generator().manual_seed(0)) * 2 - 1
    same = signs.to(dtype=dtype, device=device).repeat(20, 1)
    assert not nt_xent(same, same, 0.1, form=form, impl="triton")[1].any()


def test_the_kernel_is_one_run_over_ranks_too(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32, four ranks, shuffled, against the formula in float64."""
    z_a, z_b = draw(24, 16)
    expected = with_gradients(lambda a, b: ORACLES["all"](a, b, 0.1), z_a, z_b)
    ranks = Ranks(z_a.float().to(device), z_b.float().to(device), 4, True, impl="triton")
    loss, gradient = ranks.losses(0.1, "all")
    torch.testing.assert_close(loss.double().cpu(), expected[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient.double().cpu(), torch.cat(expected[1:]), rtol=1e-4, atol=1e-7)


def test_two_runs_of_the_kernel_give_the_same_bits(device: torch.device) -> None:
    z_a, z_b = (z.to(device) for z in draw(40, 64, torch.bfloat16))
    first, again = (with_gradients(lambda a, b: nt_xent(a, b, 0.1, impl="triton")[0], z_a, z_b) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))


def test_the_operators_keep_their_contract(device: torch.device) -> None:
    z = torch.cat(draw(6, 16, torch.float32)).to(device)
    keys, log_z = z / 4, torch.full((12,), 20.0, device=device)
    scale = 1 / keys.norm(dim=1)
    exclusions = torch.stack([torch.arange(12), torch.arange(12).roll(6)]).to(device, torch.int32)
    torch.library.opcheck(_rows_operator, (z, keys.roll(6, 0), keys, scale, exclusions, 0.1))
    given = (z, keys.roll(6, 0), keys, scale, exclusions, log_z, log_z / 40, 0.1)
    torch.library.opcheck(_columns_operator, given)


def test_it_traces_whole(device: torch.device) -> None:
    z_a, z_b = (z.to(device).requires_grad_() for z in draw(6, 16, torch.float32))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(a: Tensor, b: Tensor) -> Tensor:
        return nt_xent(a * 2, b, 0.1, impl="triton")[0]

    loss = step(z_a, z_b)
    eager = nt_xent(z_a * 2, z_b, 0.1, impl="triton")[0]
    assert torch.equal(loss, eager)
    for one, other in zip(torch.autograd.grad(loss, (z_a, z_b)), torch.autograd.grad(eager, (z_a, z_b)), strict=True):
        torch.testing.assert_close(one, other)


def test_cost_counts_the_bytes_of_the_tensors() -> None:
    """Of one rank among two: its rows and their gradient, all keys and their normalisers, losses and ranks."""
    rows, keys, dtype = torch.empty(12, 48), torch.empty(24, 48), torch.bfloat16
    bytes_moved, flops = cost(6, 12, 48, dtype)
    assert bytes_moved == 2 * rows.to(dtype).nbytes + keys.to(dtype).nbytes + 12 * 8 + 24 * 8
    assert flops == 2 * 2 * (2 * 12 * 24 * 48)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"z_b": torch.ones(3, 16)}, r"needs z_a and z_b \[N, D\]"),
        ({"z_a": torch.ones(0, 16), "z_b": torch.ones(0, 16)}, "N at least 1"),
        ({"z_b": torch.ones(4, 16).bfloat16()}, "use both alike"),
        ({"z_a": torch.ones(4, 16).int(), "z_b": torch.ones(4, 16).int()}, "must be fp32, bf16, fp16"),
        ({"z_a": torch.ones(4, 20), "z_b": torch.ones(4, 20)}, "D must be a multiple of 16"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"form": "both"}, "form is 'both': use all, across, one-sided"),
        ({"rows": torch.arange(4)}, r"rows must be int64 \[8\]"),
    ],
)
def test_refuses(change: dict, what: str) -> None:
    arguments = {"z_a": torch.ones(4, 16), "z_b": torch.ones(4, 16), "temperature": 0.1} | change
    with pytest.raises(ValueError, match=what):
        nt_xent(arguments.pop("z_a"), arguments.pop("z_b"), arguments.pop("temperature"), **arguments)
