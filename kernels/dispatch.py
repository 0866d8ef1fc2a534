"""What all kernel files share: who computes, names of dtypes, the machine, the interpreter's gaps, the compile gate.

A kernel file reads from top to bottom: what it computes and the bytes that moves, device helpers, Triton kernels,
launcher, operator and autograd, public function, `cost`, `variants`. Arguments that the compiler knows are written in
capitals, as Triton's documentation writes them, and are passed by name.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from fastmoco.kernels.tiles import Tiles, Variant

HAS_NUMBA = importlib.util.find_spec("numba") is not None
Impl = Literal["auto", "triton", "reference"]
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}  # of the dtypes that kernels take
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
INTERPRETED_PROCESSORS = 4  # so that there is something to split where there is no GPU


def takes_kernel(impl: Impl, device: torch.device, *dtypes: torch.dtype) -> bool:
    """Whether `impl` means the Triton kernel, and not its plain-torch twin, for tensors of `dtypes` on `device`.

    "auto" is the kernel on a GPU and the twin elsewhere. float64 is always the twin's: no kernel takes it. Raises
    ValueError if `impl` is unknown, or if it is "triton" and the kernel cannot run on these tensors.
    """
    if impl not in ("auto", "triton", "reference"):
        raise ValueError(f"impl must be auto, triton or reference, not {impl!r}")
    foreign = [dtype for dtype in dtypes if dtype not in NAMES]
    if impl != "triton":
        return impl == "auto" and device.type == "cuda" and not foreign
    if foreign:
        raise ValueError(f"the Triton kernel takes fp32, bf16 or fp16, not {foreign[0]}: use impl='reference'")
    if device.type != "cuda" and not INTERPRETED.value:
        raise ValueError(f"impl='triton' needs tensors on a GPU, not on {device} (or TRITON_INTERPRET=1)")
    return True


Maker = Literal["triton", "loops", "reference"]


def maker(impl: Impl, device: torch.device, dtype: torch.dtype) -> Maker:
    """Who computes, where there are compiled loops in `kernels/cpu` too: "auto" takes them on a CPU, of fp32 and bf16.

    Without numba they are not there, which a warning says, and the twin takes their place. Otherwise as `takes_kernel`.
    """
    if takes_kernel(impl, device, dtype):
        return "triton"
    if impl != "auto" or device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return "reference"
    if not HAS_NUMBA and not torch.compiler.is_compiling():  # which traces no warning
        warnings.warn(
            "batch norm, augmentation and convolutions run in plain torch, slower: pip install numba", stacklevel=2
        )
    return "loops" if HAS_NUMBA else "reference"


def by_loops(launch: Callable[..., Any], module: str) -> Callable[..., Any]:
    """What has the signature of `launch`, and calls its namesake in `kernels/cpu`, which imports numba at first."""

    @functools.wraps(launch)
    def call(*arguments: Any) -> Any:
        loops = importlib.import_module(f"fastmoco.kernels.cpu.{module}")
        return getattr(loops, launch.__name__.removeprefix("_launch_"))(*arguments)

    return call


def check_dtype(name: str, dtype: torch.dtype) -> None:
    """Raise ValueError, naming the tensor, unless a kernel (fp32, bf16, fp16) or at least its twin (fp64) takes it."""
    if dtype not in NAMES and dtype != torch.float64:
        raise ValueError(f"{name} must be fp32, bf16, fp16 or (twin only) fp64, not {dtype}")


class Machine(NamedTuple):
    """What decides tiles and grids: compute capability (None: the interpreter) and number of multiprocessors."""

    capability: tuple[int, int] | None
    processors: int


@functools.cache
def machine(device: torch.device) -> Machine:
    """The machine behind `device`."""
    if device.type != "cuda":
        return Machine(None, INTERPRETED_PROCESSORS)
    properties = torch.cuda.get_device_properties(device)
    return Machine((properties.major, properties.minor), properties.multi_processor_count)


def is_traced(tensor: Tensor) -> bool:
    """Whether a tracer looks on: then an operator must be called, which else costs the host more than the launch."""
    looked_on = torch.compiler.is_compiling() or torch.jit.is_tracing() or is_in_torch_dispatch_mode()
    return looked_on or type(tensor) not in _PLAIN


_PLAIN = (Tensor, torch.nn.Parameter)


def launch_options(row: Tiles) -> dict[str, int]:
    """The options of a launch that stand in a row of tiles."""
    return {"num_warps": row.num_warps, "num_stages": row.num_stages}


def variant(
    label: str,
    fn: Any,
    row: Tiles,
    types: dict[str, str],
    constants: dict[str, Any],
    *,
    fp_fusion: bool = True,
    streaming: bool = False,
    native_mma: bool = False,
    dependent: bool = False,
) -> Variant:
    """The compilation of `fn` at `row`: `types` has the Triton type of each argument that is not in `constants`."""
    signature = {name: "constexpr" if name in constants else types[name] for name in fn.arg_names}
    return Variant(
        label,
        fn,
        signature,
        constants,
        row.num_warps,
        row.num_stages,
        fp_fusion=fp_fusion,
        streaming=streaming,
        native_mma=native_mma,
        dependent=dependent,
    )


@triton.jit
def dot(left, right, total, PRECISION: tl.constexpr):
    """left @ right + total in fp32; a `total` of None is zero."""
    if INTERPRETED:  # the interpreter would multiply the bit patterns of bf16
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, total, input_precision=PRECISION)


@triton.jit
def cast(x, DTYPE: tl.constexpr):
    """fp32 x rounded to the nearest DTYPE, ties to even, as a GPU's own conversion does."""
    if INTERPRETED and DTYPE == tl.bfloat16:  # the interpreter truncates
        bits = x.to(tl.uint32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(DTYPE)
