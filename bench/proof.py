"""What is promised of the step, tried at full size: a replayed step is the eager one bit for bit, and nothing waits.

Equal: the same state is loaded before each run, and afterwards every tensor of the state and every metric of every step
are compared, with the algorithms that `--deterministic on` takes and with those that `off` does. There are two eager
runs and two replayed ones. Where two of a kind differ, which without deterministic algorithms they may, and seldom do
where a step is small, a replayed run must stray no further from an eager one; and a run in which one learning rate is
another must differ, or the comparison is blind.

Waits, on a GPU: calls in which the host waits, and copies to the host, between the first and the last step of a
profile. Reading the loss after each step must be counted, or the count is blind.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmoco.bench.journal import Journal
from fastmoco.bench.profiler import record_events
from fastmoco.bench.record_files import Row
from fastmoco.bench.timeline import waits
from fastmoco.contrast.algorithms import algorithms
from fastmoco.contrast.graph import GraphStep, Runner
from fastmoco.contrast.step import Step
from fastmoco.contrast.update import resolve_precision
from fastmoco.data.batch import Batch
from fastmoco.data.noise import noise_batch, noise_images
from fastmoco.parallel import Parallel
from fastmoco.recipe import Recipe

EQUAL, WAITS = "graph equals eager", "waits of the host"
EAGER, GRAPH, OTHER = "eager again", "graph", "control: another learning rate"
REPEAT = "graph again"
REPLAYED, READ = "graph", "control: the loss is read"
SETTINGS = ("on", "off")  # of --deterministic; on a CPU all is
STRAY = 10  # times as far as two runs of a kind do: how far apart two of their differences may be by chance
WATCHED = 5  # times as many steps are watched for waits as are compared
READS = 3  # steps of the control
RATE = 0.03

Results = dict[str, Tensor]


class ProofError(RuntimeError):
    """What was promised is not so."""


def run(
    recipe: Recipe, device: torch.device, *, rounds: int = 20, precision: str = "", journal: Journal | None = None
) -> list[Row]:
    """Rows of EQUAL over `rounds` steps, in tensors that differ, and on a GPU of WAITS, in calls.

    What is not as promised is a failure in the journal.
    """
    journal, parallel = journal or Journal(), Parallel(device=device)
    chosen = resolve_precision(precision or "auto", device)
    step, batch = Step(recipe, parallel, chosen, images=noise_images(recipe)), noise_batch(recipe, parallel)
    config = {"arch": recipe.arch, "px": recipe.crop_size, "batch": recipe.batch_size, "precision": step.precision}
    if device.type != "cuda":
        config["captured"] = "nothing, on a CPU"  # there it is the graph's buffers and its wrapper that are tried
    start = {name: value.clone() for name, value in step.state().items()}
    for setting in SETTINGS if device.type == "cuda" else SETTINGS[:1]:
        with algorithms(device, setting == "on"):
            graph, config = GraphStep(step, batch), {**config, "deterministic": setting}
            what = f"{EQUAL}, deterministic {setting}"
            with journal.attempt(what):
                rows = equality(functools.partial(train, step, start, batch, rounds), step, graph, config)
                journal.keep(rows)
                judge_equality(rows, exact=setting == "on")
            if setting == SETTINGS[-1]:  # one is enough: no switch of an algorithm makes the host wait
                with journal.attempt(WAITS):
                    step.load(start)
                    rows = watch(graph.step, batch, WATCHED * rounds, device, config)
                    journal.keep(rows)
                    judge_waits(rows)
            graph.close()
    return journal.rows


def equality(run_steps: Callable[..., Results], step: Step, graph: GraphStep, config: dict) -> list[Row]:
    """How far an eager run, a replayed one and one with another learning rate are from an eager run, and how far a
    second replayed run is from the first."""
    first, again = run_steps(step.step), run_steps(step.step)
    replayed = run_steps(graph.step)
    pairs = {EAGER: (first, again), GRAPH: (first, replayed), REPEAT: (replayed, run_steps(graph.step))}
    pairs[OTHER] = first, run_steps(step.step, spoil=True)
    steps = sum(name.startswith("loss of step") for name in first)
    rows = []
    for name, (one, other) in pairs.items():
        odd, largest = differences(one, other)
        extra = {"compared": len(first), "largest": largest, "differ": odd[:10]}
        rows.append(Row(EQUAL, name, "tensors differ", (float(len(odd)),), {**config, "steps": steps}, extra=extra))
    return rows


def train(step: Step, start: Results, batch: Batch, steps: int, advance: Runner, spoil: bool = False) -> Results:
    """Metrics of `steps` steps from the state `start`, and the state after them; `spoil` changes the last rate.

    Batch and rate are others in each step.
    """
    step.load(start)
    results: Results = {}
    for number in range(steps):
        fresh = turn(batch, number)
        lr = RATE / (number + 1) * (2 if spoil and number == steps - 1 else 1)
        metrics = advance(fresh, lr)._asdict()
        results |= {f"{name} of step {number + 1}": value.clone() for name, value in metrics.items()}
    return results | {name: value.clone() for name, value in step.state().items()}


def turn(batch: Batch, number: int) -> Batch:
    """`batch` with every tensor rolled, each by another multiple of `number`: a graph that never reads one is seen.

    Equal shifts of what belongs together, crops and their destination rows, say, would undo each other.
    """
    tensors: dict[str, Any] = {name: value for name, value in vars(batch).items() if isinstance(value, Tensor)}
    return dataclasses.replace(
        batch, **{name: value.roll(number * turns, 0) for turns, (name, value) in enumerate(tensors.items(), 1)}
    )


def differences(a: Results, b: Results) -> tuple[list[str], float]:
    """Names of tensors whose bits differ, and the largest difference between two of their elements."""
    odd = [name for name in a if not torch.equal(_bits(a[name]), _bits(b[name]))]
    return odd, max((float((a[name].double() - b[name].double()).abs().max()) for name in odd), default=0.0)


def watch(advance: Runner, batch: Batch, steps: int, device: torch.device, config: dict) -> list[Row]:
    """Waits in a profile of `steps` replayed steps, and in one of READS steps whose loss is read."""

    def count(call: Callable[[], object], steps: int) -> dict[str, int]:
        with tempfile.TemporaryDirectory() as folder:
            events, _ = record_events(call, steps, device, Path(folder, "trace.json.gz"))
        return waits(events)

    counts = {
        REPLAYED: (steps, count(lambda: advance(batch, RATE), steps)),
        READ: (READS, count(lambda: advance(batch, RATE).loss.item(), READS)),
    }
    return [
        Row(WAITS, name, "calls", (float(sum(calls.values())),), {**config, "steps": taken}, extra={"calls": calls})
        for name, (taken, calls) in counts.items()
    ]


def judge_equality(rows: list[Row], exact: bool = True) -> None:
    """Raises ProofError if the rows of EQUAL do not show what is promised; its text says what they show instead.

    Promised is equality bit for bit; unless `exact`, only that a replayed run strays from an eager one at most STRAY
    times as far as two runs of a kind do.
    """
    again, graph, repeat, other = (
        row for name in (EAGER, GRAPH, REPEAT, OTHER) for row in rows if row.provider == name
    )
    if not other.median:
        raise ProofError("the comparison is blind: another learning rate made no difference")
    if (again.median or repeat.median) and not exact:
        if graph.extra["largest"] > STRAY * max(again.extra["largest"], repeat.extra["largest"]):
            apart = f"{_describe(graph)}, two eager runs {_describe(again)}, two replayed ones {_describe(repeat)}"
            raise ProofError(f"replayed steps stray further from eager ones than runs of a kind do: {apart}")
        return
    if again.median:
        raise ProofError(f"two eager runs differ, so the question is not about graphs: {_describe(again)}")
    if graph.median:
        raise ProofError(f"replayed steps are not the eager ones: {_describe(graph)}")
    if repeat.median:
        raise ProofError(f"two replayed runs differ: {_describe(repeat)}")


def judge_waits(rows: list[Row]) -> None:
    """Raises ProofError if the rows of WAITS do not show what is promised; its text says what they show instead."""
    graph, control = (next(row for row in rows if row.provider == name) for name in (REPLAYED, READ))
    if control.median < READS:
        raise ProofError(
            f"the count is blind: the loss was read {READS} times, and {control.median:.0f} waits were seen"
        )
    if graph.median:
        raise ProofError(f"the host waits: {graph.extra['calls']}")


def _describe(row: Row) -> str:
    return f"{row.median:.0f} of {row.extra['compared']} tensors, by {row.extra['largest']:.3g} at most"


def _bits(value: Tensor) -> Tensor:
    return value.detach().reshape(-1).contiguous().view(torch.uint8)
