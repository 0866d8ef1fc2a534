"""`bench`, `bench compare` and `bench report`: which subjects are run, at which size, and where the results go."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from fastmoco import atomic, terminal
from fastmoco.bench import comparison, headlines, record_files, traffic
from fastmoco.bench.clocks import Clocks
from fastmoco.bench.journal import Journal
from fastmoco.bench.options import Bench, BenchCompare, BenchReport
from fastmoco.bench.record_files import Record, Row
from fastmoco.bench.size import at_size, overrides
from fastmoco.contrast.update import PRECISIONS, resolve_precision
from fastmoco.options import UsageError
from fastmoco.parallel import Parallel
from fastmoco.presets import PRESETS
from fastmoco.recipe import Recipe

ROUNDS = {"cpu": 5, "cuda": 20}
WARMUP = {"cpu": 1, "cuda": 3}
PICTURES = (".svg", ".png", ".pdf")
INTERLEAVED = ("step", "kernels", "dictionaries")
# Of samples that last seconds, no more than bench compare needs for a verdict.
SHORT_ROUNDS = dict.fromkeys(("loader", "train", "scaling", "versions"), comparison.FEWEST)
# What a busy process does. It ends by itself when its parent, whose number it is given, is gone: also one that was
# killed, and could end nobody.
SPIN = """
import os, sys
while os.getppid() == int(sys.argv[1]):
    for _ in range(10**6):
        pass
"""


def run(options: Bench) -> int:
    """`bench`: measure the subjects, print their tables, write the files asked for; 1 where something failed."""
    if options.model:
        print(terminal.lay_out(traffic.table(dataclasses.replace(PRESETS[options.preset][1], **overrides(options)))))
        return 0
    _check_outputs(options)
    device = Parallel.start(options.device).device
    recipe = at_size(PRESETS[options.preset][1], options, device)
    # Once and first: later, the load of the machine would be our own.
    circumstances = record_files.environment(str(device))
    records: list[Record] = []
    for subject in options.subjects or MEASURED:
        print(f"measuring {subject} ...", file=sys.stderr, flush=True)
        keep = functools.partial(_keep, options, tuple(records))
        records.append(measure(subject, options, recipe, device, circumstances, keep))
        keep(records[-1])
        print(terminal.lay_out(record_files.table(records[-1:])) + "\n", flush=True)
    write(options, records)
    return int(any("failed" in item.environment for item in records))


def measure(
    subject: str,
    options: Bench,
    recipe: Recipe,
    device: torch.device,
    circumstances: dict,
    keep: Callable[[Record], None] = lambda unfinished: None,
) -> Record:
    """One record of `subject`; `circumstances` are those of before the measurement.

    `keep` gets what was measured so far, as a record marked unfinished, after each set of rows.
    """
    rounds = options.rounds or SHORT_ROUNDS.get(subject, ROUNDS[device.type])
    timing = (
        f"warm-up {WARMUP[device.type]}, {rounds} interleaved rounds"
        if subject in ("step", "kernels", "dictionaries")
        else ""
    )

    def record_of(rows: Sequence[Row], journal: Journal, **more: object) -> Record:
        if options.busy:
            rows = [dataclasses.replace(row, config={**row.config, "busy": options.busy}) for row in rows]
        return record_files.record(subject, rows, {**circumstances, **journal.facts(), **more}, timing)

    clocks = Clocks(device) if device.type == "cuda" else None
    journal = Journal(lambda so_far: keep(record_of(so_far.rows, so_far, unfinished=True)), clocks)
    with _busy(options.busy):
        rows = SUBJECTS[subject](options, recipe, device, rounds, journal)
    journal.keep(rows)  # subjects that keep no journal of their own have their clocks read at least once
    return record_of(rows, journal)


@contextmanager
def _busy(processes: int) -> Iterator[None]:
    others: list[subprocess.Popen] = []
    try:
        for _ in range(processes):
            others.append(subprocess.Popen([sys.executable, "-c", SPIN, str(os.getpid())]))
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def write(options: Bench, records: list[Record]) -> None:
    """The files that were asked for, in place of what there was of an earlier run."""
    if options.json is not None:
        record_files.finish(options.json, records)
    if options.csv is not None:
        record_files.save(options.csv, records)
    if options.svg is not None:
        from fastmoco.bench import chart

        chart.draw(options.svg, records)


def compare(options: BenchCompare) -> None:
    """`bench compare A B`: print how each row that both files have moved; raises ValueError if there is none."""
    before, after = record_files.load(options.a), record_files.load(options.b)
    print(terminal.lay_out(comparison.report(str(options.a), before, str(options.b), after)))


def write_pages(options: BenchReport) -> None:
    """`bench report`: write the page of all committed records, and the README's first rows from the newest of them."""
    paths = record_files.record_paths(options.records)
    if not paths:
        raise ValueError(f"{options.records} holds no records: write one with bench SUBJECT --json FILE")
    records = {path: record_files.load(path) for path in paths}
    rows = headlines.table(records, options.readme.parent)
    text = record_files.between_markers(options.readme.read_text(), rows)
    atomic.write_text(options.page, record_files.page([item for items in records.values() for item in items]))
    atomic.write_text(options.readme, text)
    print(f"{options.page}: the tables of {len(paths)} files; {options.readme}: the newest rows")


def _check_outputs(options: Bench) -> None:
    # Before minutes of measuring.
    if options.svg is not None and options.svg.suffix not in PICTURES:
        raise UsageError(f"--svg {options.svg}: use a name that ends in {', '.join(PICTURES)}")
    for path in (options.json, options.csv, options.svg):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)


def _keep(options: Bench, before: tuple[Record, ...], record: Record) -> None:
    if options.json is not None:
        record_files.save(record_files.partial(options.json), [*before, record])


def _subject(module: str, *names: str) -> Callable[[Bench, Recipe, torch.device, int, Journal], list[Row]]:
    def call(options: Bench, recipe: Recipe, device: torch.device, rounds: int, journal: Journal) -> list[Row]:
        available = {
            "rounds": rounds,
            "warmup": WARMUP[device.type],
            "precision": options.precision or "",
            "dtype": PRECISIONS[resolve_precision(options.precision or "auto", device)].work,
            "data": options.data,
            "against": options.against,
            "group": options.providers,
            "only": options.only,
            "skip": options.skip,
            "journal": journal,
        }
        return importlib.import_module(f"fastmoco.bench.{module}").run(
            recipe, device, **{name: available[name] for name in names}
        )

    return call


SUBJECTS = {
    "kernels": _subject("kernels", "rounds", "warmup", "dtype", "only", "journal"),
    "step": _subject("step", "rounds", "warmup", "precision", "group", "only", "skip", "journal"),
    "loader": _subject("loader", "rounds", "data", "only", "skip", "journal"),
    "train": _subject("train", "rounds", "precision", "data", "journal"),
    "scaling": _subject("scaling", "rounds", "precision"),
    "memory": _subject("memory", "dtype", "only", "journal"),
    "dictionaries": _subject("dictionaries", "rounds", "warmup", "precision", "journal"),
    "versions": _subject("versions", "rounds", "precision", "against", "only", "journal"),
    "proof": _subject("proof", "rounds", "precision", "journal"),
    "decode": _subject("decode", "data", "journal"),
    "resume": _subject("resume", "journal"),
}
ON_DEMAND = ("dictionaries", "versions", "proof", "decode", "resume")  # the last three test, and time nothing
MEASURED = tuple(name for name in SUBJECTS if name not in ON_DEMAND)
