"""NT-Xent against formulas in float64 written here, its gradient over ranks, and what breaks it."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastmoco.kernels.nt_xent import nt_xent

FORMS = ("all", "across", "one-sided")


def drawn(n: int, dim: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
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


def assert_equal_in_float64(found: tuple, expected: tuple) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("temperature", [0.05, 0.5])
@pytest.mark.parametrize(("n", "dim"), [(1, 16), (2, 16), (23, 32), (70, 16)])
@pytest.mark.parametrize("form", FORMS)
def test_the_twin_is_the_formula(form: str, n: int, dim: int, temperature: float) -> None:
    z_a, z_b = drawn(n, dim)
    expected = with_gradients(lambda a, b: ORACLES[form](a, b, temperature), z_a, z_b)
    found = with_gradients(lambda a, b: nt_xent(a, b, temperature, form=form)[0], z_a, z_b)
    assert_equal_in_float64(found, expected)


def test_both_ways_to_write_it_down_are_one() -> None:
    z_a, z_b = drawn(9, 16)
    found = with_gradients(lambda a, b: nt_xent(a, b, 0.1)[0], z_a, z_b)
    assert_equal_in_float64(found, with_gradients(lambda a, b: equation_one(a, b, 0.1), z_a, z_b))


def test_a_row_left_among_its_own_keys_is_another_loss() -> None:
    """Control: log Z with the row itself in it."""
    z_a, z_b = drawn(9, 16)
    z = F.normalize(torch.cat([z_a, z_b]), dim=1)
    wrong = F.cross_entropy(z @ z.T / 0.1, torch.arange(18).roll(9))
    assert wrong - nt_xent(z_a, z_b, 0.1)[0] > 0.1


@pytest.mark.parametrize("form", FORMS)
def test_ranks_are_counted_without_row_and_positive(form: str) -> None:
    z_a, z_b = drawn(11, 16)
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
    z_a, z_b = drawn(50, 16)
    for form, count in (("all", 99), ("across", 50), ("one-sided", 50)):
        assert nt_xent(z_a, z_b, 1e7, form=form)[0].item() == pytest.approx(math.log(count), abs=1e-6)


class Ranks:
    """A batch over `world` ranks in one process; `shuffled`: rows of the second view stand anywhere."""

    def __init__(self, z_a: Tensor, z_b: Tensor, world: int, shuffled: bool) -> None:
        batch = len(z_a)
        self.world, n = world, batch // world
        order = torch.randperm(batch, generator=torch.Generator().manual_seed(1)) if shuffled else torch.arange(batch)
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
            sent: list[list[Tensor]] = [[] for _ in range(rounds)]
            results = [self._one(rank, temperature, form, known, order, sent) for rank in range(self.world)]
            known = [torch.cat(parts)[order] for parts in sent]
        loss = torch.stack([loss for loss, _ in results]).mean()
        return loss, torch.cat([gradient for _, gradient in results])[order] / self.world

    def _one(self, rank: int, temperature: float, form: str, known: list, order: Tensor, sent: list) -> tuple:
        place, calls = self.places[rank], iter(range(2))

        def gather(rows: Tensor) -> Tensor:
            at = next(calls)
            if at < len(sent):
                sent[at].append(rows)
            return known[at] if at < len(known) else rows.new_ones(len(order), *rows.shape[1:])

        views = [self.z[half].clone().requires_grad_() for half in place.chunk(2)]
        loss, _ = nt_xent(*views, temperature, form=form, gather=gather, rows=place)
        return loss.detach(), torch.cat(torch.autograd.grad(loss, views))


@pytest.mark.parametrize("shuffled", [False, True], ids=["in order", "shuffled"])
@pytest.mark.parametrize("world", [1, 2, 4, 8])
@pytest.mark.parametrize("form", FORMS)
def test_ranks_give_what_one_rank_gives(form: str, world: int, shuffled: bool) -> None:
    z_a, z_b = drawn(24, 16)
    expected = with_gradients(lambda a, b: ORACLES[form](a, b, 0.1), z_a, z_b)
    loss, gradient = Ranks(z_a, z_b, world, shuffled).losses(0.1, form)
    assert_equal_in_float64((loss, *gradient.chunk(2)), expected)


def test_keys_without_gradient_have_the_right_direction_and_half_the_length() -> None:
    """Control of the test above: what a gather without gradient gives, which a look at the loss would not find."""
    z_a, z_b = drawn(24, 16)
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
        z_a, z_b = drawn(12, 16, dtype)
        expected = with_gradients(lambda a, b: masked_cross_entropies(a, b, 0.2), z_a.double(), z_b.double())
        found = with_gradients(lambda a, b: nt_xent(a, b, 0.2)[0], z_a, z_b)
        assert (found[0].dtype, found[1].dtype) == (torch.float32, dtype)
        torch.testing.assert_close(found[0].double(), expected[0], rtol=8 * torch.finfo(dtype).eps, atol=0)


def test_it_scales_with_the_gradient_that_comes_in() -> None:
    z_a, z_b = drawn(5, 16)
    once = with_gradients(lambda a, b: nt_xent(a, b, 0.2)[0], z_a, z_b)
    scaled = with_gradients(lambda a, b: nt_xent(a, b, 0.2)[0] * 1024, z_a, z_b)
    for plain, more in zip(once, scaled, strict=True):
        torch.testing.assert_close(more, 1024 * plain, rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"z_b": torch.ones(3, 16)}, r"needs z_a and z_b \[N, D\]"),
        ({"z_a": torch.ones(0, 16), "z_b": torch.ones(0, 16)}, "N at least 1"),
        ({"z_b": torch.ones(4, 16).bfloat16()}, "both the same"),
        ({"z_a": torch.ones(4, 16).int(), "z_b": torch.ones(4, 16).int()}, "fp32, fp16 or bf16"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"form": "both"}, "form is 'both': use all, across, one-sided"),
        ({"rows": torch.arange(4)}, r"rows must be int64 \[8\]"),
    ],
)
def test_refuses(change: dict, what: str) -> None:
    given = {"z_a": torch.ones(4, 16), "z_b": torch.ones(4, 16), "temperature": 0.1} | change
    with pytest.raises(ValueError, match=what):
        nt_xent(given.pop("z_a"), given.pop("z_b"), given.pop("temperature"), **given)
