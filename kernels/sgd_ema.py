"""SGD with momentum, the momentum (EMA) update of the key encoder and the casts to both working copies, in one pass.

All parameters of a model are updated by one launch. Each is a record in a table in device memory (addresses of its
tensors, size, dtypes); a second table cuts the parameters into chunks, and each program looks up its chunk there.
Addresses are compared on every call and the records sent again only where one has changed, so gradients may move.

A gradient that holds an infinity or NaN anywhere must stop the update everywhere, so a first launch reads all
gradients and leaves its verdict in device memory, where every program of the second launch finds it. That costs one
more read of the gradients, 2 bytes a parameter at bf16 on top of the update's own 32. The update walks the chunks
backwards, so that it meets first the gradients that the check has just left in the L2 cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmoco.kernels import reference
from fastmoco.kernels.tensor_table import COLUMNS, KINDS, WORK_DTYPES, DeviceTable, Tensors, TensorTable, check_like, table_of
from fastmoco.kernels.tiles import Tiles, Variant, tiles

Impl = Literal["auto", "triton", "reference"]
_Q, _VELOCITY, _K, _Q_WORK, _K_WORK, _GRAD, _SIZE, _KINDS = (tl.constexpr(column) for column in range(8))
_COLUMNS = tl.constexpr(COLUMNS)
_FP32, _BF16, _FP16 = (tl.constexpr(KINDS[dtype]) for dtype in WORK_DTYPES)
# A parameter: check 2 | unscale 1, decay 2, momentum 2, step 2 | lerp 3.
CHECK_FLOPS, SGD_FLOPS, EMA_FLOPS = 2, 7, 3


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

    This is `torch.optim.SGD` (momentum, no dampening, no Nesterov) followed by MoCo's momentum update with the new q.
    `grads`: one per entry, float32, bfloat16 or float16, with the strides of the entry; divided by `grad_scale` where
    given. Scalars are floats or one-element tensors on the table's device; of a float `ema_momentum`, 1 - m is taken
    in double precision. If any gradient holds an infinity or NaN nothing changes but `nonfinite` (int32 [1]), which
    becomes 1; it is never cleared here.

    Raises ValueError for a gradient or scalar of wrong count, shape, strides, dtype or device.
    """
    scalars = (lr, momentum, weight_decay, ema_momentum, 1.0 if grad_scale is None else grad_scale)
    on_device, numbers = _split_scalars(scalars)
    _sgd_ema(table.handle, _use_triton(impl, table.device), table.q, table.velocity, table.k, table.q_casts,
             table.k_casts, list(grads), on_device, numbers, nonfinite)  # fmt: skip


def ema(table: TensorTable, ema_momentum: float | Tensor, impl: Impl = "auto") -> None:
    """The momentum update alone, in place: k = m k + (1 - m) q, and the cast to `k_work`.

    Raises ValueError for a scalar of wrong shape or device.
    """
    on_device, numbers = _split_scalars((ema_momentum,))
    _ema(table.handle, _use_triton(impl, table.device), table.q, table.k, table.k_casts, on_device, numbers)


def cost(table: TensorTable, grads: Sequence[Tensor] | None = None) -> tuple[int, int]:
    """Bytes moved and arithmetic done by `sgd_ema`, or by `ema` where no gradients are given. Meta tensors will do.

    Bytes are those of the tensors, each gradient counted twice (check and update) as if no cache kept it; records
    and chunks come to less than 0.1 % and are left out. At bf16 that is 34 a parameter for `sgd_ema`, 14 for `ema`.
    """
    size = sum(q.numel() for q in table.q)
    k_casts = sum(_bytes(copy) for copy in table.k_casts)
    if grads is None:
        return sum(_bytes(q) + 2 * _bytes(k) for q, k in zip(table.q, table.k, strict=True)) + k_casts, size * EMA_FLOPS
    masters = sum(2 * _bytes(tensor) for group in (table.q, table.velocity, table.k) for tensor in group)
    casts = k_casts + sum(_bytes(copy) for copy in table.q_casts)
    moved = masters + casts + 2 * sum(_bytes(grad) for grad in grads)
    return moved, size * (CHECK_FLOPS + SGD_FLOPS + EMA_FLOPS)


def variants(arch: int) -> list[Variant]:
    """The three kernels as production compiles them: learning rate on the device, the rest floats."""
    row = tiles("sgd_ema", arch)
    tables = {"records": "*i64", "chunks": "*i32"}
    update = {"skip": "*i32", "nonfinite": "*i32", "lr": "*fp32", "momentum": "fp32", "weight_decay": "fp32",
              "ema_momentum": "fp32", "grad_scale": "fp32"}  # fmt: skip
    return [
        _variant("sgd_ema.check", _check_kernel, tables | {"skip": "*i32"}, row),
        _variant("sgd_ema.update", _update_kernel, tables | update, row),
        _variant("sgd_ema.ema", _ema_kernel, tables | {"ema_momentum": "fp32"}, row),
    ]


def _variant(name: str, fn: Any, signature: dict[str, str], row: Tiles) -> Variant:
    chunk, block = row.block
    constexprs = {"CHUNK": chunk, "BLOCK": block}
    signature = signature | dict.fromkeys(constexprs, "constexpr")
    return Variant(name, fn, signature, constexprs, row.num_warps, row.num_stages, streaming=True)


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
    tensors = Tensors(q, velocity, k, _merged(q, q_casts, table.q_is_work), _merged(k, k_casts, table.k_is_work))
    _check_gradients(table, grads)
    _check_flag(nonfinite, table.device)
    values = _joined_scalars(scalars, numbers, table.device)
    if use_triton:
        _launch_update(table.on_device(), tensors, grads, values, nonfinite)
    else:
        reference.sgd_ema(tensors, grads, *values[:4], nonfinite, values[4])


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
    tensors = Tensors(q, table.velocity, k, table.q_work, _merged(k, k_casts, table.k_is_work))
    (ema_momentum,) = _joined_scalars(scalars, numbers, table.device)
    if use_triton:
        _launch_ema(table.on_device(), tensors, ema_momentum)
    else:
        reference.ema(tensors, ema_momentum)


@_sgd_ema.register_fake
def _(*args: Any) -> None:
    return None


@_ema.register_fake
def _(*args: Any) -> None:
    return None


def _launch_update(
    table: DeviceTable, tensors: Tensors, grads: Sequence[Tensor], scalars: list[float | Tensor], nonfinite: Tensor
) -> None:
    if not len(table.chunks):
        return
    lr, momentum, weight_decay, ema_momentum, grad_scale = scalars
    records, grid = table.records(tensors, grads), (len(table.chunks),)
    skip = torch.zeros(1, dtype=torch.int32, device=table.device)
    with torch.cuda.device_of(skip):
        _check_kernel[grid](records, table.chunks, skip, **_options(table.row))
        _update_kernel[grid](
            records, table.chunks, skip, nonfinite, lr, momentum, weight_decay, _weight(ema_momentum), grad_scale,
            **_options(table.row),
        )  # fmt: skip


def _launch_ema(table: DeviceTable, tensors: Tensors, ema_momentum: float | Tensor) -> None:
    if not len(table.chunks):
        return
    records = table.records(tensors, None)
    with torch.cuda.device_of(records):
        grid = (len(table.chunks),)
        _ema_kernel[grid](records, table.chunks, _weight(ema_momentum), **_options(table.row))


def _options(row: Tiles) -> dict[str, Any]:
    chunk, block = row.block
    # Without fusion every rounding is the one written down: torch's.
    return {"CHUNK": chunk, "BLOCK": block, "num_warps": row.num_warps, "num_stages": row.num_stages,
            "enable_fp_fusion": False}  # fmt: skip


def _weight(ema_momentum: float | Tensor) -> float | Tensor:
    return ema_momentum if isinstance(ema_momentum, Tensor) else 1 - ema_momentum


@triton.jit
def _check_kernel(records, chunks, skip, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    record, start, left = _locate(records, chunks, tl.program_id(0), CHUNK)
    kind = (tl.load(record + _KINDS) & 3).to(tl.int32)
    if (left >= CHUNK) & (tl.load(record + _GRAD) % 16 == 0):
        poison = _poison(_address(record, _GRAD, True), kind, start, CHUNK, None, BLOCK)
    else:
        poison = _poison(_address(record, _GRAD, False), kind, start, left, left, BLOCK)
    if tl.max((poison != 0).to(tl.int32), 0) != 0:
        tl.store(skip, 1)


@triton.jit
def _poison(address, kind, start, stop, left, BLOCK: tl.constexpr):
    # Zero times a finite number is zero, and times anything else NaN, which no later sum loses.
    poison = tl.zeros([BLOCK], tl.float32)
    for offset in range(0, stop, BLOCK):
        offsets, mask = _offsets(offset, left, BLOCK)
        poison = tl.fma(_load(address, kind, start + offsets, mask), 0.0, poison)
    return poison


@triton.jit
def _update_kernel(
    records, chunks, skip, nonfinite, lr, momentum, weight_decay, ema_momentum, grad_scale,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if tl.load(skip) != 0:
        if tl.program_id(0) == 0:
            tl.store(nonfinite, 1)
    else:
        record, start, left = _locate(records, chunks, tl.num_programs(0) - 1 - tl.program_id(0), CHUNK)
        lr, momentum, weight_decay = _scalar(lr), _scalar(momentum), _scalar(weight_decay)
        weight, unscale = _ema_weight(ema_momentum), tl.div_rn(1.0, _scalar(grad_scale))
        if (left >= CHUNK) & _aligned(record, True):
            _update_chunk(record, start, CHUNK, None, lr, momentum, weight_decay, weight, unscale, True, BLOCK)
        else:
            _update_chunk(record, start, left, left, lr, momentum, weight_decay, weight, unscale, False, BLOCK)


@triton.jit
def _update_chunk(
    record, start, stop, left, lr, momentum, weight_decay, weight, unscale, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):
    masters = tl.pointer_type(tl.float32)
    q_at = _address(record, _Q, ALIGNED).to(masters) + start
    velocity_at = _address(record, _VELOCITY, ALIGNED).to(masters) + start
    k_at = _address(record, _K, ALIGNED).to(masters) + start
    grad_at, kinds = _address(record, _GRAD, ALIGNED), tl.load(record + _KINDS).to(tl.int32)
    q_work_at, k_work_at = _address(record, _Q_WORK, ALIGNED), _address(record, _K_WORK, ALIGNED)
    for offset in range(0, stop, BLOCK):
        offsets, mask = _offsets(offset, left, BLOCK)
        q = tl.load(q_at + offsets, mask=mask)
        velocity = tl.load(velocity_at + offsets, mask=mask)
        k = tl.load(k_at + offsets, mask=mask)
        grad = _load(grad_at, kinds & 3, start + offsets, mask) * unscale
        velocity = velocity * momentum + tl.fma(q, weight_decay, grad)
        q = tl.fma(velocity, -lr, q)
        k = _lerp(k, q, weight)
        tl.store(velocity_at + offsets, velocity, mask=mask)
        tl.store(q_at + offsets, q, mask=mask)
        tl.store(k_at + offsets, k, mask=mask)
        _store(q_work_at, (kinds >> 2) & 3, start + offsets, q, mask)
        _store(k_work_at, (kinds >> 4) & 3, start + offsets, k, mask)


@triton.jit
def _ema_kernel(records, chunks, ema_momentum, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    record, start, left = _locate(records, chunks, tl.program_id(0), CHUNK)
    weight = _ema_weight(ema_momentum)
    if (left >= CHUNK) & _aligned(record, False):
        _ema_chunk(record, start, CHUNK, None, weight, True, BLOCK)
    else:
        _ema_chunk(record, start, left, left, weight, False, BLOCK)


@triton.jit
def _ema_chunk(record, start, stop, left, weight, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    masters = tl.pointer_type(tl.float32)
    q_at = _address(record, _Q, ALIGNED).to(masters) + start
    k_at = _address(record, _K, ALIGNED).to(masters) + start
    k_work_at, kind = _address(record, _K_WORK, ALIGNED), (tl.load(record + _KINDS).to(tl.int32) >> 4) & 3
    for offset in range(0, stop, BLOCK):
        offsets, mask = _offsets(offset, left, BLOCK)
        k = _lerp(tl.load(k_at + offsets, mask=mask), tl.load(q_at + offsets, mask=mask), weight)
        tl.store(k_at + offsets, k, mask=mask)
        _store(k_work_at, kind, start + offsets, k, mask)


@triton.jit
def _locate(records, chunks, index, CHUNK: tl.constexpr):
    record = records + tl.load(chunks + 2 * index).to(tl.int64) * _COLUMNS
    start = tl.load(chunks + 2 * index + 1).to(tl.int64) * CHUNK
    left = tl.minimum(tl.load(record + _SIZE) - start, CHUNK).to(tl.int32)
    return record, start, left


@triton.jit
def _address(record, column: tl.constexpr, ALIGNED: tl.constexpr):
    address = tl.load(record + column)
    if ALIGNED:
        address = (address >> 4) << 4  # changes nothing; lets the compiler see that 16-byte accesses are legal
    return address


@triton.jit
def _aligned(record, UPDATE: tl.constexpr):
    bits = tl.load(record + _Q) | tl.load(record + _K) | tl.load(record + _K_WORK)
    if UPDATE:
        bits |= tl.load(record + _VELOCITY) | tl.load(record + _Q_WORK) | tl.load(record + _GRAD)
    return bits % 16 == 0


@triton.jit
def _offsets(offset, left, BLOCK: tl.constexpr):
    offsets = offset + tl.arange(0, BLOCK)
    if left is None:
        mask = None
    else:
        mask = offsets < left
    return offsets, mask


@triton.jit
def _load(address, kind, offsets, mask):
    if kind == _FP32:
        x = tl.load(address.to(tl.pointer_type(tl.float32)) + offsets, mask=mask)
    elif kind == _BF16:
        x = tl.load(address.to(tl.pointer_type(tl.bfloat16)) + offsets, mask=mask).to(tl.float32)
    else:
        x = tl.load(address.to(tl.pointer_type(tl.float16)) + offsets, mask=mask).to(tl.float32)
    return x


@triton.jit
def _store(address, kind, offsets, x, mask):
    if kind == _FP32:
        tl.store(address.to(tl.pointer_type(tl.float32)) + offsets, x, mask=mask)
    elif kind == _BF16:
        tl.store(address.to(tl.pointer_type(tl.bfloat16)) + offsets, x.to(tl.bfloat16), mask=mask)
    elif kind == _FP16:
        tl.store(address.to(tl.pointer_type(tl.float16)) + offsets, x.to(tl.float16), mask=mask)


@triton.jit
def _lerp(k, q, weight):
    # Torch's form: exact at both ends (m = 1 keeps k, m = 0 copies q) and where k equals q.
    near = weight < 0.5
    return tl.fma(q - k, tl.where(near, weight, weight - 1), tl.where(near, k, q))


@triton.jit
def _scalar(x):
    x = tl.to_tensor(x)
    if x.dtype.is_ptr():
        x = tl.load(x)
    return x.to(tl.float32)


@triton.jit
def _ema_weight(x):
    # A float arrives as 1 - m already, taken in double precision.
    x = tl.to_tensor(x)
    if x.dtype.is_ptr():
        x = 1 - tl.load(x)
    return x.to(tl.float32)


def _use_triton(impl: Impl, device: torch.device) -> bool:
    if impl not in ("auto", "triton", "reference"):
        raise ValueError(f'impl is {impl!r}, expected "auto", "triton" or "reference"')
    return impl == "triton" or (impl == "auto" and device.type == "cuda")


def _split_scalars(scalars: Sequence[float | Tensor]) -> tuple[list[Tensor | None], list[float]]:
    on_device = [scalar if isinstance(scalar, Tensor) else None for scalar in scalars]
    return on_device, [0.0 if isinstance(scalar, Tensor) else float(scalar) for scalar in scalars]


def _joined_scalars(
    scalars: Sequence[Tensor | None], numbers: Sequence[float], device: torch.device
) -> list[float | Tensor]:
    for scalar in scalars:
        if scalar is not None and (scalar.numel() != 1 or scalar.device != device or not scalar.is_floating_point()):
            found = f"{scalar.dtype} {tuple(scalar.shape)} on {scalar.device}"
            raise ValueError(f"a scalar is a float or one floating-point element on {device}, not {found}")
    return [number if scalar is None else scalar for scalar, number in zip(scalars, numbers, strict=True)]


def _merged(masters: Sequence[Tensor], casts: Sequence[Tensor], is_work: Sequence[bool]) -> list[Tensor]:
    remaining = iter(casts)
    return [master if same else next(remaining) for master, same in zip(masters, is_work, strict=True)]


def _check_gradients(table: TensorTable, grads: Sequence[Tensor]) -> None:
    if len(grads) != len(table):
        raise ValueError(f"{len(grads)} gradients for a table of {len(table)} entries")
    for index, (grad, q) in enumerate(zip(grads, table.q, strict=True)):
        if grad.dtype not in WORK_DTYPES and grad.dtype != q.dtype:
            raise ValueError(f"gradient {index} is {grad.dtype}, expected {' or '.join(map(str, WORK_DTYPES))}")
        check_like(f"gradient {index}", grad, q, table.device)


def _check_flag(nonfinite: Tensor, device: torch.device) -> None:
    if nonfinite.dtype != torch.int32 or nonfinite.numel() != 1 or nonfinite.device != device:
        found = f"{nonfinite.dtype} {tuple(nonfinite.shape)} on {nonfinite.device}"
        raise ValueError(f"nonfinite is {found}, expected torch.int32 (1,) on {device}")


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
