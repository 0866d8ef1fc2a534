"""InfoNCE over a queue of keys in one pass: loss, rank of the positive, and the gradient.

With unit queries and keys, Z = sum_j exp((s_j - 1) / T) and A = sum_j exp((s_j - 1) / T) key_j give everything:
loss = log(Z) - (s_0 - 1) / T and dloss/dq = (A / Z - key_0) / T, the sums running over the positive (0) and the queue.
That is attention with V = K, so one tile of keys in shared memory serves both products. Since unit vectors bound the
logits by 1 / T, the shift is a constant and the partial sums of different pieces of the queue simply add: the grid is
(rows) x (pieces of the queue), as in flash decoding, and a second small launch adds the pieces in a fixed order.
No N x K array exists, no float atomic is used, and two runs give the same bits.

Bytes: the queue comes from memory once (16.8 MB at K = 65,536, D = 128, bf16) and from L2 once for every BLOCK_N
queries; partial sums of 4 (D + 2) bytes a query and piece (8.6 MB at N = 256) are written and read there.

The queue's dtype decides the arithmetic: products take fp16 or bf16 operands as the queue is stored, or three-term
tf32 (fp32 to rounding) for an fp32 queue; they always accumulate in fp32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastmoco.kernels import info_nce_kernels as kernels
from fastmoco.kernels import reference
from fastmoco.kernels.dispatch import (
    NAMES,
    Impl,
    check_dtype,
    is_traced,
    launch_options,
    machine,
    takes_kernel,
    variant,
)
from fastmoco.kernels.tiles import TABLE, Tiles, Variant, tiles

__all__ = ["cost", "info_nce", "scratch_bytes", "variants"]

# Below this, exp((s - 1) / T) leaves fp32's range for some s in [-1, 1]: 2 * log2(e) / T > 115 bits.
SMALLEST_FIXED_SHIFT_TEMPERATURE = 0.025
FP16_HEADROOM = 14  # powers of two the largest probability is raised by: 2^14 is finite, and 2^-24 is 38 below it


class _Plan(NamedTuple):
    sweep: Tiles
    combine: Tiles
    row_tiles: int
    chunks: int
    pieces: int
    tiles_per_piece: int


def _plan(
    n: int, size: int, dim: int, queue_dtype: torch.dtype, device: torch.device, exclusions: bool = False
) -> _Plan:
    capability, processors = machine(device)
    sweep = _sweep_tiles(dim, queue_dtype, capability, exclusions)
    block_n, block_k, resident, chunk = sweep.block
    row_tiles, key_tiles, chunks = triton.cdiv(n, block_n), triton.cdiv(size, block_k), triton.cdiv(dim, chunk)
    tiles_per_piece = triton.cdiv(key_tiles, max(1, processors * resident // (row_tiles * chunks)))
    pieces = triton.cdiv(key_tiles, tiles_per_piece)
    return _Plan(sweep, tiles("info_nce.combine", capability), row_tiles, chunks, pieces, tiles_per_piece)


def _sweep_tiles(
    dim: int, queue_dtype: torch.dtype, capability: tuple[int, int] | int | None, exclusions: bool = False
) -> Tiles:
    entry = f"info_nce.{'fp32' if queue_dtype is torch.float32 else max(64, _padded(dim))}"
    special = f"{entry}.exclusions"
    return tiles(special if exclusions and special in TABLE else entry, capability)


def _padded(dim: int) -> int:
    return max(16, triton.next_power_of_2(dim))


def _sweep_constants(
    tile: Tiles, dim: int, queue_dtype: torch.dtype, *, whole: bool, on_device: bool, running: bool
) -> dict[str, Any]:
    block_n, block_k, _, chunk = tile.block
    return {
        "DIM": dim,
        "CHUNK": min(chunk, _padded(dim)),
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "WHOLE": whole,
        "ON_DEVICE": on_device,
        "RUNNING": running,
        "HEADROOM": FP16_HEADROOM if queue_dtype is torch.float16 else 0,
        "PRECISION": "tf32x3" if queue_dtype is torch.float32 else "tf32",
    }


def _combine_constants(tile: Tiles, dim: int, sweep: dict[str, Any], raw_keys: bool = False) -> dict[str, Any]:
    shared = {name: sweep[name] for name in ("DIM", "ON_DEVICE", "RUNNING", "HEADROOM")} | {"RAW_KEYS": raw_keys}
    return shared | {"PADDED": _padded(dim), "BLOCK_PIECES": tile.block[0]}


def _running_shift(queue_dtype: torch.dtype, temperature: float, on_device: bool) -> bool:
    # fp16 cannot hold exp(-2 / T); a temperature on the device cannot be looked at without stopping the stream.
    return on_device or queue_dtype is torch.float16 or temperature < SMALLEST_FIXED_SHIFT_TEMPERATURE


def _launch(
    z_q: Tensor,
    k: Tensor,
    queue: Tensor,
    temperature: float,
    device_temperature: Tensor | None,
    exclusions: Tensor | None = None,
    key_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return launch(z_q, k, queue, temperature, device_temperature, exclusions, key_ids)


def launch(
    z_q: Tensor,
    k: Tensor,
    queue: Tensor,
    temperature: float,
    device_temperature: Tensor | None = None,
    exclusions: Tensor | None = None,
    key_ids: Tensor | None = None,
    normaliser: Tensor | None = None,
    key_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sweep and combine: loss [N], rank [N] and gradient [N, D].

    `normaliser` fp32 [N, 2] takes log2 of each row's sum and the share that the negatives have of it.
    `exclusions` int32 [2, N]: two keys that count for nothing in each row, by number, or by `key_ids` int32 [K].
    `key_scale` fp32 [K]: one over the keys' lengths, where they and `k` are no unit vectors; then the first of the two
    numbers that a row leaves out is its positive's.
    """
    (n, dim), size = z_q.shape, queue.shape[0]
    plan = _plan(n, size, dim, queue.dtype, z_q.device, exclusions is not None)
    on_device = device_temperature is not None
    scalar = device_temperature if on_device else temperature
    running = _running_shift(queue.dtype, temperature, on_device)
    z_part = z_q.new_empty(plan.pieces, n, dtype=torch.float32)
    a_part = z_q.new_empty(plan.pieces, n, dim, dtype=torch.float32)
    rank_part = z_q.new_empty(plan.pieces, n, dtype=torch.int32)
    shift_part = torch.empty_like(z_part) if running else z_part  # unused where the shift is fixed
    positive = z_q.new_empty(n, dtype=torch.float32)
    loss, rank, gradient = _outputs(z_q)
    whole = size % plan.sweep.block[1] == 0
    constants = _sweep_constants(plan.sweep, dim, queue.dtype, whole=whole, on_device=on_device, running=running)
    partials = (z_part, a_part, rank_part, shift_part, positive)
    keys = (queue, exclusions, key_ids, None, key_scale)
    sweep = (_operand(z_q, queue.dtype), k, *keys, scalar, *partials, n, size, plan.tiles_per_piece)
    combine = (z_q, k, scalar, *partials, loss, rank, normaliser, gradient, n, plan.pieces)
    with torch.cuda.device_of(z_q):
        kernels.sweep_kernel[(plan.row_tiles, plan.pieces, plan.chunks)](
            *sweep, **constants, **launch_options(plan.sweep)
        )
        constants = _combine_constants(plan.combine, dim, constants, key_scale is not None)
        kernels.combine_kernel[(n,)](*combine, **constants, **launch_options(plan.combine))
    return loss, rank, gradient


def launch_columns(
    z: Tensor,
    k: Tensor,
    keys: Tensor,
    key_scale: Tensor,
    temperature: float,
    exclusions: Tensor,
    key_log_z: Tensor,
    share: Tensor,
) -> Tensor:
    """Gradient fp32 [N, D] of the losses of `keys`, whose sums' log2 are `key_log_z` fp32 [K], with respect to z.

    `exclusions` names the positive, too, whose row's negatives have the `share` fp32 [N]; `key_scale` as in `launch`.
    """
    (n, dim), size = z.shape, keys.shape[0]
    plan = _plan(n, size, dim, keys.dtype, z.device, exclusions=True)
    a_part = z.new_empty(plan.pieces, n, dim, dtype=torch.float32)
    gradient = z.new_empty(z.shape, dtype=torch.float32)
    whole = size % plan.sweep.block[1] == 0
    constants = _sweep_constants(plan.sweep, dim, keys.dtype, whole=whole, on_device=False, running=False)
    unused = (None, a_part, None, None, None)
    sweep = (_operand(z, keys.dtype), None, keys, exclusions, None, key_log_z, key_scale, temperature, *unused)
    combine = _combine_constants(plan.combine, dim, constants)
    del combine["RUNNING"], combine["RAW_KEYS"]
    with torch.cuda.device_of(z):
        kernels.sweep_kernel[(plan.row_tiles, plan.pieces, plan.chunks)](
            *sweep, n, size, plan.tiles_per_piece, **constants, **launch_options(plan.sweep)
        )
        kernels.combine_columns_kernel[(n,)](
            z, k, share, temperature, a_part, gradient, n, plan.pieces, **combine, **launch_options(plan.combine)
        )
    return gradient


def _operand(z_q: Tensor, dtype: torch.dtype) -> Tensor:
    # Of the queue's dtype, which in training it is. A large projection would overflow fp16 unless it is normalised.
    if z_q.dtype is dtype:
        return z_q
    return (F.normalize(z_q.float(), dim=1) if dtype is torch.float16 else z_q).to(dtype)


def _outputs(z_q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    loss = z_q.new_empty(z_q.shape[0], dtype=torch.float32)
    return loss, torch.empty_like(loss, dtype=torch.int32), z_q.new_empty(z_q.shape, dtype=torch.float32)


_operator = torch.library.custom_op("fastmoco::info_nce", _launch, mutates_args=())


@_operator.register_fake
def _(z_q, k, queue, temperature, device_temperature, exclusions=None, key_ids=None):
    return _outputs(z_q)


class _InfoNCE(torch.autograd.Function):
    """The gradient comes with the loss; backward scales it."""

    @staticmethod
    def forward(ctx, z_q, k, queue, *rest):
        call = _operator if is_traced(z_q) else _launch
        loss, rank, gradient = call(z_q.contiguous(), k.contiguous(), queue, *rest)
        ctx.save_for_backward(gradient)
        ctx.dtype = z_q.dtype
        ctx.mark_non_differentiable(rank)
        ctx.set_materialize_grads(False)  # or each backward would fill zeros for the rank
        return loss, rank

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, grad_rank):
        (gradient,) = ctx.saved_tensors
        # Scaled and rounded by one kernel.
        scaled = torch.mul(gradient, grad_loss[:, None], out=torch.empty_like(gradient, dtype=ctx.dtype))
        return scaled, None, None, None, None, None, None


def _check(z_q: Tensor, k: Tensor, queue: Tensor, temperature: float | Tensor) -> None:
    for name, tensor in (("z_q", z_q), ("k", k), ("queue", queue)):
        check_dtype(f"info_nce: {name}", tensor.dtype)
        if tensor.dim() != 2 or tensor.shape[0] < 1:
            raise ValueError(f"info_nce: {name} must be [rows, D] with at least one row, not {tuple(tensor.shape)}")
        if tensor.device != z_q.device:
            raise ValueError(f"info_nce: {name} is on {tensor.device}, z_q on {z_q.device}")
    dim = z_q.shape[1]
    if k.shape != z_q.shape or queue.shape[1] != dim:
        shapes = f"z_q {tuple(z_q.shape)}, k {tuple(k.shape)}, queue {tuple(queue.shape)}"
        raise ValueError(f"info_nce: needs z_q [N, D], k [N, D], queue [K, D]; got {shapes}")
    if dim % 16 or not 16 <= dim <= 512:
        raise ValueError(f"info_nce: D must be a multiple of 16 from 16 to 512, not {dim}")
    if not queue.is_contiguous():
        raise ValueError(f"info_nce: the queue must be contiguous, not of strides {queue.stride()}")
    if isinstance(temperature, Tensor):
        if temperature.dim() or temperature.device != z_q.device or not temperature.is_floating_point():
            raise ValueError("info_nce: a temperature tensor must be a 0-d float on the device of z_q")
    elif not temperature > 0:
        raise ValueError(f"info_nce: temperature must be positive, not {temperature}")


def _check_ids(z_q: Tensor, queue: Tensor, row_ids: Tensor | None, key_ids: Tensor | None) -> None:
    for name, ids, rows in (("row_ids", row_ids, z_q), ("key_ids", key_ids, queue)):
        if (ids is None) != (row_ids is None):
            raise ValueError("info_nce: row_ids and key_ids go together")
        if ids is not None and (ids.dtype, ids.shape, ids.device) != (torch.int64, rows.shape[:1], rows.device):
            raise ValueError(f"info_nce: {name} must be int64 [{len(rows)}], not {ids.dtype} {tuple(ids.shape)}")


def info_nce(
    z_q: Tensor,
    k: Tensor,
    queue: Tensor,
    temperature: float | Tensor,
    *,
    row_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Loss of each query against its positive and every key of the queue, and how many keys outscore the positive.

    z_q: raw projections [N, D], normalised here; k: their positives [N, D]; queue: negatives [K, D], contiguous; k and
    queue hold unit vectors. All fp32, fp16 or bf16 (the twin also takes fp64), D a multiple of 16 up to 512. The
    queue's dtype is the dtype of the products. temperature: a positive number, or a 0-d float tensor on the same
    device, which is never read back and therefore takes the form with a running maximum (as do numbers below 0.025,
    and fp16 queues). row_ids [N] and key_ids [K], both or neither, int64 from 0 to below 2^31: a row leaves out the
    keys of its own id.

    Returns (loss fp32 [N], rank int32 [N]); top-k accuracy is (rank < k). Differentiable in z_q, once.
    Raises ValueError for anything else. After He et al., "Momentum Contrast", 2020, equation 1.
    """
    _check(z_q, k, queue, temperature)
    _check_ids(z_q, queue, row_ids, key_ids)
    if not takes_kernel(impl, z_q.device, z_q.dtype, k.dtype, queue.dtype):
        return reference.info_nce(z_q, k, queue, temperature, row_ids, key_ids)
    device_temperature = temperature.detach().float() if isinstance(temperature, Tensor) else None
    host_temperature = float(temperature) if device_temperature is None else 0.0
    exclusions = ids = None
    if row_ids is not None and key_ids is not None:
        exclusions = torch.stack([row_ids, torch.full_like(row_ids, -1)]).to(torch.int32)
        ids = key_ids.to(torch.int32)
    return _InfoNCE.apply(z_q, k.detach(), queue.detach(), host_temperature, device_temperature, exclusions, ids)


def scratch_bytes(n: int, size: int, dim: int, queue_dtype: torch.dtype, device: torch.device, running: bool) -> int:
    """Bytes one call allocates beyond its loss and rank: the partial sums, the positives and the stored gradient.

    Projections of another dtype than the queue's are copied besides.
    """
    pieces = _plan(n, size, dim, queue_dtype, device).pieces
    return 4 * (pieces * n * (dim + 2 + running) + n + n * dim)


def cost(n: int, size: int, dim: int, z_dtype: torch.dtype, queue_dtype: torch.dtype) -> tuple[int, int]:
    """(bytes, flops) no implementation can avoid: each input read once, each output written once, two products.

    The gradient with respect to z_q counts as an output in fp32; k has the dtype of z_q.
    """
    inputs = 2 * n * dim * z_dtype.itemsize + size * dim * queue_dtype.itemsize
    outputs = n * (torch.float32.itemsize + torch.int32.itemsize + dim * torch.float32.itemsize)
    return inputs + outputs, 4 * n * (size + 1) * dim


def variants(arch: int) -> list[Variant]:
    """What the compile gate compiles: every row of tiles, with the fixed shift and with a running maximum.

    Projections and positives are of the queue's dtype, and once as the training step gives them: fp32 positives.
    """
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    widths = (64, 128, 256, 512)
    gate = [_sweep_variant(arch, dim, dtype) for dtype in (bf16, fp32) for dim in widths]
    gate += [_sweep_variant(arch, dim, fp16, running=True, whole=False) for dim in widths]
    gate += [_sweep_variant(arch, dim, fp32, running=True, whole=False) for dim in (128, 512)]
    gate.append(_sweep_variant(arch, 128, bf16, running=True, on_device=True))
    gate += [_sweep_variant(arch, 128, bf16, k=fp32), _sweep_variant(arch, 128, fp16, running=True, k=fp32)]
    gate += [sweep_variant_of_a_batch(arch, 128, bf16, key_ids=True, k=fp32)]
    return gate + [_combine_variant(arch, 128, running=False), _combine_variant(arch, 512, running=True, k="fp32")]


_PARTIAL_TYPES = {"z_part": "*fp32", "a_part": "*fp32", "rank_part": "*i32", "shift_part": "*fp32"}


def _sweep_variant(
    arch: int,
    dim: int,
    dtype: torch.dtype,
    *,
    k: torch.dtype | None = None,
    running: bool = False,
    on_device: bool = False,
    whole: bool = True,
) -> Variant:
    row = _sweep_tiles(dim, dtype, arch)
    constants = _sweep_constants(row, dim, dtype, whole=whole, on_device=on_device, running=running)
    constants |= dict.fromkeys(("exclusions", "key_ids", "key_log_z", "key_scale"))
    types = dict.fromkeys(("z_q", "queue"), f"*{NAMES[dtype]}") | {
        "k": f"*{NAMES[k or dtype]}",
        "positive_out": "*fp32",
    }
    types |= _PARTIAL_TYPES | {"temperature": "*fp32" if on_device else "fp32"}
    types |= dict.fromkeys(("n", "size", "tiles_per_piece"), "i32")
    label = f"info_nce.sweep {NAMES[dtype]} D={dim}" + " running" * running + " ragged" * (not whole)
    label += f" k={NAMES[k]}" if k else ""
    return variant(label, kernels.sweep_kernel, row, types, constants, native_mma=dtype is not torch.float32)


def sweep_variant_of_a_batch(
    arch: int,
    dim: int,
    dtype: torch.dtype,
    *,
    key_ids: bool = False,
    columns: bool = False,
    k: torch.dtype | None = None,
) -> Variant:
    """The sweep that leaves keys out, by number or by `key_ids`; `columns`: with the keys' normalisers given."""
    row, running = _sweep_tiles(dim, dtype, arch, exclusions=True), dtype is torch.float16 and not columns
    constants = _sweep_constants(row, dim, dtype, whole=False, on_device=False, running=running)
    constants |= {"key_scale": None} if key_ids else {"key_ids": None}
    unused = ("k", "z_part", "rank_part", "shift_part", "positive_out") if columns else ("key_log_z",)
    constants |= dict.fromkeys(unused)
    types = dict.fromkeys(("z_q", "queue"), f"*{NAMES[dtype]}") | {"k": f"*{NAMES[k or dtype]}", "temperature": "fp32"}
    types |= _PARTIAL_TYPES | {"positive_out": "*fp32", "exclusions": "*i32", "key_ids": "*i32"}
    types |= dict.fromkeys(("key_log_z", "key_scale"), "*fp32")
    types |= dict.fromkeys(("n", "size", "tiles_per_piece"), "i32")
    label = f"{'nt_xent.columns' if columns else 'info_nce.sweep ids' if key_ids else 'nt_xent.rows'}"
    label += f" {NAMES[dtype]} D={dim}"
    return variant(label, kernels.sweep_kernel, row, types, constants, native_mma=dtype is not torch.float32)


def combine_variants_of_a_batch(arch: int, dim: int) -> list[Variant]:
    """The ends of both sweeps of a batch."""
    row = tiles("info_nce.combine", arch)
    constants = {"DIM": dim, "ON_DEVICE": False, "RUNNING": False, "HEADROOM": 0}
    constants = _combine_constants(row, dim, constants, raw_keys=True)
    types = {"z_q": "*bf16", "k": "*bf16", "temperature": "fp32", "positive_in": "*fp32", "loss_out": "*fp32"}
    types |= _PARTIAL_TYPES | {"rank_out": "*i32", "gradient_out": "*fp32", "n": "i32", "pieces": "i32"}
    types |= {"normaliser_out": "*fp32", "share": "*fp32"}
    rows = variant(f"nt_xent.combine D={dim}", kernels.combine_kernel, row, types, constants)
    del constants["RUNNING"], constants["RAW_KEYS"]
    return [rows, variant(f"nt_xent.columns end D={dim}", kernels.combine_columns_kernel, row, types, constants)]


def _combine_variant(arch: int, dim: int, *, running: bool, k: str = "bf16") -> Variant:
    row = tiles("info_nce.combine", arch)
    sweep = {"DIM": dim, "ON_DEVICE": False, "RUNNING": running, "HEADROOM": 0}
    types = {"z_q": "*bf16", "k": f"*{k}", "temperature": "fp32", "positive_in": "*fp32", "loss_out": "*fp32"}
    types |= _PARTIAL_TYPES | {"rank_out": "*i32", "gradient_out": "*fp32", "n": "i32", "pieces": "i32"}
    label = f"info_nce.combine D={dim}" + " running" * running
    return variant(
        label, kernels.combine_kernel, row, types, _combine_constants(row, dim, sweep) | {"normaliser_out": None}
    )
