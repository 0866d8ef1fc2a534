"""Everything that only a GPU can show, in one command: tests un-interpreted, memory checkers, training, benchmarks.

Each part is a process of its own, so that one that crashes or takes too long spoils no other. Records are written to
bench/records, and a table of what passed comes last.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import NamedTuple

import torch

from fastmoco.bench import report
from fastmoco.bench.kernels import OURS, PROVIDED, Size
from fastmoco.options import BenchGpuCheck, UsageError
from fastmoco.recipe import PRESETS

ROOT = Path(__file__).resolve().parent.parent
PYTEST = (sys.executable, "-m", "pytest", "-q")
SECONDS = {True: 120, False: 540}  # that the whole check may take, quick or not


# Name of the record, words after `bench`, seconds at most, and whether the quick check has it. Compiling takes minutes.
BENCHES = (
    ("kernels", ("kernels",), 90, True),
    ("step", ("step", "--skip", "compiled"), 120, True),
    ("step-32", ("step", "--skip", "compiled", "--batch-size", "32"), 90, False),
    ("memory", ("memory",), 45, True),
    ("loader", ("loader",), 120, False),
    ("train", ("train",), 45, False),
    ("step-compiled", ("step", "--only", "compiled"), 300, False),
)


class Part(NamedTuple):
    """One process of the check: its name, its command, the seconds it may take and the record that it writes."""

    name: str
    command: tuple[str, ...]
    limit: int
    record: Path | None = None


class Outcome(NamedTuple):
    """How a part ended."""

    part: Part
    verdict: str
    seconds: float


def run(options: BenchGpuCheck) -> int:
    """`bench gpu-check`: exit code 0 where everything passed, 1 where something did not; UsageError without a GPU."""
    if not torch.cuda.is_available():
        raise UsageError("bench gpu-check needs an NVIDIA GPU, and there is none here: run it where there is one")
    if not (ROOT / "tests").is_dir():
        raise UsageError(f"bench gpu-check runs the tests of a checkout, and {ROOT} has none: clone the repository")
    with tempfile.TemporaryDirectory() as scratch:
        end = time.perf_counter() + SECONDS[options.quick]
        outcomes = [_done(part, end) for part in parts(options, torch.cuda.get_device_name(), Path(scratch))]
    records = [item for part, verdict, _ in outcomes if part.record and verdict == "passed"
               for item in report.load(part.record)]  # fmt: skip
    print(report.table(records))
    print("\n| part | verdict | seconds |\n|---|---|---:|")
    for part, verdict, seconds in outcomes:
        print(f"| {part.name} | {verdict} | {seconds:.0f} |")
    return int(any(verdict not in ("passed", "not installed") for _, verdict, _ in outcomes))


def parts(options: BenchGpuCheck, gpu: str, scratch: Path) -> list[Part]:
    """What is run, in order: correctness before speed."""
    found = [Part("kernel tests", (*PYTEST, "tests/kernels", "-m", "not slow"), 150)]
    found.append(Part("graph and step tests", (*PYTEST, "-m", "gpu", "tests/contrast"), 60))
    found.append(Part("data tests", (*PYTEST, "-m", "gpu", "tests/data"), 45))
    if not options.quick:
        small = (sys.executable, "-m", "fastmoco.bench.gpu_check")
        for tool in ("memcheck", "racecheck"):
            found.append(Part(tool, ("compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *small), 45))
    demo = ("pretrain", "demo", "--no-knn", "--stop-after", "20", "--out", str(scratch / "run"))
    found.append(Part("training", (sys.executable, "-m", "fastmoco", *demo), 60))
    slug = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    flags = ("--rounds", "5") if options.quick else ()
    for name, words, limit, in_quick in BENCHES:
        if in_quick or not options.quick:
            path = options.records / f"{date.today().isoformat()}-{slug}-{name}.json"
            command = (sys.executable, "-m", "fastmoco", "bench", *words, "--device", "cuda", "--json", str(path))
            found.append(Part(f"bench {name}", (*command, *flags), limit, path))
    return found


def exercise() -> None:
    """Run every kernel once, forward and backward, at shapes small enough for a memory checker."""
    small = {"arch": "resnet18", "batch_size": 32, "crop_size": 40, "queue_size": 1000}
    for dtype in (torch.bfloat16, torch.float32):
        size = Size(dataclasses.replace(PRESETS["v2"][1], **small), dtype)
        for cases in PROVIDED.values():
            for case in cases(size, torch.device("cuda", 0)):
                case.providers[OURS]()
    torch.cuda.synchronize()


def _done(part: Part, end: float) -> Outcome:
    print(f"== {part.name}: {' '.join(part.command)}", flush=True)
    if shutil.which(part.command[0]) is None:
        return Outcome(part, "not installed", 0.0)
    started = time.perf_counter()
    limit = min(part.limit, end - started)
    if limit <= 0:
        return Outcome(part, "no time left", 0.0)
    try:
        code = subprocess.run(part.command, cwd=ROOT, timeout=limit).returncode
        verdict = "passed" if code == 0 else f"exit code {code}"
    except subprocess.TimeoutExpired:
        verdict = f"more than {limit:.0f} s"
    return Outcome(part, verdict, time.perf_counter() - started)


if __name__ == "__main__":
    exercise()
