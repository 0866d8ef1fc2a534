"""Compile every kernel ahead of time at its production tiles, without a GPU, and show what the compiler made of it.

    python -m fastmoco.kernels.compile_gate [--arch 80|90|100|all] [--only NAME] [--json FILE] [--against FILE]

A module of this package takes part by having `variants(arch) -> list[Variant]` (see tiles.py). Registers and stack
come from `cuobjdump --dump-resource-usage`, spills, 16-byte loads and instructions from the machine code, tensor-core
instructions from the PTX; resident blocks are arithmetic over the architecture's limits. Ends with exit code 1, naming
each offender, if `faults` finds any. `--against` also prints what changed since an earlier `--json`, as Markdown.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

import fastmoco.kernels
from fastmoco.kernels.tiles import ARCHITECTURES, Variant

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
NATIVE_MMA = {80: "mma", 90: "wgmma", 100: "tcgen05"}
_MMA_PATTERNS = {"mma": r"\bmma\.sync", "wgmma": r"\bwgmma\.mma_async", "tcgen05": r"\btcgen05\.mma"}
_WIDE_LOAD = re.compile(r"\b(?:LDG|LDGSTS)\.[\w.]*(?:128|256)")
_SPILL_STORE = re.compile(r"\bSTL(?:\.(?P<bits>64|128))?\b")
_INSTRUCTION = re.compile(r"^\s+/\*(?P<address>[0-9a-f]{4,})\*/\s+(?P<text>[^;]+);", re.MULTILINE)
_MEMORY = re.compile(r"\b(?:LDG|LDGSTS|LD|STG|ST|RED|REDG|ATOM|ATOMG|UTMALDG|UTMASTG|UBLKCP)\b")
_BRANCH = re.compile(r"\bBRA\b.*?\b0x(?P<target>[0-9a-f]+)")


class Limits(NamedTuple):
    """Per multiprocessor, from the CUDA programming guide's table of technical specifications; bytes and counts."""

    shared: int
    shared_per_block: int
    registers: int = 65536
    threads: int = 2048
    blocks: int = 32
    tensor_columns: int = 0


LIMITS = {
    80: Limits(164 * 1024, 163 * 1024),
    90: Limits(228 * 1024, 227 * 1024),
    100: Limits(228 * 1024, 227 * 1024, tensor_columns=512),
}
ODD_ON = 90  # the architecture for which the forms at odd sizes are compiled too
SHARED_RESERVED = 1024  # the driver's own, in every block
REGISTER_UNIT = 256  # registers are given to a warp in units of this many


@dataclass(frozen=True)
class Report:
    """What the compiler made of one variant. Sizes in bytes; `blocks` is resident blocks per multiprocessor.

    `instructions` of the machine code in all, and in the longest span that ends in a branch back to its beginning.
    `waits_late`: it may start before the kernel ahead of it has ended, and touches memory before it waits for that.
    """

    name: str
    arch: int
    registers: int
    spill: int
    stack: int
    shared: int
    blocks: int
    mma: dict[str, int]
    wide_loads: int
    streaming: bool
    native_mma: bool
    serialized: bool
    odd: bool
    instructions: int
    loop: int
    waits_late: bool


def resident_blocks(arch: int, registers: int, shared: int, warps: int, tensor_columns: int = 0) -> int:
    """Blocks one multiprocessor holds at once; 0 means the kernel cannot be launched at all."""
    limits = LIMITS[arch]
    if shared > limits.shared_per_block or tensor_columns > limits.tensor_columns:
        return 0
    registers_per_warp = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    bounds = [
        limits.blocks,
        limits.threads // (32 * warps),
        limits.registers // (registers_per_warp * warps),
        limits.shared // (shared + SHARED_RESERVED),
    ]
    if tensor_columns:
        bounds.append(limits.tensor_columns // tensor_columns)
    return min(bounds)


def specialised(variant: Variant) -> tuple[str, ...]:
    """The integer arguments for which a launch has other binaries when they are multiples of 16, and when not."""
    fn = variant.fn
    # The interpreter's stand-in for a kernel keeps what the decorator was given.
    free = fn.do_not_specialize if hasattr(fn, "do_not_specialize") else fn.kwargs["do_not_specialize"] or ()
    return tuple(name for name, kind in variant.signature.items() if kind in ("i32", "i64") and name not in free)


def attributes(variant: Variant, odd: bool = False) -> dict[tuple[int], list[list[object]]]:
    """What the compiler is told of the arguments, by position, as a launch tells it.

    Pointers are multiples of 16, and so is every integer that a launch looks at, unless sizes are `odd`.
    """
    aligned = () if odd else specialised(variant)
    return {
        (position,): [["tt.divisibility", 16]]
        for position, (argument, kind) in enumerate(variant.signature.items())
        if kind.startswith("*") or argument in aligned
    }


def compile_variant(variant: Variant, arch: int, odd: bool = False) -> CompiledKernel:
    """Compile for `arch` what a launch at sizes that are multiples of 16 compiles, or at `odd` ones."""
    source = ASTSource(variant.fn, variant.signature, variant.constexprs, attributes(variant, odd))
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages, "enable_fp_fusion": variant.fp_fusion}
    options |= {"launch_pdl": True} if variant.dependent else {}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def examine(variant: Variant, arch: int, odd: bool = False) -> Report:
    """Compile one form of a variant and read its binary. Raises what the compiler raises."""
    kernel = compile_variant(variant, arch, odd)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage = _cuobjdump("--dump-resource-usage", cubin)
        machine_code = _cuobjdump("--dump-sass", cubin)
    registers, stack = map(int, re.findall(r"REG:(\d+) STACK:(\d+)", usage)[0])
    shared = kernel.metadata.shared
    tensor_columns = getattr(kernel.metadata, "tmem_size", None) or 0
    instructions, loop = count_instructions(machine_code)
    return Report(
        name=variant.name + " odd" * odd,
        arch=arch,
        registers=registers,
        spill=sum(int(match["bits"] or 32) // 8 for match in _SPILL_STORE.finditer(machine_code)),
        stack=stack,
        shared=shared,
        blocks=resident_blocks(arch, registers, shared, variant.num_warps, tensor_columns),
        mma={name: len(re.findall(pattern, kernel.asm["ptx"])) for name, pattern in _MMA_PATTERNS.items()},
        wide_loads=len(_WIDE_LOAD.findall(machine_code)),
        streaming=variant.streaming,
        native_mma=variant.native_mma,
        serialized=_serialized(kernel.asm["ptx"]),
        odd=odd,
        instructions=instructions,
        loop=loop,
        waits_late=variant.dependent and waits_late(machine_code),
    )


def waits_late(machine_code: str) -> bool:
    """Whether an access to memory stands before the wait for the kernel ahead (griddepcontrol.wait), or none waits."""
    texts = (line["text"] for line in _INSTRUCTION.finditer(machine_code))
    return next((bool(_MEMORY.search(text)) for text in texts if _MEMORY.search(text) or "ACQBULK" in text), True)


def count_instructions(machine_code: str) -> tuple[int, int]:
    """Instructions in all, less what only fills up the end, and in the longest loop, of cuobjdump's listing."""
    lines = [(int(line["address"], 16), line["text"].strip()) for line in _INSTRUCTION.finditer(machine_code)]
    addresses = [address for address, text in lines if text != "NOP"]
    branches = ((address, _BRANCH.search(text)) for address, text in lines)
    back = [(int(match["target"], 16), address) for address, match in branches if match]
    # The end of the code is a branch to itself.
    spans = [(first, last) for first, last in back if first < last]
    loop = max((sum(first <= address <= last for address in addresses) for first, last in spans), default=0)
    return len(addresses), loop


def _serialized(ptx: str) -> bool:
    # ptxas says so only in a warning: it waits after every wgmma where registers are too few to let them overlap.
    if "wgmma.mma_async" not in ptx:
        return False
    command = [str(TOOLS / "ptxas"), "--verbose", "--gpu-name=sm_90a", "--output-file", os.devnull]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as source:
        source.write(ptx)
        source.flush()
        result = subprocess.run([*command, source.name], capture_output=True, text=True, check=True)
    return "wgmma.mma_async instructions are serialized" in result.stderr


def _cuobjdump(option: str, cubin: Path) -> str:
    search = {**os.environ, "PATH": f"{TOOLS}{os.pathsep}{os.environ.get('PATH', '')}"}
    result = subprocess.run(
        [TOOLS / "cuobjdump", option, cubin], capture_output=True, text=True, env=search, check=True
    )
    return result.stdout


def faults(report: Report) -> list[str]:
    """Why this kernel must not ship, one line each; empty if it may.

    At odd sizes, which no preset has at any encoder (tested), it may be slower, but must run.
    """
    messages = []
    if (report.spill or report.stack) and not report.odd:
        messages.append(f"spills {report.spill} bytes (stack {report.stack})")
    if not report.blocks:
        messages.append(f"does not fit a multiprocessor ({report.shared} bytes of shared memory)")
    if report.streaming and report.blocks == 1 and not report.odd:
        messages.append("streams with a single resident block per multiprocessor")
    instruction = NATIVE_MMA[report.arch]
    if report.native_mma and not report.mma[instruction]:
        messages.append(f"has no {instruction} instruction")
    if report.waits_late:
        messages.append("touches memory before it waits for the kernel ahead of it")
    if report.serialized:
        messages.append("has its wgmma instructions serialized")
    return [f"sm_{report.arch} {report.name}: {fault}" for fault in messages]


def kernel_modules() -> list[ModuleType]:
    """The modules of this package that have a `variants` hook, by name."""
    names = sorted(module.name for module in pkgutil.iter_modules(fastmoco.kernels.__path__))
    here = __spec__.name.rpartition(".")[2]
    modules = [importlib.import_module(f"fastmoco.kernels.{name}") for name in names if name != here]
    return [module for module in modules if hasattr(module, "variants")]


def examine_all(
    architectures: tuple[int, ...] = ARCHITECTURES, workers: int | None = None, only: str = ""
) -> list[Report]:
    """Every variant of the kernels whose file name contains `only`, compiled in parallel; by kernel and architecture.

    On one architecture in both forms, where it has two.
    """
    if triton.knobs.runtime.interpret:
        raise ValueError("the compile gate compiles: unset TRITON_INTERPRET")
    jobs = [
        (module.__name__, index, arch, odd)
        for module in kernel_modules()
        if only in module.__name__.rpartition(".")[2]
        for arch in architectures
        for index, each in enumerate(module.variants(arch))
        for odd in ((False, True) if specialised(each) and arch == ODD_ON else (False,))
    ]
    with ProcessPoolExecutor(workers or os.cpu_count(), multiprocessing.get_context("fork")) as pool:
        return list(pool.map(_examine_job, *zip(*jobs, strict=True)))


def _examine_job(module: str, index: int, arch: int, odd: bool) -> Report:
    return examine(importlib.import_module(module).variants(arch)[index], arch, odd)


def table(reports: list[Report]) -> str:
    """The reports as aligned text, one line each."""
    head = ("kernel", "sm", "instructions", "loop", "regs", "spill", "stack", "shared", "blocks")
    lines: list[tuple[str, ...]] = [(*head, "tensor cores", "16-byte loads")]
    for report in reports:
        mma = " ".join(f"{name}:{count}" for name, count in report.mma.items() if count) or "-"
        made = (report.arch, report.instructions, report.loop, report.registers)
        room = (report.spill, report.stack, report.shared, report.blocks)
        lines.append((report.name, *map(str, (*made, *room)), mma, str(report.wide_loads)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def changes(before: list[dict[str, Any]], after: list[Report]) -> str:
    """What became of each kernel since `before`, the kernels of an earlier `--json`: a Markdown table by architecture.

    A cell has instructions in all, of the longest loop, registers, resident blocks, and bytes spilled where any are.
    """
    old = {(each["name"], each["arch"]): each for each in before}
    names = list(dict.fromkeys(report.name for report in after))
    new = {(report.name, report.arch): asdict(report) for report in after}
    architectures = sorted({report.arch for report in after})
    lines = ["| kernel | " + " | ".join(f"sm_{arch}" for arch in architectures) + " |"]
    lines.append("|---|" + "---|" * len(architectures))
    for name in names:
        cells = [_change(old.get((name, arch)), new.get((name, arch))) for arch in architectures]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _change(old: dict[str, Any] | None, new: dict[str, Any] | None) -> str:
    if new is None:
        return "-"

    def both(field: str) -> str:
        now = new[field]
        return f"{now}" if old is None or old[field] == now else f"{old[field]} -> {now}"

    spill = f", spill {both('spill')}" * bool(new["spill"] or (old or new)["spill"])
    return f"{both('instructions')}, loop {both('loop')}, regs {both('registers')}, blocks {both('blocks')}{spill}"


def main(arguments: list[str] | None = None) -> int:
    """Print the table and any faults; 1 if there are faults."""
    parser = argparse.ArgumentParser(prog="python -m fastmoco.kernels.compile_gate", description=__doc__.split("\n")[0])
    parser.add_argument("--arch", choices=[*map(str, ARCHITECTURES), "all"], default="all")
    parser.add_argument("--only", default="", metavar="NAME", help="only kernels whose file name contains it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table here, with the versions")
    parser.add_argument("--against", type=Path, metavar="FILE", help="also print what changed since this --json")
    options = parser.parse_args(arguments)
    architectures = ARCHITECTURES if options.arch == "all" else (int(options.arch),)
    reports = examine_all(architectures, only=options.only)
    messages = [fault for report in reports for fault in faults(report)]
    print(table(reports))
    print(f"\n{len(reports)} variants, {len(messages)} faults (triton {triton.__version__})", *messages, sep="\n")
    if options.against:
        print("", changes(json.loads(options.against.read_text())["kernels"], reports), sep="\n")
    if options.json:
        content = {"triton": triton.__version__, "kernels": [asdict(report) for report in reports], "faults": messages}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return 1 if messages else 0


if __name__ == "__main__":
    sys.exit(main())
