"""NT-Xent over two views of a batch and its whole gradient, without an N x N array or a differentiable gather.

With unit rows z_i of both views (2B over all ranks), scores s_ij = z_i z_j / T, and Z_i = sum over j != i of exp(s_ij),

    loss_i     = log Z_i - s_i,pos(i)
    dloss/dz_i = ( sum_j exp(s_ij) / Z_i z_j - z_pos(i)     how row i pulls at itself
                 + sum_j exp(s_ij) / Z_j z_j - z_pos(i) )   how all other rows pull at it, since s_ij = s_ji
                 / (M T)

for the mean over a rank's M rows, where DistributedDataParallel averages over ranks. The second line needs two numbers
of each other row: log Z_j, and how much of Z_j its negatives have, which is what exp(s_ij) / Z_j lacks to 1 where i is
its positive. So a rank gathers embeddings, sweeps over them, gathers these numbers and sweeps once more, and what
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
from torch import Tensor

from fastmoco.kernels import reference
from fastmoco.kernels.dispatch import Impl, check_dtype, is_traced, takes_kernel
from fastmoco.kernels.info_nce import (
    combine_variants_of_a_batch,
    launch,
    launch_columns,
    sweep_variant_of_a_batch,
)
from fastmoco.kernels.tiles import Variant

__all__ = ["Form", "cost", "nt_xent", "variants"]

Form = Literal["all", "across", "one-sided"]
Gather = Callable[[Tensor], Tensor]
FORMS: tuple[Form, ...] = ("all", "across", "one-sided")


def _rows(
    z: Tensor, k: Tensor, keys: Tensor, scale: Tensor, exclusions: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    normaliser = z.new_empty(len(z), 2, dtype=torch.float32)
    given = {"exclusions": exclusions, "normaliser": normaliser, "key_scale": scale}
    loss, rank, gradient = launch(z, k, keys, temperature, **given)
    return loss, rank, normaliser, gradient


def _columns(
    z: Tensor,
    k: Tensor,
    keys: Tensor,
    scale: Tensor,
    exclusions: Tensor,
    log_z: Tensor,
    share: Tensor,
    temperature: float,
) -> Tensor:
    return launch_columns(z, k, keys, scale, temperature, exclusions, log_z, share)


_rows_operator = torch.library.custom_op("fastmoco::nt_xent_rows", _rows, mutates_args=())
_columns_operator = torch.library.custom_op("fastmoco::nt_xent_columns", _columns, mutates_args=())


@_rows_operator.register_fake
def _(z, k, keys, scale, exclusions, temperature):
    loss = z.new_empty(z.shape[0], dtype=torch.float32)
    return (
        loss,
        torch.empty_like(loss, dtype=torch.int32),
        torch.stack([loss, loss], 1),
        torch.empty_like(z, dtype=loss.dtype),
    )


@_columns_operator.register_fake
def _(z, k, keys, scale, exclusions, log_z, share, temperature):
    return torch.empty_like(z, dtype=torch.float32)


def _rows_by_kernel(
    z: Tensor, keys: Tensor, scale: Tensor, own: Tensor | None, positive: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = _rows_operator if is_traced(z) else _rows
    return call(z, keys[positive], keys, scale, _exclusions(positive, own), temperature)


def _columns_by_kernel(
    z: Tensor, keys: Tensor, scale: Tensor, normaliser: Tensor, own: Tensor | None, positive: Tensor, temperature: float
) -> Tensor:
    call = _columns_operator if is_traced(z) else _columns
    log_z, share = normaliser[:, 0].contiguous(), normaliser[positive, 1]
    return call(z, keys[positive], keys, scale, _exclusions(positive, own), log_z, share, temperature)


def _exclusions(first: Tensor, own: Tensor | None) -> Tensor:
    return torch.stack([first, torch.full_like(first, -1) if own is None else own]).to(torch.int32)


class _WithGradient(torch.autograd.Function):
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


def _loss_and_gradient(
    rows_of: Callable,
    columns_of: Callable,
    z: Tensor,
    temperature: float,
    form: Form,
    gather: Gather,
    rows: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    keys = gather(_of_about_one(z))
    scale = 1 / keys.to(_wide(z)).norm(dim=1).clamp_min(1e-12)  # F.normalize's
    place = torch.arange(len(z), device=z.device) if rows is None else rows
    against, pulled_by = _sides(form, len(z) // 2, len(keys) // 2)
    gradient, normaliser = torch.zeros_like(z, dtype=_wide(z)), z.new_zeros(len(z), 2, dtype=_wide(z))

    losses, ranks = [], []
    for mine, others in against:
        columns = _names(place[mine], len(keys), form)
        loss, rank, normaliser[mine], gradient[mine] = rows_of(
            z[mine], keys[others], scale[others], *columns, temperature
        )
        losses.append(loss)
        ranks.append(rank)
    normalisers = gather(normaliser)
    for mine, others in pulled_by:
        columns = _names(place[mine], len(keys), form)
        gradient[mine] += columns_of(z[mine], keys[others], scale[others], normalisers[others], *columns, temperature)
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


def _names(place: Tensor, keys: int, form: Form) -> tuple[Tensor | None, Tensor]:
    # Numbers of the row itself, among keys of both views, and of its positive.
    batch = keys // 2
    return (place, (place + batch) % keys) if form == "all" else (None, place % batch)


def _of_about_one(z: Tensor) -> Tensor:
    # Rows as keys, of lengths from 1/2 to 1: times a power of two, which rounds nothing. A unit vector would be rounded
    # to z's dtype, and then s_ij of row i among keys would not be the s_ji that went into log Z_j.
    wide = z.to(_wide(z))
    exponent = torch.frexp(wide.norm(dim=1, keepdim=True).clamp_min(1e-12)).exponent
    return torch.ldexp(wide, -exponent).to(z.dtype)


def _wide(z: Tensor) -> torch.dtype:
    return torch.promote_types(z.dtype, torch.float32)


def _alone(rows: Tensor) -> Tensor:
    return rows


def _check(z_a: Tensor, z_b: Tensor, temperature: float, form: str, rows: Tensor | None) -> None:
    n = len(z_a)
    if z_a.dim() != 2 or z_a.shape != z_b.shape or not n:
        raise ValueError(f"nt_xent: needs z_a and z_b [N, D], N at least 1; got {tuple(z_a.shape)}, {tuple(z_b.shape)}")
    check_dtype("nt_xent: z_a", z_a.dtype)
    if z_b.dtype != z_a.dtype or z_b.device != z_a.device:
        raise ValueError(
            f"nt_xent: z_a is {z_a.dtype} on {z_a.device}, z_b {z_b.dtype} on {z_b.device}: use both alike"
        )
    if z_a.shape[1] % 16 or not 16 <= z_a.shape[1] <= 512:
        raise ValueError(f"nt_xent: D must be a multiple of 16 from 16 to 512, not {z_a.shape[1]}")
    if not temperature > 0:
        raise ValueError(f"nt_xent: temperature must be positive, not {temperature}")
    if form not in FORMS:
        raise ValueError(f"nt_xent: form is {form!r}: use {', '.join(FORMS)}")
    if rows is not None and (rows.shape != (2 * n,) or rows.dtype != torch.int64 or rows.device != z_a.device):
        raise ValueError(f"nt_xent: rows must be int64 [{2 * n}], not {rows.dtype} {tuple(rows.shape)}")


def nt_xent(
    z_a: Tensor,
    z_b: Tensor,
    temperature: float,
    *,
    form: Form = "all",
    gather: Gather | None = None,
    rows: Tensor | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Mean loss of this rank's rows, and for each row how many keys score above its positive.

    `z_a`, `z_b`: raw projections [N, D] of two views, normalised here; fp32, fp16 or bf16, which is also the dtype of
    the products, in which rows are as they are: lengths are divided by in fp32; the twin takes fp64 too. D is a
    multiple of 16 up to 512. `temperature`: a positive number, by which cosines are divided. Over several ranks
    `gather` makes of rows [2N, ...] of this rank, first those of `z_a`, the rows of all ranks [2B, ...], the same on
    each, such that rows i and B + i are the views of one sample; `rows` int64 [2N] says where this rank's own stand
    there, in any order. Left out, there is one rank, and row i of one view belongs to row i of the other.

    Returns (loss fp32 [], rank int32 [2N]; [N] where the form is "one-sided"). The loss is the mean over rows, as in
    the paper; SimCLR's code adds the means of both views. Top-k accuracy is (rank < k). Differentiable in both views,
    once, for a mean over ranks as DistributedDataParallel takes it.
    Raises ValueError for anything else. After Chen et al., "A Simple Framework for Contrastive Learning of Visual
    Representations", 2020, algorithm 1.
    """
    _check(z_a, z_b, temperature, form, rows)
    z = torch.cat([z_a, z_b])
    with torch.no_grad():
        # Between the two, log Z is a natural logarithm, and with the kernel one to base 2.
        sweeps: tuple[Callable, Callable] = (reference.nt_xent_rows, reference.nt_xent_columns)
        if takes_kernel(impl, z.device, z.dtype):
            sweeps = (_rows_by_kernel, _columns_by_kernel)
        loss, rank, gradient = _loss_and_gradient(*sweeps, z.detach(), temperature, form, gather or _alone, rows)
    return _WithGradient.apply(loss, z, gradient), rank


def cost(n: int, batch: int, dim: int, dtype: torch.dtype, form: Form = "all") -> tuple[int, int]:
    """(bytes, flops) of loss and gradient of 2 n rows of a rank among the 2 `batch` rows of all.

    Rows, keys and normalisers are read once, losses, ranks and the gradient (in `dtype`) are written once; two products
    of each sweep, which has fewer rows or keys where `form` leaves some out. What travels between ranks is no part.
    """
    rows, keys = 2 * n, 2 * batch
    nbytes = (2 * rows + keys) * dim * dtype.itemsize + 8 * rows + 8 * keys
    return nbytes, 8 * rows * keys * dim // {"all": 1, "across": 2, "one-sided": 4}[form]


def variants(arch: int) -> list[Variant]:
    """What the compile gate compiles: both sweeps, ragged, at every width, and how they end."""
    shapes = [(torch.bfloat16, dim) for dim in (64, 128, 256, 512)]
    shapes += [(torch.float16, 128), (torch.float16, 256), (torch.float32, 128)]
    gate = [
        sweep_variant_of_a_batch(arch, dim, dtype, columns=columns)
        for dtype, dim in shapes
        for columns in (False, True)
    ]
    return gate + combine_variants_of_a_batch(arch, 128)
