"""Block sizes, warps and pipeline stages of every kernel, one row per GPU architecture, each with its reason.

The rows were chosen by arithmetic and by `python -m fastmoco.kernels.compile_gate` (registers, spills, shared memory,
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
    """One compilation of one Triton function, as the compile gate compiles it and as production launches it.

    `signature` maps every argument in order to its Triton type ("*bf16", "i32", "fp32", or "constexpr");
    `constexprs` gives the values of the latter. Pointers are taken as 16-byte aligned, as torch allocates them, and
    integers as multiples of 16, as those of the published recipes are; a launch at other sizes makes a second binary,
    which the gate compiles too. `fp_fusion`: whether the compiler may join a product and a sum. `streaming` kernels
    live on memory bandwidth and must leave room for two resident blocks per multiprocessor; `native_mma` kernels must
    use their architecture's own tensor-core instruction (mma, wgmma, tcgen05). `dependent` ones are launched before the
    kernel ahead of them has ended, and must wait for it first.
    """

    name: str
    fn: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    fp_fusion: bool = True
    streaming: bool = False
    native_mma: bool = False
    dependent: bool = False


VariantsHook = Callable[[int], list[Variant]]  # each kernel file's `variants(arch)`, arch 80, 90 or 100

# kernel -> architecture -> row. A row serves every newer architecture up to the next row.
TABLE: dict[str, dict[int, Tiles]] = {
    # block: keys a program copies.
    "enqueue": {
        80: Tiles((16,), 4, 1, "16 rows x 128 bf16 = 4 KB, 32 bytes a thread; a batch of 256 keys gives 16 blocks"),
    },
    # block: queries, keys, programs per multiprocessor (how finely the queue is cut), columns (where fewer than D, the
    # others are other programs, and each computes the scores). Sums of Q x D and Q x keys numbers live in registers.
    "info_nce.64": {
        80: Tiles((64, 64, 2, 64), 4, 3, "two blocks a processor: one's exponentials hide behind the other's mma"),
        90: Tiles((128, 64, 1, 64), 8, 3, "64 rows for each of two warpgroups, as wgmma wants; 185 registers at most"),
    },
    "info_nce.128": {
        80: Tiles((64, 64, 2, 128), 4, 3, "232 registers x 128 threads: two blocks a processor; 57 KB also fits sm_86"),
        90: Tiles((64, 64, 2, 128), 4, 3, "two blocks without a common barrier: exponentials beside wgmma"),
        100: Tiles((128, 32, 1, 128), 8, 3, "with 64 keys triton 3.6's ptxas spills 8 bytes to stay at 128 registers"),
    },
    # Where rows leave keys out (NT-Xent, and a bank's own entries): more to hold for each key.
    "info_nce.64.exclusions": {
        80: Tiles((64, 32, 2, 64), 4, 3, "with 64 keys triton 3.6 spills 40 bytes in NT-Xent's second sweep"),
        90: Tiles((128, 64, 1, 64), 8, 3, "as where no key is left out"),
        100: Tiles((128, 32, 1, 64), 8, 3, "with 64 keys triton 3.6 spills 44 bytes; with 32, 106 registers under 3.7"),
    },
    "info_nce.128.exclusions": {
        80: Tiles((64, 32, 2, 128), 4, 3, "with 64 keys triton 3.6 spills 16 bytes where keys have ids"),
        90: Tiles((64, 64, 2, 128), 4, 3, "as where no key is left out"),
        100: Tiles((128, 32, 1, 128), 8, 3, "as where no key is left out"),
    },
    "info_nce.256": {
        80: Tiles((64, 32, 1, 256), 8, 3, "sums of 64 x 256 take 64 registers a thread; 32 keys leave room for scores"),
        90: Tiles((64, 64, 1, 256), 8, 2, "with 128 rows ptxas waits for each wgmma, for want of registers"),
    },
    "info_nce.512": {
        80: Tiles((32, 32, 1, 512), 8, 2, "sums of 32 x 512 take 64 registers a thread; 68 KB also fits sm_86"),
        90: Tiles((64, 32, 1, 256), 8, 2, "wgmma wants 64 rows, whose sums over 512 columns spill; so two halves"),
        100: Tiles((64, 32, 1, 512), 8, 2, "sums lie in tensor memory; 64 keys a step do not fit shared memory"),
    },
    # Three-term tf32 holds both terms of its operands in registers, so few columns at a time.
    "info_nce.fp32": {80: Tiles((32, 32, 1, 64), 8, 1, "the largest that never spills, up to D = 512")},
    # block: pieces added at a time. One program a row.
    "info_nce.combine": {80: Tiles((32,), 4, 2, "32 x 128 partial sums: 32 registers a thread, all loads in flight")},
    # block: pixels a program takes.
    "photometric.mean_gray": {
        80: Tiles((1024,), 4, 1, "8 pixels a thread; 49 sums a 224 px view are added by whoever needs the mean"),
    },
    "photometric.color": {
        80: Tiles((1024,), 4, 1, "8 pixels a thread: three channels and the hue's temporaries stay in registers"),
    },
    # block: side of the square that a program blurs; with radius r, side - 2r pixels of it are stored.
    "photometric.blur": {
        80: Tiles((64,), 8, 1, "radius 12 (sigma 4) still leaves 40 of 64; no spills, two resident blocks"),
    },
    "photometric.blur.fp32": {
        80: Tiles((32,), 4, 1, "three-term tf32 holds every operand twice: 64 spills. Radius 12 leaves 8 of 32"),
    },
    # block: rows x channels of a channels-last activation; fewer channels give as many more rows.
    "batch_norm.statistics": {
        80: Tiles((32, 128), 4, 1, "four 16-byte loads in flight a thread; both accumulators stay in registers"),
        100: Tiles((32, 128), 4, 3, "8 TB/s want 43 KB in flight a processor: 64 KB in shared memory, 32 in registers"),
    },
    "batch_norm.apply": {
        80: Tiles((32, 128), 4, 1, "four 16-byte loads a tensor and thread; 256-byte runs of a row"),
    },
    "batch_norm.sums": {
        80: Tiles((16, 128), 4, 1, "two sums of up to three tensors: at 16 values a thread four blocks are resident"),
        100: Tiles((16, 128), 4, 3, "as the statistics: two to four tensors, two tiles ahead in shared memory"),
    },
    "batch_norm.sums_dual": {
        80: Tiles((8, 128), 4, 1, "three accumulators and three tensors; at 16 values a thread three blocks are left"),
        100: Tiles((8, 128), 4, 3, "as the sums of two accumulators"),
    },
    "batch_norm.gradient": {
        80: Tiles((16, 128), 4, 1, "three tensors in, two out: 16 values a thread keep the registers under 128"),
    },
    # block: results (windows) x channels; fewer channels give as many more rows.
    "batch_norm_pool.pool": {
        80: Tiles(
            (16, 64), 4, 1, "nine 16-byte loads in flight a thread; at 32 windows two blocks would be left of four"
        ),
    },
    "batch_norm_pool.unpool": {
        80: Tiles((16, 64), 4, 1, "four windows and four pixels a thread: 117 registers; at 32 windows 249"),
    },
    # block: elements of a chunk (one program), elements a program takes at a time.
    "sgd_ema": {
        80: Tiles((4096, 512), 4, 1, "4 elements a thread: 16-byte fp32 accesses without a gap, 8-byte bf16; 8 turns"),
    },
}


def tiles(kernel: str, capability: tuple[int, int] | int | None = None) -> Tiles:
    """The row of `kernel` for a device capability ((9, 0) or 90), from the nearest architecture not newer.

    `None` (the interpreter on a CPU) takes the sm_90 row; a device older than every row takes the oldest, and
    consumer Blackwell (sm_12x: no wgmma or tcgen05, 99 KB of shared memory) the sm_80 row.
    Raises KeyError for a kernel that has no entry.
    """
    rows = TABLE[kernel]
    if capability is None:
        capability = 90
    arch = capability if isinstance(capability, int) else 10 * capability[0] + capability[1]
    if arch >= 120:
        arch = 80
    return rows[max((each for each in rows if each <= arch), default=min(rows))]
