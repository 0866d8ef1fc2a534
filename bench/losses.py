"""Contrastive losses as others compute them, with their gradients: what ours are timed and weighed beside."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmoco.kernels.nt_xent import Form, nt_xent

HAS_INF_CL = importlib.util.find_spec("inf_cl") is not None
PAIRS = {"cpu": (256, 1024), "cuda": (256, 1024, 4096, 16384, 65536)}
"""Batches that NT-Xent is measured at. Eager logits of the largest take 69 GB in fp32, and so often fail."""
TIMED_FORMS: tuple[Form, ...] = ("all", "across")
"""SimCLR's, and the one that inf-cl has, too."""


def published_forward(z: Tensor, k: Tensor, queue: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Mean loss [] and the five best columns [N, 5] of MoCo's published code, for z [N, D], k [N, D], queue [K, D]."""
    q = F.normalize(z, dim=1)
    positive = torch.einsum("nc,nc->n", q, k).unsqueeze(-1)
    logits = torch.cat([positive, q @ queue.clone().T], dim=1) / temperature
    labels = torch.zeros(logits.shape[0], dtype=torch.long, device=logits.device)
    return F.cross_entropy(logits, labels), logits.topk(5, 1).indices


def published_loss(
    z: Tensor, k: Tensor, queue: Tensor, temperature: float, forward: Callable = published_forward
) -> Tensor:
    """Gradient of the published loss with respect to z [N, D]: logits materialised against a copy of the queue."""
    return torch.autograd.grad(forward(z, k, queue, temperature)[0], z)[0]


def split_attention(z: Tensor, k: Tensor, queue: Tensor, temperature: float, splits: int = 64) -> Tensor:
    """Gradient of the summed loss by attention with V = K over pieces of the queue: one pass without a kernel."""
    q = F.normalize(z.float(), dim=1)
    pieces = queue.view(1, splits, -1, queue.shape[1])
    heads = q.to(queue.dtype).expand(1, splits, *q.shape)
    attend = torch.ops.aten._scaled_dot_product_flash_attention
    out, lse, *_ = attend(heads, pieces, pieces, 0.0, False, scale=1 / temperature)
    return merged(z, k, temperature, out[0], lse[0])


def merged(z: Tensor, k: Tensor, temperature: float, out: Tensor, lse: Tensor) -> Tensor:
    """Gradient of the summed loss, from attention to each piece of the queue: `out` [P, N, D] and `lse` [P, N]."""
    q = F.normalize(z.detach().float(), dim=1)
    positive = (q * k).sum(1) / temperature
    total = torch.logsumexp(torch.cat([lse.T, positive[:, None]], 1), 1)
    mean = (torch.exp(lse - total)[..., None] * out).sum(0) + torch.exp(positive - total)[:, None] * k
    gradient = (mean - k) / temperature
    gradient = gradient - (gradient * q).sum(1, keepdim=True) * q
    return gradient / z.detach().float().norm(dim=1, keepdim=True)


def plain_nt_xent(z_a: Tensor, z_b: Tensor, temperature: float, form: Form = "all") -> Tensor:
    """Mean loss [] of raw projections [N, D] of two views, logits materialised, as SimCLR's code has it.

    "all": each view among all others, its own column masked. "across": among the other view's, in both directions.
    """
    z = F.normalize(torch.cat([z_a, z_b]), dim=1)
    if form == "all":
        logits = (z @ z.T / temperature).float().fill_diagonal_(-torch.inf)
        return F.cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(z_a)))
    a, b = z.chunk(2)
    logits = (a @ b.T / temperature).float()
    places = torch.arange(len(a), device=a.device)
    return (F.cross_entropy(logits, places) + F.cross_entropy(logits.T, places)) / 2


def inf_cl_loss(z_a: Tensor, z_b: Tensor, temperature: float) -> Tensor:
    """The form "across" by the package inf-cl (Cheng et al., 2024, arXiv:2410.17243): Triton kernels, in fp32.

    D must be a power of two from 16 to 256.
    """
    from inf_cl import cal_flash_loss

    a, b = (F.normalize(z, dim=1) for z in (z_a, z_b))
    sides = ((a, b), (b, a))
    return sum(cal_flash_loss(q, k, scale=1 / temperature, head_dim=q.shape[1]).mean() for q, k in sides) / 2


def ways_to_nt_xent(z: Sequence[Tensor], temperature: float, form: Form) -> dict[str, Callable[[], object]]:
    """Calls that give the gradients of both views `z` [N, D]: ours, and those of others that run on their device.

    "inf-cl" is among them on a GPU, for the form "across", where that package is installed.
    """

    def gradients(loss: Callable[..., Tensor]) -> object:
        return torch.autograd.grad(loss(*z, temperature), tuple(z))

    plain = functools.partial(plain_nt_xent, form=form)
    losses: dict[str, Callable[..., Tensor]] = {
        "fastmoco": lambda *given: nt_xent(*given, form=form)[0],
        "eager": plain,
    }
    if z[0].device.type == "cuda":
        losses["torch.compile"] = torch.compile(plain)
        if HAS_INF_CL and form == "across":
            losses["inf-cl"] = inf_cl_loss
    return {name: functools.partial(gradients, loss) for name, loss in losses.items()}
