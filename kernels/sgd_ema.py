"""SGD with momentum, the momentum (EMA) update of the key encoder and the casts to both working copies, in one pass.

All parameters of a model are updated by one launch. Each is a record in a table in device memory (addresses of its
tensors, size, dtypes); a second table cuts the parameters into chunks, and each program looks up its chunk there.
Addresses are compared on every call and the records sent again only where one has changed, so gradients may move.

A gradient that holds an infinity or NaN anywhere must stop the update everywhere, so a first launch reads all
gradients and leaves its verdict in device memory, where every program of the second launch finds it. With bf16
gradients and copies the update moves 30 bytes a parameter (reads 14, writes 16) and the check 2 more; with fp32
gradients 32 and 4. Without a key encoder what touches k is compiled out, and both come to 22. The update walks the
chunks backwards, so that it meets first the gradients that the check has just left in the L2 cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmoco.kernels import reference
from fastmoco.kernels.dispatch import Impl, cast, is_traced, launch_options, takes_kernel, variant
from fastmoco.kernels.tensor_table import COLUMNS, KINDS, WORK_DTYPES, Tensors, TensorTable, check_like, table_of
from fastmoco.kernels.tiles import Tiles, Variant, tiles

_Q, _VELOCITY, _K, _Q_WORK, _K_WORK, _GRAD, _SIZE, _KINDS = (tl.constexpr(column) for column in range(8))
_COLUMNS = tl.constexpr(COLUMNS)
_FP32, _BF16, _FP16 = (tl.constexpr(KINDS[dtype]) for dtype in WORK_DTYPES)
# A parameter: check 2 | unscale 1, decay 2, momentum 2, step 2 | lerp 3.
CHECK_FLOPS, SGD_FLOPS, EMA_FLOPS = 2, 7, 3


@triton.jit
def _locate(records, chunks, index, CHUNK: tl.constexpr):
    record = records + tl.load(chunks + 2 * index).to(tl.int64) * _COLUMNS
    start = tl.load(chunks + 2 * index + 1).to(tl.int64) * CHUNK
    length = tl.minimum(tl.load(record + _SIZE) - start, CHUNK).to(tl.int32)
    return record, start, length


@triton.jit
def _kind(record, bit: tl.constexpr):
    return (tl.load(record + _KINDS).to(tl.int32) >> bit) & 3


@triton.jit
def _is_aligned(record, UPDATE: tl.constexpr):
    bits = tl.load(record + _Q) | tl.load(record + _K) | tl.load(record + _K_WORK)
    if UPDATE:
        bits |= tl.load(record + _VELOCITY) | tl.load(record + _Q_WORK) | tl.load(record + _GRAD)
    return bits % 16 == 0


@triton.jit
def _pointer(address, start, mask, DTYPE: tl.constexpr):
    pointer = address.to(tl.pointer_type(DTYPE))
    if mask is None:  # a whole chunk of aligned tensors
        pointer = tl.multiple_of(pointer, 16)
    return pointer + start


@triton.jit
def _load(address, start, offsets, kind, mask):
    other: tl.constexpr = None if mask is None else 0.0  # or the check might find a NaN where nothing was read
    if kind == _FP32:
        x = tl.load(_pointer(address, start, mask, tl.float32) + offsets, mask=mask, other=other)
    elif kind == _BF16:
        x = tl.load(_pointer(address, start, mask, tl.bfloat16) + offsets, mask=mask, other=other).to(tl.float32)
    else:
        x = tl.load(_pointer(address, start, mask, tl.float16) + offsets, mask=mask, other=other).to(tl.float32)
    return x


@triton.jit
def _store(address, start, offsets, x, kind, mask):
    if kind == _FP32:
        tl.store(_pointer(address, start, mask, tl.float32) + offsets, x, mask=mask)
    elif kind == _BF16:
        tl.store(_pointer(address, start, mask, tl.bfloat16) + offsets, cast(x, tl.bfloat16), mask=mask)
    elif kind == _FP16:
        tl.store(_pointer(address, start, mask, tl.float16) + offsets, cast(x, tl.float16), mask=mask)


@triton.jit
def _lerp(k, q, weight):
    # Torch's form: exact at both ends (m = 1 keeps k, m = 0 copies q) and where k equals q.
    near = weight < 0.5
    return tl.fma(q - k, tl.where(near, weight, weight - 1), tl.where(near, k, q))


@triton.jit
def _scalar(x, ON_DEVICE: tl.constexpr):
    if ON_DEVICE:
        x = tl.load(x).to(tl.float32)
    else:
        x = tl.full([], x, tl.float32)
    return x


@triton.jit
def _ema_weight(x, ON_DEVICE: tl.constexpr):
    if ON_DEVICE:
        x = (1 - tl.load(x)).to(tl.float32)
    else:
        x = tl.full([], x, tl.float32)  # 1 - m already, taken in double precision
    return x


@triton.jit
def _poison(record, start, length, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    address, kind = tl.load(record + _GRAD), _kind(record, 0)
    poison = tl.zeros([BLOCK], tl.float32)
    for offset in range(0, CHUNK if length is None else length, BLOCK):
        offsets = offset + tl.arange(0, BLOCK)
        mask = None if length is None else offsets < length
        # Zero times a finite number is zero, and times anything else NaN, which no later sum loses.
        poison = tl.fma(_load(address, start, offsets, kind, mask), 0.0, poison)
    return tl.max((poison != 0).to(tl.int32), 0) != 0


@triton.jit
def _check_kernel(records, chunks, skip, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    record, start, length = _locate(records, chunks, tl.program_id(0), CHUNK)
    if (length == CHUNK) & (tl.load(record + _GRAD) % 16 == 0):
        bad = _poison(record, start, None, CHUNK, BLOCK)
    else:
        bad = _poison(record, start, length, CHUNK, BLOCK)
    if bad:
        tl.store(skip, 1)


@triton.jit
def _update_chunk(
    record,
    start,
    length,
    lr,
    momentum,
    decay,
    weight,
    unscale,
    KEYS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    q_at, velocity_at, k_at = tl.load(record + _Q), tl.load(record + _VELOCITY), tl.load(record + _K)
    q_work_at, k_work_at, grad_at = tl.load(record + _Q_WORK), tl.load(record + _K_WORK), tl.load(record + _GRAD)
    grad_kind, q_kind, k_kind = _kind(record, 0), _kind(record, 2), _kind(record, 4)
    for offset in range(0, CHUNK if length is None else length, BLOCK):
        offsets = offset + tl.arange(0, BLOCK)
        mask = None if length is None else offsets < length
        q = _load(q_at, start, offsets, _FP32, mask)
        velocity = _load(velocity_at, start, offsets, _FP32, mask)
        if KEYS:
            k = _load(k_at, start, offsets, _FP32, mask)
        grad = _load(grad_at, start, offsets, grad_kind, mask) * unscale
        velocity = velocity * momentum + tl.fma(q, decay, grad)
        q = tl.fma(velocity, -lr, q)
        _store(velocity_at, start, offsets, velocity, _FP32, mask)
        _store(q_at, start, offsets, q, _FP32, mask)
        _store(q_work_at, start, offsets, q, q_kind, mask)
        if KEYS:
            k = _lerp(k, q, weight)
            _store(k_at, start, offsets, k, _FP32, mask)
            _store(k_work_at, start, offsets, k, k_kind, mask)


@triton.jit
def _update_kernel(
    records,
    chunks,
    skip,
    nonfinite,
    lr,
    momentum,
    weight_decay,
    ema_momentum,
    grad_scale,
    ON_DEVICE: tl.constexpr,
    KEYS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    record, start, length = _locate(records, chunks, tl.num_programs(0) - 1 - tl.program_id(0), CHUNK)
    if tl.load(skip) != 0:
        if tl.program_id(0) == 0:
            tl.store(nonfinite, 1)
    else:
        rate, friction = _scalar(lr, ON_DEVICE & 1), _scalar(momentum, ON_DEVICE & 2)
        decay, weight = _scalar(weight_decay, ON_DEVICE & 4), _ema_weight(ema_momentum, ON_DEVICE & 8)
        unscale = tl.div_rn(1.0, _scalar(grad_scale, ON_DEVICE & 16))
        if (length == CHUNK) & _is_aligned(record, True):
            _update_chunk(record, start, None, rate, friction, decay, weight, unscale, KEYS, CHUNK, BLOCK)
        else:
            _update_chunk(record, start, length, rate, friction, decay, weight, unscale, KEYS, CHUNK, BLOCK)


@triton.jit
def _ema_chunk(record, start, length, weight, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    q_at, k_at, k_work_at = tl.load(record + _Q), tl.load(record + _K), tl.load(record + _K_WORK)
    kind = _kind(record, 4)
    for offset in range(0, CHUNK if length is None else length, BLOCK):
        offsets = offset + tl.arange(0, BLOCK)
        mask = None if length is None else offsets < length
        k = _load(k_at, start, offsets, _FP32, mask)
        k = _lerp(k, _load(q_at, start, offsets, _FP32, mask), weight)
        _store(k_at, start, offsets, k, _FP32, mask)
        _store(k_work_at, start, offsets, k, kind, mask)


@triton.jit
def _ema_kernel(records, chunks, ema_momentum, ON_DEVICE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    record, start, length = _locate(records, chunks, tl.program_id(0), CHUNK)
    weight = _ema_weight(ema_momentum, ON_DEVICE)
    if (length == CHUNK) & _is_aligned(record, False):
        _ema_chunk(record, start, None, weight, CHUNK, BLOCK)
    else:
        _ema_chunk(record, start, length, weight, CHUNK, BLOCK)


def _update(
    table: TensorTable,
    tensors: Tensors,
    use_triton: bool,
    grads: Sequence[Tensor],
    scalars: Sequence[float | Tensor],
    nonfinite: Tensor,
) -> None:
    _check_gradients(table, grads)
    _check_scalars(scalars, table.device)
    _check_flag(nonfinite, table.device)
    lr, momentum, weight_decay, ema_momentum, grad_scale = scalars
    if not use_triton:
        reference.sgd_ema(tensors, grads, lr, momentum, weight_decay, ema_momentum, nonfinite, grad_scale)
        return
    entries = table.on_device()
    records, options = entries.records(tensors, grads), _options(entries.row)
    skip = torch.zeros(1, dtype=torch.int32, device=table.device)
    with torch.cuda.device_of(skip):
        _check_kernel[entries.grid](records, entries.chunks, skip, **options)
        _update_kernel[entries.grid](
            records,
            entries.chunks,
            skip,
            nonfinite,
            lr,
            momentum,
            weight_decay,
            _weight(ema_momentum),
            grad_scale,
            ON_DEVICE=_bits(scalars),
            KEYS=table.has_keys,
            **options,
        )


def _average(table: TensorTable, tensors: Tensors, use_triton: bool, ema_momentum: float | Tensor) -> None:
    _check_scalars((ema_momentum,), table.device)
    if not use_triton:
        reference.ema(tensors, ema_momentum)
        return
    entries = table.on_device()
    records = entries.records(tensors, None)
    with torch.cuda.device_of(records):
        _ema_kernel[entries.grid](
            records,
            entries.chunks,
            _weight(ema_momentum),
            ON_DEVICE=_bits((ema_momentum,)),
            **_options(entries.row),
        )


def _options(row: Tiles) -> dict[str, Any]:
    chunk, block = row.block
    # Without fusion every rounding is the one written down: torch's.
    return {"CHUNK": chunk, "BLOCK": block, "enable_fp_fusion": False, **launch_options(row)}


def _weight(ema_momentum: float | Tensor) -> float | Tensor:
    return ema_momentum if isinstance(ema_momentum, Tensor) else 1 - ema_momentum


def _bits(scalars: Sequence[float | Tensor]) -> int:
    return sum(isinstance(scalar, Tensor) << bit for bit, scalar in enumerate(scalars))


@torch.library.custom_op("fastmoco::sgd_ema", mutates_args=("q", "velocity", "k", "q_casts", "k_casts", "nonfinite"))
def _sgd_ema(
    handle: int,
    use_triton: bool,
    q: Sequence[Tensor],
    velocity: Sequence[Tensor],
    k: Sequence[Tensor],
    q_casts: Sequence[Tensor],
    k_casts: Sequence[Tensor],
    grads: Sequence[Tensor],
    scalars: Sequence[Tensor | None],
    numbers: Sequence[float],
    nonfinite: Tensor,
) -> None:
    # The tensors are arguments, and not only the table's own, because functionalisation may hand over copies.
    table = table_of(handle)
    tensors = Tensors(q, velocity, k, _merge(q, q_casts, table.q_is_work), _merge(k, k_casts, table.k_is_work))
    _update(table, tensors, use_triton, grads, _joined_scalars(scalars, numbers), nonfinite)


@torch.library.custom_op("fastmoco::ema", mutates_args=("k", "k_casts"))
def _ema(
    handle: int,
    use_triton: bool,
    q: Sequence[Tensor],
    k: Sequence[Tensor],
    k_casts: Sequence[Tensor],
    scalars: Sequence[Tensor | None],
    numbers: Sequence[float],
) -> None:
    table = table_of(handle)
    tensors = Tensors(q, table.velocity, k, table.q_work, _merge(k, k_casts, table.k_is_work))
    _average(table, tensors, use_triton, *_joined_scalars(scalars, numbers))


@_sgd_ema.register_fake
def _(*args: Any) -> None:
    return None


@_ema.register_fake
def _(*args: Any) -> None:
    return None


def _split_scalars(scalars: Sequence[float | Tensor]) -> tuple[list[Tensor | None], list[float]]:
    on_device = [scalar if isinstance(scalar, Tensor) else None for scalar in scalars]
    return on_device, [0.0 if isinstance(scalar, Tensor) else float(scalar) for scalar in scalars]


def _joined_scalars(scalars: Sequence[Tensor | None], numbers: Sequence[float]) -> list[float | Tensor]:
    return [number if scalar is None else scalar for scalar, number in zip(scalars, numbers, strict=True)]


def _merge(masters: Sequence[Tensor], casts: Sequence[Tensor], is_work: Sequence[bool]) -> list[Tensor]:
    remaining = iter(casts)
    return [master if same else next(remaining) for master, same in zip(masters, is_work, strict=True)]


def _check_scalars(scalars: Sequence[float | Tensor], device: torch.device) -> None:
    for scalar in scalars:
        if not isinstance(scalar, Tensor):
            continue
        if scalar.numel() != 1 or scalar.device != device or not scalar.is_floating_point():
            actual = f"{scalar.dtype} {tuple(scalar.shape)} on {scalar.device}"
            raise ValueError(f"a scalar is a float or one floating-point element on {device}, not {actual}")


def _check_gradients(table: TensorTable, grads: Sequence[Tensor]) -> None:
    if len(grads) != len(table):
        raise ValueError(f"{len(grads)} gradients for a table of {len(table)} entries")
    for index, (grad, q, layout) in enumerate(zip(grads, table.q, table.layouts, strict=True)):
        if (  # nearly always, and on every step: the host's time for anything more would show
            grad is not None
            and grad.dtype in WORK_DTYPES
            and (grad.shape, grad.stride()) == layout
            and grad.device == table.device
        ):
            continue
        if grad is None:
            raise ValueError(f"gradient {index} is None: its parameter took no part in the loss")
        if grad.dtype not in WORK_DTYPES and grad.dtype != q.dtype:
            raise ValueError(f"gradient {index} is {grad.dtype}, expected {' or '.join(map(str, WORK_DTYPES))}")
        check_like(f"gradient {index}", grad, q, table.device)


def _check_flag(nonfinite: Tensor, device: torch.device) -> None:
    if nonfinite.dtype != torch.int32 or nonfinite.numel() != 1 or nonfinite.device != device:
        actual = f"{nonfinite.dtype} {tuple(nonfinite.shape)} on {nonfinite.device}"
        raise ValueError(f"nonfinite is {actual}, expected torch.int32 (1,) on {device}")


def sgd_ema(
    table: TensorTable,
    grads: Sequence[Tensor],
    lr: float | Tensor,
    momentum: float | Tensor,
    weight_decay: float | Tensor,
    ema_momentum: float | Tensor,
    nonfinite: Tensor,
    impl: Impl = "auto",
    grad_scale: Tensor | None = None,
) -> None:
    """One optimiser step, in place: g += wd q; v = momentum v + g; q -= lr v; k = m k + (1 - m) q; both casts.

    wd is `weight_decay`, m `ema_momentum`.
    This is `torch.optim.SGD` (momentum, no dampening, no Nesterov) followed by MoCo's momentum update with the new q,
    where the table has keys.
    `grads`: one per entry, float32, bfloat16 or float16, with the strides of the entry; divided by `grad_scale` where
    given. Scalars are floats or one-element tensors on the table's device; of a float `ema_momentum`, 1 - m is taken
    in double precision. If any gradient holds an infinity or NaN nothing changes but `nonfinite` (int32 [1]), which
    becomes 1; it is never cleared here.

    Raises ValueError for a gradient or scalar of wrong count, shape, strides, dtype or device.
    """
    scalars = (lr, momentum, weight_decay, ema_momentum, 1.0 if grad_scale is None else grad_scale)
    use_triton = takes_kernel(impl, table.device, table.q[0].dtype)
    if is_traced(table.q[0]):  # a thousand tensors cost an operator half a millisecond
        _sgd_ema(
            table.handle,
            use_triton,
            table.q,
            table.velocity,
            table.k,
            table.q_casts,
            table.k_casts,
            list(grads),
            *_split_scalars(scalars),
            nonfinite,
        )
    else:
        _update(table, table.tensors, use_triton, grads, scalars, nonfinite)
        outputs = (table.q, table.velocity, table.k, table.q_casts, table.k_casts, [nonfinite])
        torch.autograd.graph.increment_version([tensor for group in outputs for tensor in group])


def ema(table: TensorTable, ema_momentum: float | Tensor, impl: Impl = "auto") -> None:
    """The momentum update alone, in place: k = m k + (1 - m) q with m `ema_momentum`, and the cast to `k_work`.

    m is a number, or a tensor of one on the table's device. `TensorTable.averaging` makes a table for this.
    Raises ValueError for a scalar of wrong shape or device, or a table without keys.
    """
    if not table.has_keys:
        raise ValueError("ema: the table has no keys to move")
    use_triton = takes_kernel(impl, table.device, table.q[0].dtype)
    if is_traced(table.q[0]):  # a thousand tensors cost an operator half a millisecond
        _ema(table.handle, use_triton, table.q, table.k, table.k_casts, *_split_scalars((ema_momentum,)))
    else:
        _average(table, table.tensors, use_triton, ema_momentum)
        torch.autograd.graph.increment_version([*table.k, *table.k_casts])


def cost(table: TensorTable, grad_dtypes: Sequence[torch.dtype]) -> tuple[int, int]:
    """Bytes and floating-point operations of `sgd_ema` with gradients of these dtypes. A table of meta tensors will do.

    Bytes are those of the tensors, each gradient counted twice (check and update) as if no cache kept it; records
    and chunks come to less than 0.1 % and are left out. At bf16 that is 32 a parameter, with fp32 gradients 36; without
    keys 22 and 26.
    """
    masters = sum(2 * q.nbytes + 2 * v.nbytes for q, v in zip(table.q, table.velocity, strict=True))
    masters += sum(2 * k.nbytes for k in table.k)
    grads = sum(q.numel() * dtype.itemsize for q, dtype in zip(table.q, grad_dtypes, strict=True))
    casts = sum(copy.nbytes for copy in (*table.q_casts, *table.k_casts))
    flops = CHECK_FLOPS + SGD_FLOPS + EMA_FLOPS * table.has_keys
    return masters + 2 * grads + casts, flops * sum(q.numel() for q in table.q)


def ema_cost(table: TensorTable) -> tuple[int, int]:
    """Bytes and floating-point operations of `ema`; at bf16 14 bytes a parameter."""
    masters = sum(q.nbytes + 2 * k.nbytes for q, k in zip(table.q, table.k, strict=True))
    return masters + sum(copy.nbytes for copy in table.k_casts), EMA_FLOPS * sum(q.numel() for q in table.q)


def variants(arch: int) -> list[Variant]:
    """The kernels as production compiles them: learning rate on the device, the rest floats."""
    row = tiles("sgd_ema", arch)
    types = {"records": "*i64", "chunks": "*i32", "skip": "*i32", "nonfinite": "*i32", "lr": "*fp32"}
    types |= dict.fromkeys(("momentum", "weight_decay", "ema_momentum", "grad_scale"), "fp32")
    chunk, block = row.block
    kernels: tuple[tuple[str, Any, dict[str, Any]], ...] = (
        ("check", _check_kernel, {}),
        ("update", _update_kernel, {"ON_DEVICE": 1, "KEYS": True}),
        ("update without keys", _update_kernel, {"ON_DEVICE": 1, "KEYS": False}),
        ("ema", _ema_kernel, {"ON_DEVICE": 0}),
    )
    return [
        variant(
            f"sgd_ema.{name}",
            fn,
            row,
            types,
            constants | {"CHUNK": chunk, "BLOCK": block},
            fp_fusion=False,
            streaming=True,
        )
        for name, fn, constants in kernels
    ]
