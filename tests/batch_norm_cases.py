"""Cases of batch norm, the same by torch group by group, and the budget of errors that ours must keep."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmoco.kernels.batch_norm import Norm, batch_norm_act, batch_norm_act_twice

EPS = 1e-5


class Case(NamedTuple):
    """The inputs of one call; `side` is the residual's batch norm (dual form)."""

    x: Tensor
    main: Norm
    residual: Tensor | None
    side: Norm | None
    grad: Tensor


def channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t


def make_case(shape: tuple[int, ...], form: str, dtype: torch.dtype, device: torch.device, mean: float = 0.7) -> Case:
    generator = torch.Generator().manual_seed(sum(shape))

    def activation() -> Tensor:
        return channels_last((torch.randn(shape, generator=generator) + mean).to(device, dtype))

    def vector() -> Tensor:
        return (torch.rand(shape[1], generator=generator) + 0.5).to(device)

    def norm() -> Norm:
        return Norm(vector(), vector() - 1, (vector(), vector()))

    return Case(
        activation(),
        norm(),
        activation() if form != "none" else None,
        norm() if form == "dual" else None,
        activation() - mean,
    )


def to(case: Case, dtype: torch.dtype, vectors: torch.dtype) -> Case:
    def norm(n: Norm | None) -> Norm | None:
        return n and Norm(n.weight.to(vectors), n.bias.to(vectors), tuple(r.to(vectors).clone() for r in n.running))

    residual = None if case.residual is None else case.residual.to(dtype)
    return Case(case.x.to(dtype), norm(case.main), residual, norm(case.side), case.grad.to(dtype))


def by_torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running: tuple[Tensor, Tensor],
    groups: int = 1,
    *,
    residual: Tensor | None = None,
    residual_norm: Norm | None = None,
    relu: bool = True,
    training: bool = True,
) -> Tensor:
    """One F.batch_norm a group; the running statistics are the mean over groups of what torch makes of them."""

    def normalise(t: Tensor, weight: Tensor, bias: Tensor, running: tuple[Tensor, Tensor]) -> Tensor:
        each = [tuple(r.clone() for r in running) for _ in range(groups)]
        parts = [F.batch_norm(part, *r, weight, bias, training, 0.1, EPS) for part, r in zip(t.chunk(groups), each)]
        for target, values in zip(running, zip(*each)):
            target.copy_(torch.stack(values).mean(0))
        return torch.cat(parts)

    y = normalise(x, weight, bias, running)
    if residual is not None:
        y = y + (normalise(residual, *residual_norm) if residual_norm is not None else residual)
    return y.relu() if relu else y


def results(
    function: Callable[..., Tensor | tuple[Tensor, Tensor]],
    case: Case,
    groups: int,
    second: Tensor | None = None,
    **options: object,
) -> dict[str, Tensor]:
    """Output, running statistics and every gradient of one call on copies of the case's tensors.

    Of a function that gives its output twice, the second has a gradient of its own.
    """
    leaves = {"x": case.x, "weight": case.main.weight, "bias": case.main.bias}
    if case.residual is not None:
        leaves["residual"] = case.residual
    if case.side is not None:
        leaves.update(residual_weight=case.side.weight, residual_bias=case.side.bias)
    leaves = {name: t.detach().clone().requires_grad_() for name, t in leaves.items()}
    running = [tuple(r.clone() for r in n.running) for n in (case.main, case.side) if n is not None]
    side = Norm(leaves["residual_weight"], leaves["residual_bias"], running[1]) if case.side is not None else None
    y = function(
        leaves["x"],
        leaves["weight"],
        leaves["bias"],
        running[0],
        groups,
        residual=leaves.get("residual"),
        residual_norm=side,
        **options,
    )
    grads = case.grad if second is None else [case.grad, second.to(case.grad.dtype)]
    grads_by_name = dict(zip((f"d_{name}" for name in leaves), torch.autograd.grad(y, list(leaves.values()), grads)))
    grads_by_name["y"] = (y if second is None else y[1]).detach()
    for i, (mean, var) in enumerate(running):
        grads_by_name.update({f"mean_{i}": mean, f"var_{i}": var})
    return grads_by_name


def largest_terms(case: Case, groups: int, truth: dict[str, Tensor], training: bool = True) -> dict[str, Tensor]:
    """Where results are sums or differences, they round as their largest term does; sums, as that of absolute terms."""
    terms = {}
    for t, norm, suffix, name in ((case.x, case.main, "", "x"), (case.residual, case.side, "residual_", "residual")):
        if norm is None:
            continue
        rows, grad = (v.double().unflatten(0, (groups, -1)).transpose(1, 2).flatten(2) for v in (t, case.grad))
        mean, var = (rows.mean(2), rows.var(2, correction=0)) if training else (r[None] for r in norm.running)
        invstd = (var + EPS).rsqrt()
        hat = (rows - mean[..., None]) * invstd[..., None]
        factor = norm.weight.abs() * invstd
        slope = truth[f"d_{suffix}weight"].abs() * groups / hat[:, 0].numel() * invstd
        terms[f"d_{suffix}weight"] = (grad * hat).abs().sum((0, 2)).max()
        terms[f"d_{suffix}bias"] = grad.abs().sum((0, 2)).max()
        through_x, through_moments = grad.abs().amax(2) * factor, rows.abs().amax(2) * slope * factor
        terms[f"d_{name}"] = torch.maximum(through_x.max(), through_moments.max())
        terms["y"] = torch.maximum((rows.abs().amax(2) * factor).max(), terms.get("y", rows.new_zeros(())))
    return terms


def assert_within_budget(
    ours: dict[str, Tensor], torchs: dict[str, Tensor], truth: dict[str, Tensor], terms: dict[str, Tensor]
) -> None:
    """error(ours) <= error(torch at the same precision) + one rounding of the result, or four fp32 ones of a term."""
    for name, exact in truth.items():
        epsilon = torch.finfo(ours[name].dtype).eps * exact.abs().max()
        if name in terms:
            epsilon = torch.maximum(epsilon, 2 * torch.finfo(torch.float32).eps * terms[name])
        error, budget = ((t[name].double() - exact).abs().max() for t in (ours, torchs))
        assert error <= budget + epsilon, f"{name}: {error:.3e} > {budget:.3e} + {epsilon:.3e}"


def check(case: Case, groups: int, impl: str, **options: object) -> None:
    truth = results(by_torch, to(case, torch.float64, torch.float64), groups, **options)
    torchs = results(by_torch, case, groups, **options)
    terms = largest_terms(case, groups, truth, options.get("training", True))
    assert_within_budget(results(batch_norm_act, case, groups, impl=impl, **options), torchs, truth, terms)


def by_torch_twice(*arguments: object, **options: object) -> tuple[Tensor, Tensor]:
    """Autograd adds the gradients of the two readers."""
    y = by_torch(*arguments, **options)
    return y.view_as(y), y.view_as(y)


def check_twice(case: Case, groups: int, impl: str, **options: object) -> None:
    second = case.grad.roll(1, 0) * 0.7
    truth = results(by_torch_twice, to(case, torch.float64, torch.float64), groups, second, **options)
    torchs = results(by_torch_twice, case, groups, second, **options)
    terms = largest_terms(case._replace(grad=case.grad + second), groups, truth, options.get("training", True))
    ours = results(batch_norm_act_twice, case, groups, second, impl=impl, **options)
    assert_within_budget(ours, torchs, truth, terms)
