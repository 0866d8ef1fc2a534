"""Everything that only a GPU can show, in one command: a gate of tests, what the project set out to reach, the rest.

Each part is a process group of its own, so that one that crashes or takes too long spoils no other and leaves nothing
behind on the GPU. What is worth most comes first, and a part that is stopped keeps the rows that it had finished.
Records are written to bench/records; tables of them, of the targets and of how each part ended come last.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import NamedTuple

import torch

from fastmoco.bench import record_files, targets
from fastmoco.bench.kernels import OURS, PROVIDED, Size
from fastmoco.bench.profiler import PICTURE
from fastmoco.bench.record_files import Record
from fastmoco.kernels.compile_gate import kernel_modules
from fastmoco.options import BenchGpuCheck, UsageError
from fastmoco.recipe import PRESETS

ROOT = Path(__file__).resolve().parent.parent
OURSELVES = (sys.executable, "-m", "fastmoco")
SECONDS = {True: 120, False: 540}  # that the whole check may take, quick or not
TO_REPORT = 5  # seconds of them that are kept for the tables
GATE, NO_TIME = "gate: graph and step tests", "no time left"
# One test of each kind in bf16, and the three providers that the targets compare at 256 pairs.
QUICK_TESTS = "bf16-plain-sgd or hundred_steps"
QUICK_STEPS = ("--only", "fp16 autocast, fastmoco bf16", "--skip", "graph, key", "--rounds", "5")
MORE_TESTS = ("tests/data", "tests/train", "tests/process", "tests/runs", "tests/bench/test_profiler.py")


class Part(NamedTuple):
    """One process of the check: its name, its command, the seconds it may take and what it leaves behind.

    `record` is the file that it writes itself; `picture` is copied to a place of its own once it has passed.
    """

    name: str
    command: tuple[str, ...]
    limit: int
    record: Path | None = None
    picture: tuple[Path, Path] | None = None


class Outcome(NamedTuple):
    """How a part ended, and the records that it wrote, also where it was stopped."""

    part: Part
    verdict: str
    seconds: float
    records: list[Record]


def run(options: BenchGpuCheck) -> int:
    """`bench gpu-check`: exit code 0 where all that there was time for passed, else 1; UsageError without a GPU."""
    if not torch.cuda.is_available():
        raise UsageError("bench gpu-check needs an NVIDIA GPU, and there is none here: run it where there is one")
    if not (ROOT / "tests").is_dir():
        raise UsageError(f"bench gpu-check runs the tests of a checkout, and {ROOT} has none: clone the repository")
    # Asked to stop, it must still end the part that runs: that is in a session of its own.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    end = time.perf_counter() + SECONDS[options.quick] - TO_REPORT
    with tempfile.TemporaryDirectory() as scratch:
        outcomes = [done(part, end) for part in parts(options, torch.cuda.get_device_name(), Path(scratch))]
    print(summary(outcomes))
    return int(any(item.verdict not in ("passed", "not installed") and not unfinished(item) for item in outcomes))


def summary(outcomes: list[Outcome]) -> str:
    """The tables of all records, of the targets as far as the gate lets them count, and of how each part ended."""
    records = [record for item in outcomes for record in item.records]
    verdicts = [f"| {item.part.name} | {item.verdict} | {item.seconds:.0f} |" for item in outcomes]
    ended = ["| part | verdict | seconds |", "|---|---|---:|", *verdicts]
    late = [item.part.name for item in outcomes if unfinished(item)]
    ended += ["", f"No time was left for: {', '.join(late)}."] if late else []
    gate = next((item.verdict for item in outcomes if item.part.name == GATE), "not run")
    return "\n\n".join([record_files.table(records), targets.table(records, gate), "\n".join(ended)])


def unfinished(outcome: Outcome) -> bool:
    """Whether the check had no time left, for the part or for the rest of it."""
    return outcome.verdict.startswith(NO_TIME)


def parts(options: BenchGpuCheck, gpu: str, scratch: Path) -> list[Part]:
    """What is run, in order: a gate of correctness, then the targets, then the rest by what it is worth."""
    records = options.records.resolve()
    slug = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    stem = f"{date.today().isoformat()}-{slug}"

    def bench(name: str, limit: int, *words: str) -> Part:
        path = records / f"{stem}-{name}{'-quick' * options.quick}.json"
        # The record names its command, and is committed: no path of this machine, where it can be helped.
        shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
        flags = ("--device", "cuda", "--json", str(shown))
        return Part(f"bench {name}", (*OURSELVES, "bench", *words, *flags), limit, path)

    if options.quick:
        return [
            _tests(GATE, 30, 4, "-m", "gpu", "tests/contrast", "-k", QUICK_TESTS),
            bench("step", 65, "step", "--providers", "core", *QUICK_STEPS),
            bench("proof", 60, "proof", "--rounds", "5"),
        ]
    demo = ("pretrain", "demo", "--no-knn", "--stop-after", "20", "--out", str(scratch / "run"))
    profile = scratch / "profile"
    picture = (profile / PICTURE, records / f"{stem}-step.svg")
    return [
        _tests(GATE, 110, 4, "-m", "gpu", "tests/contrast"),
        bench("step", 165, "step", "--providers", "core"),
        bench("step-32", 80, "step", "--providers", "core", "--batch-size", str(targets.SMALL)),
        bench("proof", 80, "proof"),
        Part("step picture", (*OURSELVES, "profile", "v2", "--out", str(profile)), 40, None, picture),
        _tests("kernel tests", 120, 8, "tests/kernels", "-m", "not slow"),
        bench("kernels", 90, "kernels"),
        bench("memory", 60, "memory"),
        _sanitizer("memcheck", 60),
        _tests("data, training and profile tests", 60, 4, "-m", "gpu", *MORE_TESTS),
        Part("training", (*OURSELVES, *demo), 45),
        bench("loader", 60, "loader"),
        bench("train", 60, "train"),
        bench("step-more", 100, "step", "--providers", "more"),
        _sanitizer("racecheck", 60),
        bench("step-compiled", 300, "step", "--providers", "compiled"),
    ]


def exercise(device: torch.device) -> None:
    """Run every kernel once, forward and backward, at shapes small enough for a memory checker."""
    small = {"arch": "resnet18", "batch_size": 32, "crop_size": 40, "queue_size": 1000}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        size = Size(dataclasses.replace(PRESETS["v2"][1], **small), dtype)
        for cases in PROVIDED.values():
            for case in cases(size, device):
                case.providers[OURS]()


def done(part: Part, end: float) -> Outcome:
    """Run `part` until it ends, or its limit or the moment `end` of time.perf_counter has come; then nothing of it is
    left running."""
    print(f"== {part.name}: {' '.join(part.command)}", flush=True)
    if shutil.which(part.command[0]) is None:
        return Outcome(part, "not installed", 0.0, [])
    started, limit = time.perf_counter(), min(part.limit, end - time.perf_counter())
    if limit <= 0:
        return Outcome(part, NO_TIME, 0.0, [])
    files = [] if part.record is None else [part.record, record_files.partial(part.record)]
    before = {file: _written(file) for file in files}
    # A session of its own is a process group of its own, so that what the part has started can be ended with it.
    process = subprocess.Popen(part.command, cwd=ROOT, start_new_session=True)
    try:
        code = process.wait(timeout=limit)
        verdict = "passed" if code == 0 else f"exit code {code}"
    except subprocess.TimeoutExpired:
        verdict = f"more than {limit:.0f} s" if limit == part.limit else f"{NO_TIME} after {limit:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if part.picture is not None and verdict == "passed":
        part.picture[1].parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(*part.picture)
    # A file that was there before tells of another run.
    written = [file for file in files if file.exists() and _written(file) != before[file]]
    records = record_files.load(written[0]) if written else []
    return Outcome(part, verdict, time.perf_counter() - started, records)


def _tests(name: str, limit: int, workers: int, *words: str) -> Part:
    # Most of the time goes into compiling kernels, one after the other in each process, each for one precision.
    spread = ("-n", str(workers), "--dist", "loadgroup") if importlib.util.find_spec("xdist") else ()
    return Part(name, (sys.executable, "-m", "pytest", "-q", *spread, *words), limit)


def _sanitizer(tool: str, limit: int) -> Part:
    # Other people's kernels are left alone: they take most of the time, and what they do is theirs.
    names = sorted({variant.fn.__name__ for module in kernel_modules() for variant in module.variants(90)})
    ours = [word for name in names for word in ("--kernel-name", f"kne={name}")]
    flags = ("--tool", tool, "--error-exitcode", "1", "--report-api-errors", "no", *ours)
    return Part(tool, ("compute-sanitizer", *flags, sys.executable, "-m", "fastmoco.bench.gpu_check"), limit)


def _written(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


if __name__ == "__main__":
    exercise(torch.device("cuda", 0))
    torch.cuda.synchronize()
