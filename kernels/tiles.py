"""Block sizes, warps and pipeline stages of every kernel, one row per GPU architecture, each with its reason.

The rows were chosen by arithmetic and by `python -m fastmoco.kernels.inspect` (registers, spills, shared memory,
resident blocks); `python -m fastmoco.bench tune` measures and proposes new ones. A kernel with several phases, or
with one row per width, has one entry per phase, named `kernel.phase`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

ARCHITECTURES = (80, 90, 100)


@dataclass(frozen=True)
class Tiles:
    """What one launch needs besides its arguments. `block` lists sizes in the order the kernel's entry documents."""

    block: tuple[int, ...]
    num_warps: int
    num_stages: int
    why: str


@dataclass(frozen=True)
class Variant:
    """One compilation of one Triton function, as `inspect` compiles it and as production launches it.

    `signature` maps every argument in order to its Triton type ("*bf16", "i32", "fp32", or "constexpr");
    `constexprs` gives the values of the latter. Pointers are taken as 16-byte aligned, as torch allocates them;
    `divisible` names the integer arguments that are multiples of 16 in production. `streaming` kernels live on
    memory bandwidth and must leave room for two resident blocks per multiprocessor.
    """

    name: str
    fn: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    divisible: tuple[str, ...] = ()
    streaming: bool = False


VariantsHook = Callable[[int], list[Variant]]  # each kernel file's `variants(arch)`, arch 80, 90 or 100

# kernel -> architecture -> row. A row serves every newer architecture up to the next row.
TABLE: dict[str, dict[int, Tiles]] = {
    # block: keys a program copies. Two blocks of 64 rows x 128 columns keep 16-byte accesses in flight.
    "enqueue": {
        80: Tiles((16,), 4, 1, "16 rows x 128 bf16 = 4 KB, 32 bytes a thread; a batch of 256 keys gives 16 blocks"),
    },
}


def tiles(kernel: str, capability: tuple[int, int] | int | None = None) -> Tiles:
    """The row of `kernel` for a device capability ((9, 0) or 90), from the nearest architecture not newer.

    `None` (the interpreter on a CPU) takes the sm_90 row; a device older than every row takes the oldest.
    Raises KeyError for a kernel that has no entry.
    """
    rows = TABLE[kernel]
    if capability is None:
        capability = 90
    arch = capability if isinstance(capability, int) else 10 * capability[0] + capability[1]
    return rows[max((known for known in rows if known <= arch), default=min(rows))]
