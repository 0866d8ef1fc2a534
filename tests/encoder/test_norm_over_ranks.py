"""Batch norm over ranks against one rank that holds the whole batch: forward, backward, running statistics."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastmoco.encoder import BatchNormAct
from fastmoco.encoder.norm_over_ranks import batch_norm_over_ranks
from fastmoco.parallel import Parallel


def draw(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    x = x * torch.linspace(0.5, 2, shape[0]).view(-1, *[1] * (len(shape) - 1)) + torch.arange(shape[0]).view(
        -1, *[1] * (len(shape) - 1)
    )  # ranks with unlike means and variances
    weight, bias = (torch.randn(shape[1], generator=generator, dtype=torch.float64) for _ in range(2))
    return [x.to(dtype), weight, bias, grad.to(dtype)]


def on_a_rank(parallel: Parallel, shape: tuple[int, ...], local: bool = False) -> list[Tensor]:
    """Results of this rank's rows; `local`: each rank takes statistics of its own, as a control."""
    x, weight, bias, grad = draw(shape)
    n = shape[0] // parallel.world
    mine = slice(parallel.rank * n, (parallel.rank + 1) * n)
    leaves = [x[mine].clone().requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    running = (torch.zeros(shape[1], dtype=torch.float64), torch.ones(shape[1], dtype=torch.float64))
    gather = (lambda rows: rows) if local else parallel.all_gather
    y = batch_norm_over_ranks(*leaves, running, gather)
    grads = torch.autograd.grad(y, leaves, grad[mine])
    return [y.detach(), *grads, *running]


def whole(shape: tuple[int, ...]) -> list[Tensor]:
    """torch's batch norm of the whole batch."""
    x, weight, bias, grad = draw(shape)
    leaves = [x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    running = (torch.zeros(shape[1], dtype=torch.float64), torch.ones(shape[1], dtype=torch.float64))
    y = F.batch_norm(x, *running, weight, bias, True, 0.1, 1e-5)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad), *running]


def join(ranks: list[list[Tensor]]) -> list[Tensor]:
    y, grad_x, grad_weight, grad_bias, *running = zip(*ranks, strict=True)
    return [torch.cat(y), torch.cat(grad_x), sum(grad_weight), sum(grad_bias), *(each[0] for each in running)]


@pytest.mark.parametrize("shape", [(8, 5), (8, 3, 4, 6)], ids=["head", "images"])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_are_one_batch(world: int, shape: tuple[int, ...], run_ranks: Callable) -> None:
    ranks = run_ranks(world, on_a_rank, shape) if world > 1 else [on_a_rank(Parallel(), shape)]
    for actual, expected in zip(join(ranks), whole(shape), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)
    for result in ranks[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result[4:], ranks[0][4:], strict=True))


def test_statistics_of_each_rank_are_another_norm(run_ranks: Callable) -> None:
    """Control: all of it is wrong but the gradient of the shift."""
    actual, expected = join(run_ranks(2, on_a_rank, (8, 5), True)), whole((8, 5))
    wrong = [not torch.allclose(a, b, rtol=1e-3) for a, b in zip(actual, expected, strict=True)]
    assert wrong == [True, True, True, False, True, True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_errs_by_its_rounding(dtype: torch.dtype) -> None:
    x, weight, bias, grad = draw((16, 3, 4, 4), dtype)
    norms = [BatchNormAct(3, relu=True) for _ in range(2)]
    results = []
    for norm in norms:
        norm.weight.data, norm.bias.data = weight.float(), bias.float()
        norm.running_mean.zero_(), norm.running_var.fill_(1)
        leaf = x.clone(memory_format=torch.channels_last).requires_grad_()
        norm.gather = (lambda rows: rows) if norm is norms[1] else None
        y = norm(leaf, leaf * 0.5)
        assert y.dtype == dtype
        results.append([y.detach(), *torch.autograd.grad(y, (leaf, norm.weight, norm.bias), grad)])
    for one, other in zip(*results, strict=True):
        scale = one.double().abs().max().item()
        assert (one.double() - other.double()).abs().max().item() <= 8 * torch.finfo(dtype).eps * scale


def uneven() -> Tensor:
    x = torch.randn(8, 5, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return x * torch.arange(1, 9)[:, None, None, None]  # the halves have other statistics


def pooled_on_a_rank(parallel: Parallel, local: bool) -> list[Tensor]:
    norm = BatchNormAct(5).double()
    norm.reset()
    norm.gather = (lambda rows: rows) if local else parallel.all_gather
    y, _ = norm.pooled(uneven()[4 * parallel.rank :][:4].contiguous(memory_format=torch.channels_last))
    return [y.detach(), norm.running_mean, norm.running_var]


@pytest.mark.parametrize("local", [False, True])
def test_the_norm_that_pools_shares_its_statistics_too(run_ranks: Callable, local: bool) -> None:
    """The stem's norm over two ranks is that of one batch; with statistics of its own, the control, it is not."""
    found = run_ranks(2, pooled_on_a_rank, local)
    running = [torch.zeros(5, dtype=torch.float64), torch.ones(5, dtype=torch.float64)]
    expected = F.max_pool2d(F.relu(F.batch_norm(uneven(), *running, None, None, True, 0.1, 1e-5)), 3, 2, 1)
    same = [torch.allclose(torch.cat([found[0][0], found[1][0]]), expected, rtol=0, atol=1e-12)]
    same += [torch.allclose(each[1 + i], running[i], rtol=0, atol=1e-12) for each in found for i in range(2)]
    assert not any(same) if local else all(same)
