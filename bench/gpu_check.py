"""Everything that only a GPU can show, in one command: a gate of tests, what the project set out to reach, the rest.

`gpu_plan.py` says what is run and for how long. Each part is a process group of its own, so that one that crashes or
takes too long spoils no other and leaves nothing behind on the GPU. A part that is stopped keeps the rows that it had
finished. Records, what each part said, and the tables at the end stand in the records' folder, and in one archive. That
is made anew after each part: a machine that is taken away half way leaves what was finished.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

from fastmoco import atomic
from fastmoco.bench import gpu_plan, record_files, targets
from fastmoco.bench.gpu_plan import GATE, ROOT, Part, PlannedPart
from fastmoco.bench.kernels import CASES, OURS, Size
from fastmoco.bench.options import BenchGpuCheck
from fastmoco.bench.record_files import Record
from fastmoco.options import UsageError
from fastmoco.presets import PRESETS

TO_REPORT = 5  # seconds of the time given that are kept for tables and archive
WORTH_STARTING = 10  # seconds: with less left, no part that was not planned is begun
PASSED, NO_TEST = "passed", "no test was run"
NO_TIME, NOT_INSTALLED, NO_GATE = "no time left", "not installed", "left out: the gate did not pass"
VERDICTS = "verdicts.json"


class Outcome(NamedTuple):
    """How a part ended, and the records that it wrote, also where it was stopped."""

    part: Part
    verdict: str
    seconds: float
    records: list[Record]


def run(options: BenchGpuCheck) -> int:
    """`bench gpu-check`: exit code 0 where all that was run passed, else 1; UsageError without a GPU.

    With `dry_run` the plan is printed and nothing is run; with `rehearse` every part is run at a toy size on a CPU.
    """
    needs_gpu = not (options.rehearse or options.dry_run)
    if needs_gpu and not torch.cuda.is_available():
        raise UsageError(
            "bench gpu-check needs an NVIDIA GPU, and there is none here: run it where there is one, print the plan "
            "with --dry-run, or try its commands at toy sizes with --rehearse"
        )
    if not (ROOT / "tests").is_dir():
        raise UsageError(f"bench gpu-check runs the tests of a checkout, and {ROOT} has none: clone the repository")
    seconds, folder = 60 * options.minutes - TO_REPORT, options.records.resolve()
    stem = f"{date.today().isoformat()}-{_slug(needs_gpu)}"
    with tempfile.TemporaryDirectory() as scratch:
        parts = gpu_plan.select(
            gpu_plan.parts(folder, stem, Path(scratch), options.rehearse), options.parts, options.skip
        )
        missing = [part for part in parts if not part.there]
        there = [part for part in parts if part.there]
        plan, rest = gpu_plan.fit(there, seconds)
        print(gpu_plan.table(plan, rest, missing, seconds), flush=True)
        if options.dry_run:
            return 0
        # Asked to stop, it must still end the part that runs: that is in a session of its own.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        archive = options.archive or folder / f"{stem}.tar.gz"
        absent = [_not_run(part, NOT_INSTALLED) for part in missing]

        def keep(outcomes: Sequence[Outcome]) -> None:
            try:
                pack(archive, [*outcomes, *absent], Path(scratch))
            except Exception as error:  # the parts behind are worth more
                print(f"{archive} was not written: {error}", file=sys.stderr, flush=True)

        outcomes = run_parts(there, time.perf_counter() + seconds, Path(scratch), keep) + absent
        print(summary(outcomes), flush=True)
        print(f"{archive}: {pack(archive, outcomes, Path(scratch))} files", flush=True)
        print(in_short(outcomes), flush=True)
    return int(any(not harmless(item) for item in outcomes))


def run_parts(
    parts: Sequence[Part], end: float, logs: Path, keep: Callable[[Sequence[Outcome]], None] = lambda outcomes: None
) -> list[Outcome]:
    """Run `parts`, each within its limit, until `end` of time.perf_counter; at last those that there is no room for.

    After each one `keep` gets the outcomes so far. Before each one the plan is made anew, so that what one did not need
    of its limit gives the next ones longer forms. Where the gate does not pass nothing else is run: no measurement of a
    step that is wrong proves anything.
    """
    outcomes: list[Outcome] = []
    waiting = list(parts)
    while waiting:
        gate = next((item for item in outcomes if item.part.name == GATE), None)
        if gate is not None and gate.verdict != PASSED:
            return outcomes + [_not_run(part, NO_GATE) for part in waiting]
        rest = end - time.perf_counter()
        plan, _ = gpu_plan.fit(waiting, rest)
        if not plan and rest < WORTH_STARTING:
            return outcomes + [_not_run(part, NO_TIME) for part in waiting]
        one = plan[0] if plan else PlannedPart(waiting[0], waiting[0].forms[0])
        waiting.pop(next(number for number, part in enumerate(waiting) if part is one.part))
        outcomes.append(run_part(one, end, logs))
        keep(outcomes)
    return outcomes


def summary(outcomes: Sequence[Outcome]) -> str:
    """The tables of all records, of the targets as far as the gate lets them count, and of how each part ended."""
    records = [record for item in outcomes for record in item.records]
    verdicts = [f"| {item.part.name} | {item.verdict} | {item.seconds:.0f} |" for item in outcomes]
    lines = ["| part | verdict | seconds |", "|---|---|---:|", *verdicts]
    late = [item.part.name for item in outcomes if unfinished(item)]
    lines += ["", f"No time was left for: {', '.join(late)}."] if late else []
    gate = next((item.verdict for item in outcomes if item.part.name == GATE), "not run")
    return "\n\n".join([record_files.table(records), targets.table(records, gate), "\n".join(lines)])


def unfinished(outcome: Outcome) -> bool:
    """Whether the check had no time left, for the part or for the rest of it."""
    return outcome.verdict.startswith(NO_TIME)


def harmless(outcome: Outcome) -> bool:
    """Whether a verdict is no failure: passed, not installed, or no time left."""
    return outcome.verdict in (PASSED, NOT_INSTALLED) or unfinished(outcome)


def in_short(outcomes: Sequence[Outcome]) -> str:
    """One line that tells apart what passed, what was not run and what failed, which an exit code does not."""
    parts_of: dict[str, list[str]] = {}
    for item in outcomes:
        parts_of.setdefault(item.verdict, []).append(item.part.name)
    return "VERDICTS: " + "; ".join(f"{verdict}: {', '.join(names)}" for verdict, names in parts_of.items())


def run_part(part_and_form: PlannedPart, end: float, logs: Path) -> Outcome:
    """Run a part until it ends, or its limit or the moment `end` of time.perf_counter has come; then nothing of it is
    left running. What it says is shown, and kept in `logs`."""
    (part, form), start = part_and_form, time.perf_counter()
    print(f"== {part.name}, at most {form.limit} s: {' '.join(form.command)}", flush=True)
    limit = min(form.limit, end - start)
    if limit <= 0:
        return _not_run(part, NO_TIME)
    files = [] if part.record is None else [part.record, record_files.partial(part.record)]
    before = {file: _mtime(file) for file in files}
    verdict = _run_command(form.command, limit, logs / f"{part.name}.log")
    if verdict is None:
        verdict = f"more than {limit:.0f} s" if limit == form.limit else f"{NO_TIME} after {limit:.0f} s"
    elif part.tests and verdict == PASSED and not tests_passed((logs / f"{part.name}.log").read_text(errors="replace")):
        verdict = NO_TEST
    print(f"== {part.name}: {verdict}, {time.perf_counter() - start:.0f} s", flush=True)
    if part.picture is not None and verdict == PASSED:
        part.picture[1].parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(*part.picture)
    # A file that was there before tells of another run.
    fresh = [file for file in files if file.exists() and _mtime(file) != before[file]]
    records = record_files.load(fresh[0]) if fresh else []
    return Outcome(part, verdict, time.perf_counter() - start, records)


def tests_passed(output: str) -> int:
    """How many tests passed, by the last line of pytest in what it `output`."""
    counts = re.findall(r"\b(\d+) passed\b", output)
    return int(counts[-1]) if counts else 0


def pack(archive: Path, outcomes: Sequence[Outcome], logs: Path) -> int:
    """Write `archive` (.tar.gz), whole or not at all: every record and picture of these outcomes, what each part said,
    the tables, and each part's verdict as JSON. Returns how many files that is."""
    (logs / "summary.md").write_text(summary(outcomes) + "\n")
    verdicts = {item.part.name: {"verdict": item.verdict, "seconds": round(item.seconds, 1)} for item in outcomes}
    (logs / VERDICTS).write_text(json.dumps(verdicts, indent=1) + "\n")
    files = [logs / "summary.md", logs / VERDICTS, *sorted(logs.glob("*.log"))]
    for part, verdict, *_ in outcomes:
        if part.record is not None and verdict not in (NO_TIME, NOT_INSTALLED, NO_GATE):
            files += [file for file in (part.record, record_files.partial(part.record)) if file.exists()]
        if part.picture is not None and verdict == PASSED:
            files.append(part.picture[1])
    archive.parent.mkdir(parents=True, exist_ok=True)
    with atomic.replacing(archive) as draft, tarfile.open(draft, "w:gz") as tar:
        for file in files:
            tar.add(file, file.name)
    return len(files)


def exercise(device: torch.device) -> None:
    """Run every kernel once, forward and backward, at shapes small enough for a memory checker."""
    small: dict[str, Any] = {"arch": "resnet18", "batch_size": 32, "crop_size": 40, "queue_size": 1000}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        size = Size(dataclasses.replace(PRESETS["v2"][1], **small), dtype)
        for cases in CASES.values():
            for case in cases(size, device):
                case.providers[OURS]()


def _not_run(part: Part, verdict: str) -> Outcome:
    return Outcome(part, verdict, 0.0, [])


def _run_command(command: Sequence[str], limit: float, log: Path) -> str | None:
    """The verdict on `command`, or None if it took longer than `limit` seconds."""
    # A session of its own is a process group of its own, so that what the part has started can be ended with it.
    how: dict[str, Any] = {
        "cwd": ROOT,
        "start_new_session": True,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
    }
    with log.open("wb") as file:
        process = subprocess.Popen(command, **how)
        copier = threading.Thread(target=_copy_output, args=(process.stdout, file), daemon=True)
        copier.start()
        try:
            code = process.wait(timeout=limit)
            return PASSED if code == 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            copier.join(1)


def _copy_output(output: IO[bytes], file: IO[bytes]) -> None:
    with contextlib.suppress(ValueError):  # of a log that was closed: a process that left its group says more
        for line in output:
            file.write(line)
            file.flush()
            sys.stdout.write(line.decode(errors="replace"))
            sys.stdout.flush()


def _slug(on_gpu: bool) -> str:
    name = torch.cuda.get_device_name() if on_gpu and torch.cuda.is_available() else "rehearsal"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _mtime(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


if __name__ == "__main__":
    exercise(torch.device("cuda", 0))
    torch.cuda.synchronize()
