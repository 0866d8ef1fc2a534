"""What the compiled loops share: compiling once, torch's own threads, tensors as arrays, bf16.

A loop is cut into pieces by the shapes alone. Each piece writes its own results, and pieces are added in their order:
so the bits do not depend on who computes which piece, or on how many threads there are. Whoever is free takes the next
piece, so that a thread that had to give its core away holds up one piece and not its share of the loop.

The threads are those of torch's OpenMP, which lends them through `GOMP_parallel`: as many as torch.get_num_threads()
says, and none beside torch's own. In a forked child it is as with torch: one thread works, several wait forever.

numba keeps what it compiled in NUMBA_CACHE_DIR, or beside these files, or in the user's folder for caches. Where it may
write to none of them, each process compiles for itself. What cannot be read there is compiled and written anew.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core.caching import FunctionCache
from numba.extending import intrinsic

from fastmoco.kernels import reference

OPTIONS: dict[str, Any] = {"error_model": "numpy", "fastmath": {"contract"}}
"""For all loops: no checks of divisors, and multiply-adds where LLVM sees them; NaN and infinity keep their meaning."""

part = functools.partial(numba.njit, **OPTIONS)
"""Decorator of what loops call."""


@functools.cache
def _source() -> str:
    # numba looks for a changed file of a loop alone, and not of what the loop calls; so that is in its arguments' type.
    files = [*Path(__file__).parent.glob("*.py"), Path(reference.__file__)]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(files))).hexdigest()[:16]


class Words:
    """Named arguments of a loop, each of 8 bytes: `integers`, which are addresses or whole numbers, then `floats`.

    Three come before them: the number of the next piece, that of pieces done, and that of all pieces.
    """

    def __init__(self, integers: str, floats: str = "") -> None:
        names: list[tuple[str, Any, Any]] = [
            (name, ctypes.c_int64, types.int64) for name in ("next ended pieces " + integers).split()
        ]
        names += [(name, ctypes.c_double, types.float64) for name in floats.split()]
        self.structure = type("Words", (ctypes.Structure,), {"_fields_": [(name, c) for name, c, _ in names]})
        names.append((f"source_{_source()}", ctypes.c_int64, types.int64))
        self.pointer = types.CPointer(types.Record.make_c_struct([(name, number) for name, _, number in names]))


class Loop:
    """A function of a pointer to `words`, compiled at its first call and run piece by piece on torch's threads."""

    def __init__(self, function: Callable, words: Words) -> None:
        self._function, self._words = function, words
        functools.update_wrapper(self, function)

    @functools.cached_property
    def _address(self) -> Any:
        compiled = functools.partial(numba.cfunc, types.void(self._words.pointer), **OPTIONS)
        try:
            try:
                self._compiled = compiled(cache=True)(self._function)
            except (EOFError, pickle.UnpicklingError):  # a machine that stopped left files without their end
                FunctionCache(self._function).flush()
                self._compiled = compiled(cache=True)(self._function)
        except (RuntimeError, OSError):  # no folder for the cache, or none that can be written
            self._compiled = compiled()(self._function)
        return self._compiled.address

    def _filled(self, pieces: int, arguments: dict[str, Any]) -> ctypes.Structure:
        return self._words.structure(
            pieces=pieces, **{name: _word(value) for name, value in arguments.items() if value is not None}
        )

    def shared(self, pieces: int, **arguments: Any) -> Callable[[], None]:
        """The loop for threads of Python, not torch's: each that calls the result does pieces while there are any.

        What `arguments` point to must be there until then.
        """
        words, run = self._filled(pieces, arguments), _alone(self._address)
        return lambda: run(ctypes.addressof(words))

    def __call__(self, pieces: int, **arguments: Any) -> None:
        """Run all pieces; tensors are passed by their address, None as 0."""
        words = self._filled(pieces, arguments)
        threads = min(torch.get_num_threads(), pieces)
        address, at = self._address, ctypes.addressof(words)
        parallel = _parallel() if threads > 1 else None
        if parallel is not None:
            parallel(address, at, threads, 0)
        else:
            _alone(address)(at)


def loop(words: Words) -> Callable[[Callable], Loop]:
    """Decorator: the function, given a pointer to `words`, does the pieces that `take` gives it."""
    return lambda function: Loop(function, words)


def _word(value: Any) -> int | float:
    if not isinstance(value, torch.Tensor):
        return value
    if not value.is_cpu or value.is_neg():  # whose memory a loop cannot read, or would take for what it is not
        raise ValueError(f"a compiled loop was given a tensor on {value.device}, or one that is a negated view")
    return value.data_ptr()


@functools.cache
def _parallel() -> Callable | None:
    # GNU's OpenMP, or one that offers its entry points, as torch has loaded it; elsewhere one thread does the work.
    try:
        parallel = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):
        return None
    parallel.restype, parallel.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    return parallel


@functools.cache
def _alone(address: int) -> Callable:
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)


def _count(word: int, order: str) -> Any:
    @intrinsic
    def count(typing_context, words):
        def generate(context, builder, signature, arguments):
            counter = builder.gep(
                builder.bitcast(arguments[0], ir.IntType(64).as_pointer()), [ir.Constant(ir.IntType(64), word)]
            )
            return builder.atomic_rmw("add", counter, ir.Constant(ir.IntType(64), 1), order)

        return types.int64(words), generate

    return count


take = _count(0, "monotonic")
"""The number of the next piece of `words`, which nobody else gets."""
_end = _count(1, "acq_rel")


@part
def last(words, pieces):
    """To be called once after each piece: whether all others have ended, so that what they wrote can be read."""
    return _end(words) == pieces - 1


@intrinsic
def _pointer(typing_context, address, dtype):
    pointer = types.CPointer(dtype.dtype)

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(pointer))

    return pointer(types.int64, dtype), generate


def _at(dtype: type) -> Callable:
    # numba itself gives an intrinsic its typing context.
    return numba.njit(lambda address: _pointer(address, dtype), inline="always")  # type: ignore[call-overload,call-arg]


# Pointers and not arrays: numba looks whether an array's index is negative, and then LLVM makes no vectors of a loop.
floats, halves, bytes_, whole, longs, doubles = map(
    _at, (np.float32, np.uint16, np.uint8, np.int32, np.int64, np.float64)
)
"""Pointers to numbers at an address: fp32, bf16 as its bits, uint8, int32, int64, fp64."""


@intrinsic
def alike(typing_context, pointer, address):
    """A pointer of the type of `pointer`, to another address."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[1], context.get_value_type(pointer))

    return pointer(pointer, types.int64), generate


@intrinsic
def _as_float(typing_context, bits):
    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


def bf16_bits(builder: ir.IRBuilder, number: ir.Value) -> ir.Value:
    """The bits of fp32, a number or a vector, rounded to bf16: to the nearest, ties to even.

    NaN loses its lower bits instead: rounded up, it might become 0. It stays NaN if it is what arithmetic gives, whose
    NaN is quiet, that is, has the upper half's bit 0x40.
    """
    lanes = getattr(number.type, "count", None)

    def integers(bits: int) -> ir.Type:
        return ir.VectorType(ir.IntType(bits), lanes) if lanes else ir.IntType(bits)

    def constant(value: int) -> ir.Constant:
        return ir.Constant(integers(32), [value] * lanes if lanes else value)

    bits = builder.bitcast(number, integers(32))
    odd = builder.and_(builder.lshr(bits, constant(16)), constant(1))
    rounded = builder.add(bits, builder.add(odd, constant(0x7FFF)))
    # One instruction more, where a choice among the results would be two.
    is_number = builder.fcmp_ordered("ord", number, number)
    return builder.trunc(builder.lshr(builder.select(is_number, rounded, bits), constant(16)), integers(16))


@intrinsic
def _as_bits(typing_context, number):
    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate


@intrinsic
def _to_bf16(typing_context, number):
    return types.uint16(types.float32), lambda context, builder, signature, given: bf16_bits(builder, given[0])


def widen(x):
    """A number of a loop's tensors as fp32: of bf16 from its bits, of fp32 itself."""
    raise NotImplementedError("only in compiled loops")


def narrow(x, like):
    """fp32 rounded to the type that `like` points to: bf16 to the nearest, ties to even.

    NaN that numbers gave stays NaN, but one that was given with its largest bits becomes 0. `narrow_or_nan` keeps that,
    too, and with it the loop that augments takes 1.6 times as long.
    """
    raise NotImplementedError("only in compiled loops")


def narrow_or_nan(x, like):
    """As `narrow`, and any NaN stays NaN once there was arithmetic with it."""
    raise NotImplementedError("only in compiled loops")


@numba.extending.overload(widen, inline="always")
def _widen(x):
    if x == types.float32:
        return lambda x: x
    return lambda x: _as_float(np.uint32(x) << np.uint32(16))


@numba.extending.overload(narrow, inline="always")
def _narrow(x, like):
    if like.dtype == types.float32:
        return lambda x, like: x

    def to_bf16(x, like):
        bits = _as_bits(x)
        return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))

    return to_bf16


@numba.extending.overload(narrow_or_nan, inline="always")
def _narrow_or_nan(x, like):
    if like.dtype == types.float32:
        return lambda x, like: x
    return lambda x, like: _to_bf16(x)


@part
def times(value, slope):
    """Their product; of slope 0, which evaluation has, 0 also where the value is infinite or NaN."""
    return value * slope if slope != 0 else np.float32(0)
