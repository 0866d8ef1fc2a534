"""NT-Xent over two views of a batch and its whole gradient, without an N x N array or a differentiable gather.

With unit rows z_i of both views (2B over all ranks), scores s_ij = z_i z_j / T, and Z_i = sum over j != i of exp(s_ij),

    loss_i     = log Z_i - s_i,pos(i)
    dloss/dz_i = ( sum_j exp(s_ij) / Z_i z_j - z_pos(i)     how row i pulls at itself
                 + sum_j exp(s_ij) / Z_j z_j - z_pos(i) )   how all other rows pull at it, since s_ij = s_ji
                 / (M T)

for the mean over a rank's M rows, where DistributedDataParallel averages over ranks. The second line needs one number
of each other row, log Z_j. So a rank gathers embeddings, sweeps over them, gathers log Z and sweeps once more, and what
a row gets comes about where it was encoded: no gradient travels, nothing is added atomically, and one rank and eight
give the same numbers. Gathering without gradient, a frequent fault, would leave out the second line: the direction is
nearly right (cosine 0.99) and the length is half.

Two other forms leave keys out: "across" tells each view from the other view alone, and "one-sided" has loss rows of the
first view only, the end-to-end mechanism of He et al., 2020.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmoco.kernels import reference

Form = Literal["all", "across", "one-sided"]
Gather = Callable[[Tensor], Tensor]
FORMS: tuple[Form, ...] = ("all", "across", "one-sided")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def nt_xent(
    z_a: Tensor,
    z_b: Tensor,
    temperature: float,
    *,
    form: Form = "all",
    gather: Gather | None = None,
    rows: Tensor | None = None,
    impl: Literal["auto", "triton", "reference"] = "auto",
) -> tuple[Tensor, Tensor]:
    """Mean loss of this rank's rows, and for each row how many keys score above its positive.

    `z_a`, `z_b`: raw projections [N, D] of two views, normalised here; fp32, fp16 or bf16, which is also the dtype of
    the products; the twin takes fp64 too. Over several ranks `gather` makes of rows [2N, ...] of this rank, first those
    of `z_a`, the rows of all ranks [2B, ...], the same on each, such that rows i and B + i are the views of one sample;
    `rows` int64 [2N] says where this rank's own stand there, in any order. Left out, there is one rank, and row i of
    one view belongs to row i of the other.

    Returns (loss fp32 [], rank int32 [2N]; [N] where the form is "one-sided"). The loss is the mean over rows, as in
    the paper; SimCLR's code adds the means of both views. Top-k accuracy is (rank < k). Differentiable in both views,
    once, for a mean over ranks as DistributedDataParallel takes it.
    Raises ValueError for anything else. After Chen et al., "A Simple Framework for Contrastive Learning of Visual
    Representations", 2020, algorithm 1.
    """
    _check(z_a, z_b, temperature, form, rows)
    z = torch.cat([z_a, z_b])
    with torch.no_grad():
        loss, rank, gradient = _loss_and_gradient(z.detach(), temperature, form, gather or _alone, rows)
    return _Known.apply(loss, z, gradient), rank


class _Known(torch.autograd.Function):
    """A loss [] whose gradient with respect to z [N, D] is known already."""

    @staticmethod
    def forward(ctx, loss: Tensor, z: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.dtype = z.dtype
        return loss.view_as(loss)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss: Tensor) -> tuple[None, Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return None, (gradient * grad_loss).to(ctx.dtype), None


def _alone(rows: Tensor) -> Tensor:
    return rows


def _loss_and_gradient(
    z: Tensor, temperature: float, form: Form, gather: Gather, rows: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    keys = gather(F.normalize(z.to(_wide(z)), dim=1).to(z.dtype))
    place = torch.arange(len(z), device=z.device) if rows is None else rows
    against, pulled_by = _sides(form, len(z) // 2, len(keys) // 2)
    gradient, log_z = torch.zeros_like(z, dtype=_wide(z)), z.new_zeros(len(z), dtype=_wide(z))

    losses, ranks = [], []
    for mine, others in against:
        columns = _columns(place[mine], len(keys), form)
        loss, rank, log_z[mine], gradient[mine] = reference.nt_xent_rows(z[mine], keys[others], *columns, temperature)
        losses.append(loss)
        ranks.append(rank)
    all_log_z = gather(log_z)
    for mine, others in pulled_by:
        columns = _columns(place[mine], len(keys), form)
        gradient[mine] += reference.nt_xent_columns(z[mine], keys[others], all_log_z[others], *columns, temperature)
    loss = torch.cat(losses)
    return loss.mean(), torch.cat(ranks), gradient / len(loss)


def _sides(form: Form, n: int, batch: int) -> tuple[list[tuple[slice, slice]], list[tuple[slice, slice]]]:
    # (rows here, keys) of the loss, and of what rows elsewhere pull at: views of 2N rows and of 2B keys.
    everything = slice(None), slice(None)
    a_to_b, b_to_a = (slice(None, n), slice(batch, None)), (slice(n, None), slice(None, batch))
    return {
        "all": ([everything], [everything]),
        "across": ([a_to_b, b_to_a], [a_to_b, b_to_a]),
        "one-sided": ([a_to_b], [b_to_a]),
    }[form]


def _columns(place: Tensor, keys: int, form: Form) -> tuple[Tensor | None, Tensor]:
    # Columns of the row itself, among keys of both views, and of its positive.
    batch = keys // 2
    return (place, (place + batch) % keys) if form == "all" else (None, place % batch)


def _wide(z: Tensor) -> torch.dtype:
    return torch.promote_types(z.dtype, torch.float32)


def _check(z_a: Tensor, z_b: Tensor, temperature: float, form: str, rows: Tensor | None) -> None:
    if z_a.dim() != 2 or z_a.shape != z_b.shape or not len(z_a):
        raise ValueError(f"nt_xent: needs z_a and z_b [N, D], N at least 1; got {tuple(z_a.shape)}, {tuple(z_b.shape)}")
    if z_a.dtype not in (*DTYPES, torch.float64) or z_b.dtype != z_a.dtype or z_b.device != z_a.device:
        found = f"{z_a.dtype} on {z_a.device}, {z_b.dtype} on {z_b.device}"
        raise ValueError(
            f"nt_xent: z_a and z_b must be fp32, fp16 or bf16, both the same and on one device; got {found}"
        )
    if not temperature > 0:
        raise ValueError(f"nt_xent: temperature must be positive, not {temperature}")
    if form not in FORMS:
        raise ValueError(f"nt_xent: form is {form!r}: use {', '.join(FORMS)}")
    if rows is not None and (rows.shape != (2 * len(z_a),) or rows.dtype != torch.int64 or rows.device != z_a.device):
        raise ValueError(
            f"nt_xent: rows must be int64 [{2 * len(z_a)}] on {z_a.device}, not {rows.dtype} {tuple(rows.shape)}"
        )
