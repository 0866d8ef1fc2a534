"""InfoNCE over a queue of keys in one pass: loss, rank of the positive, and the gradient.

With unit queries and keys, Z = sum_j exp((s_j - 1) / T) and A = sum_j exp((s_j - 1) / T) key_j give everything:
loss = log(Z) - (s_0 - 1) / T and dloss/dq = (A / Z - key_0) / T, the sums running over the positive (0) and the queue.
That is attention with V = K, so one tile of keys in shared memory serves both products. Since unit vectors bound the
logits by 1 / T, the shift is a constant and the partial sums of different pieces of the queue simply add: the grid is
(rows) x (pieces of the queue), as in flash decoding, and a second small launch adds the pieces in a fixed order.
No N x K array exists, no float atomic is used, and two runs give the same bits.

The queue's dtype decides the arithmetic: products take fp16 or bf16 operands as the queue is stored, or three-term
tf32 (fp32 to rounding) for an fp32 queue; they always accumulate in fp32. See `_running_shift` for the other form.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmoco.kernels import reference
from fastmoco.kernels.tiles import Tiles, Variant, tiles

__all__ = ["cost", "info_nce", "scratch_bytes", "variants"]

# Below this, exp((s - 1) / T) leaves fp32's range for some s in [-1, 1]: 2 * log2(e) / T > 115 bits.
SMALLEST_FIXED_SHIFT_TEMPERATURE = 0.025
FP16_HEADROOM = 14  # powers of two the largest probability is raised by: 2^14 is finite, and 2^-24 is 38 below it
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
INTERPRETER_PROCESSORS = 4  # what the grid is cut for where there is no GPU
_TYPE_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@triton.jit
def _load_rows(
    base, start, count, column, rows: tl.constexpr, dim: tl.constexpr, chunk: tl.constexpr, whole: tl.constexpr
):
    row = tl.arange(0, rows)
    columns = column + tl.arange(0, chunk)
    pointers = base + tl.cast(start, tl.int64) * dim + (row[:, None] * dim + columns[None, :])
    if dim % chunk == 0:
        if whole:
            return tl.load(pointers)
        return tl.load(pointers, mask=(start + row < count)[:, None], other=0.0)
    return tl.load(pointers, mask=(start + row < count)[:, None] & (columns < dim)[None, :], other=0.0)


@triton.jit
def _inverse_norms(z_q, start, n, rows: tl.constexpr, dim: tl.constexpr, padded: tl.constexpr, chunk: tl.constexpr):
    squares = tl.zeros([rows], tl.float32)
    for column in tl.static_range(0, padded, chunk):
        z = _load_rows(z_q, start, n, column, rows, dim, chunk, False).to(tl.float32)
        squares += tl.sum(z * z, 1)
    return tl.div_rn(1.0, tl.maximum(tl.sqrt_rn(squares), 1e-12))


@triton.jit
def _query(
    z_q, inverse, start, n, column, rows: tl.constexpr, dim: tl.constexpr, chunk: tl.constexpr, operand: tl.constexpr
):
    z = _load_rows(z_q, start, n, column, rows, dim, chunk, False).to(tl.float32)
    return (z * inverse[:, None]).to(operand)


@triton.jit
def _product(left, right, precision: tl.constexpr, total=None):
    if INTERPRETED:  # the interpreter would multiply the bit patterns of bf16
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, total, input_precision=precision)


@triton.jit
def _scores(
    q,
    keys,
    z_q,
    inverse,
    start,
    n,
    queue,
    key_start,
    key_count,
    rows: tl.constexpr,
    key_rows: tl.constexpr,
    dim: tl.constexpr,
    padded: tl.constexpr,
    chunk: tl.constexpr,
    whole: tl.constexpr,
    operand: tl.constexpr,
    precision: tl.constexpr,
):
    if padded == chunk:
        return _product(q, tl.trans(keys), precision)
    s = tl.zeros([rows, key_rows], tl.float32)
    for column in range(0, padded, chunk):
        part = _query(z_q, inverse, start, n, column, rows, dim, chunk, operand)
        keys_part = _load_rows(queue, key_start, key_count, column, key_rows, dim, chunk, whole).to(operand)
        s = _product(part, tl.trans(keys_part), precision, s)
    return s


@triton.jit
def _diagonal(square, rows: tl.constexpr):
    index = tl.arange(0, rows)
    return tl.sum(tl.where(index[:, None] == index[None, :], square, 0.0), 1)


@triton.jit
def _log2_scale(temperature, on_device: tl.constexpr):
    if on_device:
        scale = 1.4426950408889634 / tl.load(temperature)
    else:
        scale = 1.4426950408889634 / temperature
    return scale


@triton.jit(do_not_specialize=["n", "size", "tiles_per_piece"])
def _sweep_kernel(
    z_q,
    k,
    queue,
    temperature,
    z_part,
    a_part,
    rank_part,
    shift_part,
    positive_out,
    n,
    size,
    tiles_per_piece,
    dim: tl.constexpr,
    padded: tl.constexpr,
    chunk: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    whole: tl.constexpr,
    on_device: tl.constexpr,
    running: tl.constexpr,
    headroom: tl.constexpr,
    precision: tl.constexpr,
):
    start = tl.program_id(0) * block_n
    piece = tl.program_id(1)
    column = tl.program_id(2) * chunk
    scale = _log2_scale(temperature, on_device)
    operand: tl.constexpr = queue.dtype.element_ty
    inverse = _inverse_norms(z_q, start, n, block_n, dim, padded, chunk)
    q = _query(z_q, inverse, start, n, column, block_n, dim, chunk, operand)

    # The positive goes through the same instruction as the negatives, so that equal keys score equally.
    own = _load_rows(k, start, n, column, block_n, dim, chunk, False).to(operand)
    positive = _diagonal(
        _scores(
            q, own, z_q, inverse, start, n, k, start, n, block_n, block_n, dim, padded, chunk, False, operand, precision
        ),
        block_n,
    )

    shift = positive * scale
    z = tl.zeros([block_n], tl.float32)
    a = tl.zeros([block_n, chunk], tl.float32)
    rank = tl.zeros([block_n], tl.int32)
    first = piece * tiles_per_piece
    for tile in range(first, tl.minimum(first + tiles_per_piece, tl.cdiv(size, block_k))):
        keys = _load_rows(queue, tile * block_k, size, column, block_k, dim, chunk, whole)
        s = _scores(
            q,
            keys,
            z_q,
            inverse,
            start,
            n,
            queue,
            tile * block_k,
            size,
            block_n,
            block_k,
            dim,
            padded,
            chunk,
            whole,
            operand,
            precision,
        )
        if not whole:
            s = tl.where((tile * block_k + tl.arange(0, block_k) < size)[None, :], s, float("-inf"))
        rank += tl.sum((s > positive[:, None]).to(tl.int32), 1)
        if running:
            new_shift = tl.maximum(shift, tl.max(s, 1) * scale)
            z *= tl.exp2(shift - new_shift)
            a *= tl.exp2(shift - new_shift)[:, None]
            shift = new_shift
            p = tl.exp2(s * scale - (shift - headroom)[:, None])
        else:
            p = tl.exp2(s * scale - scale)
        z += tl.sum(p, 1)
        a = _product(p.to(operand), keys, precision, a)

    rows = start + tl.arange(0, block_n)
    columns = column + tl.arange(0, chunk)
    slot = piece.to(tl.int64) * n + rows
    tl.store(a_part + slot[:, None] * dim + columns[None, :], a, mask=(rows < n)[:, None] & (columns < dim)[None, :])
    held = (rows < n) & (column == 0)
    tl.store(z_part + slot, z, mask=held)
    tl.store(rank_part + slot, rank, mask=held)
    if running:
        tl.store(shift_part + slot, shift, mask=held)
    tl.store(positive_out + rows, positive, mask=held & (piece == 0))


@triton.jit(do_not_specialize=["n", "pieces"])
def _combine_kernel(
    z_q,
    k,
    temperature,
    z_part,
    a_part,
    rank_part,
    shift_part,
    positive_in,
    loss_out,
    rank_out,
    gradient_out,
    n,
    pieces,
    dim: tl.constexpr,
    padded: tl.constexpr,
    block_pieces: tl.constexpr,
    on_device: tl.constexpr,
    running: tl.constexpr,
    headroom: tl.constexpr,
):
    row = tl.program_id(0)
    scale = _log2_scale(temperature, on_device)
    positive = tl.load(positive_in + row) * scale
    columns = tl.arange(0, padded)
    lanes = tl.arange(0, block_pieces)

    shift = scale
    if running:
        shift = positive
        for start in range(0, pieces, block_pieces):
            piece = start + lanes
            shifts = tl.load(shift_part + piece.to(tl.int64) * n + row, mask=piece < pieces, other=float("-inf"))
            shift = tl.maximum(shift, tl.max(shifts, 0))

    z = tl.zeros([block_pieces], tl.float32)
    a = tl.zeros([block_pieces, padded], tl.float32)
    rank = tl.zeros([block_pieces], tl.int32)
    for start in range(0, pieces, block_pieces):
        piece = start + lanes
        slot = piece.to(tl.int64) * n + row
        held = piece < pieces
        mask = held[:, None] & (columns < dim)[None, :]
        z_piece = tl.load(z_part + slot, mask=held, other=0.0)
        a_piece = tl.load(a_part + slot[:, None] * dim + columns[None, :], mask=mask, other=0.0)
        if running:
            weight = tl.exp2(tl.load(shift_part + slot, mask=held, other=float("-inf")) - shift)
            z_piece *= weight
            a_piece *= weight[:, None]
        z += z_piece
        a += a_piece
        rank += tl.load(rank_part + slot, mask=held, other=0)

    negatives = tl.sum(z, 0)
    total = negatives + tl.exp2(positive - shift + headroom)
    tl.store(loss_out + row, (tl.log2(total) - headroom - (positive - shift)) * 0.6931471805599453)
    tl.store(rank_out + row, tl.sum(rank, 0))

    raw = tl.load(z_q + row.to(tl.int64) * dim + columns, mask=columns < dim, other=0.0).to(tl.float32)
    key = tl.load(k + row.to(tl.int64) * dim + columns, mask=columns < dim, other=0.0).to(tl.float32)
    inverse = tl.div_rn(1.0, tl.maximum(tl.sqrt_rn(tl.sum(raw * raw, 0)), 1e-12))
    q = raw * inverse
    # p_0 - 1 = -negatives / total, without the cancellation.
    towards = (tl.sum(a, 0) - negatives * key) * (scale * 0.6931471805599453 / total)
    gradient = (towards - q * tl.sum(q * towards, 0)) * inverse
    tl.store(gradient_out + row.to(tl.int64) * dim + columns, gradient, mask=columns < dim)


class _Plan(NamedTuple):
    tile: Tiles
    combine: Tiles
    row_tiles: int
    chunks: int
    pieces: int
    tiles_per_piece: int


def _padded(dim: int) -> int:
    return max(16, triton.next_power_of_2(dim))


def _sweep_tiles(dim: int, queue_dtype: torch.dtype, capability: tuple[int, int] | int | None) -> Tiles:
    width = "fp32" if queue_dtype is torch.float32 else max(64, _padded(dim))
    return tiles(f"info_nce.{width}", capability)


def _plan(n: int, size: int, dim: int, queue_dtype: torch.dtype, device: torch.device) -> _Plan:
    processors, capability = INTERPRETER_PROCESSORS, None
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        capability = torch.cuda.get_device_capability(device)
    tile = _sweep_tiles(dim, queue_dtype, capability)
    block_n, block_k, resident, chunk = tile.block
    row_tiles, key_tiles = triton.cdiv(n, block_n), triton.cdiv(size, block_k)
    chunks = triton.cdiv(dim, chunk)
    tiles_per_piece = triton.cdiv(key_tiles, max(1, processors * resident // (row_tiles * chunks)))
    pieces = triton.cdiv(key_tiles, tiles_per_piece)
    return _Plan(tile, tiles("info_nce.combine", capability), row_tiles, chunks, pieces, tiles_per_piece)


def _running_shift(queue_dtype: torch.dtype, temperature: float, on_device: bool) -> bool:
    # fp16 cannot hold exp(-2 / T); a temperature on the device cannot be looked at without stopping the stream.
    return on_device or queue_dtype is torch.float16 or temperature < SMALLEST_FIXED_SHIFT_TEMPERATURE


def _sweep_constants(tile: Tiles, dim: int, queue_dtype: torch.dtype, *, whole: bool, on_device: bool, running: bool):
    return {
        "dim": dim,
        "padded": _padded(dim),
        "chunk": min(tile.block[3], _padded(dim)),
        "block_n": tile.block[0],
        "block_k": tile.block[1],
        "whole": whole,
        "on_device": on_device,
        "running": running,
        "headroom": _headroom(queue_dtype),
        "precision": "tf32x3" if queue_dtype is torch.float32 else "tf32",
    }


def _headroom(queue_dtype: torch.dtype) -> int:
    return FP16_HEADROOM if queue_dtype is torch.float16 else 0


@torch.library.custom_op("fastmoco::info_nce", mutates_args=())
def _info_nce(
    z_q: Tensor, k: Tensor, queue: Tensor, temperature: float, device_temperature: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    n, dim = z_q.shape
    size = queue.shape[0]
    plan = _plan(n, size, dim, queue.dtype, z_q.device)
    on_device = device_temperature is not None
    heat = device_temperature if on_device else temperature
    running = _running_shift(queue.dtype, temperature, on_device)
    z_part = z_q.new_empty(plan.pieces, n, dtype=torch.float32)
    a_part = z_q.new_empty(plan.pieces, n, dim, dtype=torch.float32)
    rank_part = z_q.new_empty(plan.pieces, n, dtype=torch.int32)
    shift_part = torch.empty_like(z_part) if running else z_part  # unused where the shift is fixed
    positive = z_q.new_empty(n, dtype=torch.float32)
    loss, rank, gradient = _info_nce_fake(z_q, k, queue, temperature, device_temperature)

    constants = _sweep_constants(
        plan.tile, dim, queue.dtype, whole=size % plan.tile.block[1] == 0, on_device=on_device, running=running
    )
    with torch.cuda.device_of(z_q):
        _sweep_kernel[(plan.row_tiles, plan.pieces, plan.chunks)](
            z_q,
            k,
            queue,
            heat,
            z_part,
            a_part,
            rank_part,
            shift_part,
            positive,
            n,
            size,
            plan.tiles_per_piece,
            **constants,
            num_warps=plan.tile.num_warps,
            num_stages=plan.tile.num_stages,
        )
        _combine_kernel[(n,)](
            z_q,
            k,
            heat,
            z_part,
            a_part,
            rank_part,
            shift_part,
            positive,
            loss,
            rank,
            gradient,
            n,
            plan.pieces,
            **_combine_constants(plan.combine, constants),
            num_warps=plan.combine.num_warps,
            num_stages=plan.combine.num_stages,
        )
    return loss, rank, gradient


@_info_nce.register_fake
def _info_nce_fake(z_q, k, queue, temperature, device_temperature):
    n = z_q.shape[0]
    loss = z_q.new_empty(n, dtype=torch.float32)
    return loss, z_q.new_empty(n, dtype=torch.int32), z_q.new_empty(z_q.shape, dtype=torch.float32)


def _keep_gradient(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.set_materialize_grads(False)  # or each backward would fill zeros for the outputs nobody differentiates
    ctx.save_for_backward(output[2])
    ctx.dtype = inputs[0].dtype


def _scale_gradient(ctx, grad_loss, grad_rank, grad_gradient):
    (gradient,) = ctx.saved_tensors
    return (gradient * grad_loss[:, None]).to(ctx.dtype), None, None, None, None


_info_nce.register_autograd(_scale_gradient, setup_context=_keep_gradient)


def _combine_constants(combine: Tiles, sweep: dict) -> dict:
    shared = ("dim", "padded", "on_device", "running", "headroom")
    return {"block_pieces": combine.block[0]} | {name: sweep[name] for name in shared}


def _check(z_q: Tensor, k: Tensor, queue: Tensor, temperature: float | Tensor) -> None:
    for name, tensor in (("z_q", z_q), ("k", k), ("queue", queue)):
        if tensor.dtype not in _TYPE_NAMES:
            raise ValueError(f"info_nce: {name} must be fp32, fp16 or bf16, not {tensor.dtype}")
        if tensor.dim() != 2 or tensor.shape[0] < 1:
            raise ValueError(f"info_nce: {name} must be [rows, D] with at least one row, not {tuple(tensor.shape)}")
        if tensor.device != z_q.device:
            raise ValueError(f"info_nce: {name} is on {tensor.device}, z_q on {z_q.device}")
    n, dim = z_q.shape
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


def info_nce(
    z_q: Tensor,
    k: Tensor,
    queue: Tensor,
    temperature: float | Tensor,
    *,
    impl: Literal["auto", "triton", "reference"] = "auto",
) -> tuple[Tensor, Tensor]:
    """Loss of each query against its positive and every key of the queue, and how many keys outscore the positive.

    z_q: raw projections [N, D], normalised here; k: their positives [N, D]; queue: negatives [K, D], contiguous; k and
    queue hold unit vectors. All fp32, fp16 or bf16, D a multiple of 16 up to 512. The queue's dtype is the dtype of
    the products. temperature: a positive number, or a 0-d float tensor on the same device, which is never read back
    and therefore takes the form with a running maximum (as do numbers below 0.025, and fp16 queues).

    Returns (loss fp32 [N], rank int32 [N]); top-k accuracy is (rank < k). Differentiable in z_q, once.
    Raises ValueError for anything else. After He et al., "Momentum Contrast", 2020, equation 1.
    """
    _check(z_q, k, queue, temperature)
    if impl == "reference" or (impl == "auto" and not z_q.is_cuda):
        return reference.info_nce(z_q, k, queue, temperature)
    on_device = isinstance(temperature, Tensor)
    device_temperature = temperature.detach().float() if on_device else None
    loss, rank, _ = _info_nce(
        z_q.contiguous(),
        k.detach().contiguous(),
        queue.detach(),
        0.0 if on_device else float(temperature),
        device_temperature,
    )
    return loss, rank


def scratch_bytes(n: int, size: int, dim: int, queue_dtype: torch.dtype, device: torch.device, running: bool) -> int:
    """Bytes one call allocates beyond its loss and rank: the partial sums, the positives and the stored gradient."""
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
    found = [_sweep_variant(arch, dim, dtype) for dtype in (bf16, fp32) for dim in widths]
    found += [_sweep_variant(arch, dim, fp16, running=True, whole=False) for dim in widths]
    found += [_sweep_variant(arch, dim, fp32, running=True, whole=False) for dim in (128, 512)]
    found.append(_sweep_variant(arch, 128, bf16, running=True, on_device=True))
    found += [_sweep_variant(arch, 128, bf16, k="fp32"), _sweep_variant(arch, 128, fp16, running=True, k="fp32")]
    return found + [_combine_variant(arch, 128, False), _combine_variant(arch, 512, True, k="fp32")]


def _sweep_variant(
    arch: int,
    dim: int,
    dtype: torch.dtype,
    *,
    running: bool = False,
    on_device: bool = False,
    whole: bool = True,
    k: str = "",
) -> Variant:
    tile = _sweep_tiles(dim, dtype, arch)
    constants = _sweep_constants(tile, dim, dtype, whole=whole, on_device=on_device, running=running)
    name = _TYPE_NAMES[dtype]
    types = [f"*{name}", f"*{k or name}", f"*{name}", "*fp32" if on_device else "fp32"]
    types += ["*fp32", "*fp32", "*i32", "*fp32", "*fp32"]
    label = f"info_nce.sweep {name} D={dim}" + " running" * running + " ragged" * (not whole) + f" k={k}" * bool(k)
    low = dtype is not torch.float32
    return _variant(label, _sweep_kernel, types + ["i32"] * 3, constants, tile, native_mma=low)


def _combine_variant(arch: int, dim: int, running: bool, k: str = "bf16") -> Variant:
    tile = tiles("info_nce.combine", arch)
    sweep = {"dim": dim, "padded": _padded(dim), "on_device": False, "running": running, "headroom": 0}
    types = ["*bf16", f"*{k}", "fp32", "*fp32", "*fp32", "*i32", "*fp32", "*fp32", "*fp32", "*i32", "*fp32"]
    label = f"info_nce.combine D={dim}" + " running" * running
    return _variant(label, _combine_kernel, types + ["i32"] * 2, _combine_constants(tile, sweep), tile)


def _variant(label: str, fn, types: list[str], constants: dict, tile: Tiles, native_mma: bool = False) -> Variant:
    arguments = fn.arg_names
    signature = dict(zip(arguments, types + ["constexpr"] * len(constants), strict=True))
    return Variant(label, fn, signature, constants, tile.num_warps, tile.num_stages, native_mma=native_mma)
