"""What a run says while it lasts: a progress bar or plain lines, log.jsonl, sinks, and a picture at the end.

Reading a metric on the host waits for the device. So metrics are summed on the device, copied to the host without
waiting at the end of an interval, and read one interval later, when they have long arrived.
"""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch
from torch import Tensor
from tqdm import tqdm

from fastmoco.process import crash_points
from fastmoco.recipe import Recipe
from fastmoco.train.sinks import open_sinks

LOG, KNN = "log.jsonl", "knn.jsonl"
GIB = 2**30


def chance_level(recipe: Recipe) -> float:
    """Loss of a guess among the positive and K negatives: ln(K + 1)."""
    return math.log(recipe.queue_size + 1)


def fill_steps(recipe: Recipe) -> int:
    """Steps until the queue holds nothing but keys."""
    return math.ceil(recipe.queue_size / (recipe.batch_size * recipe.views))


def expectation(recipe: Recipe, steps_per_epoch: int) -> str:
    """What a healthy loss looks like, for the first line of a run."""
    fill = fill_steps(recipe)
    return (
        f"chance level of the loss is ln(K+1) = {chance_level(recipe):.3f}. A healthy loss starts low (the first "
        f"negatives are random vectors), rises while the queue fills with real keys ({fill} steps, "
        f"{fill / steps_per_epoch:.2g} epochs) and somewhat beyond, then falls"
    )


METRICS = ("loss", "top1", "top5", "nonfinite", "spread")


class Fault(NamedTuple):
    """A step with a loss or gradients that are infinite or NaN."""

    step: int
    """Number of the step, the first being 1."""
    ranks: tuple[int, ...]
    """Ranks whose own loss was not finite; none where gradients alone were, which ranks share."""

    def __str__(self) -> str:
        whose = f"the loss of rank {', '.join(map(str, self.ranks))}" if self.ranks else "gradients"
        return f"{whose} became infinite or NaN in step {self.step}"


class Reading(NamedTuple):
    """What the host knows of an interval once its figures have arrived."""

    line: dict[str, float]
    """Log line: step, the means of METRICS over ranks and finite steps (NaN without any), and the facts."""
    finite: int
    """Steps of the interval that were finite."""
    faults: list[Fault]
    """The others."""


@dataclass(frozen=True)
class Interval:
    """Metrics of the steps since the last one, [ranks, steps, metrics], on their way to the host."""

    step: int
    rows: Tensor
    arrived: torch.cuda.Event | None
    facts: Mapping[str, float]

    def read(self) -> Reading:
        """Wait for the figures and sum them up."""
        if self.arrived is not None:
            self.arrived.synchronize()
        bad = self.rows[..., METRICS.index("nonfinite")] > 0
        good = ~bad.any(0)
        means = dict(zip(METRICS, self.rows[:, good].double().mean((0, 1)).tolist(), strict=True))
        first = self.step - len(good) + 1
        lost = ~self.rows[..., METRICS.index("loss")].isfinite()
        faults = [
            Fault(first + index, tuple(lost[:, index].nonzero().flatten().tolist()))
            for index in (~good).nonzero().flatten().tolist()
        ]
        return Reading({"step": self.step, **means, **self.facts, "nonfinite": len(faults)}, int(good.sum()), faults)


class Meter:
    """Collects metrics on the device; an interval is read `lag` intervals after it ended (one on a GPU)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.lag = 1 if device.type == "cuda" else 0
        self._rows: list[Tensor] = []
        self._pending: deque[Interval] = deque()

    def add(self, values: Iterable[Tensor]) -> None:
        """Add one step's 0-d tensors, METRICS."""
        self._rows.append(torch.stack([value.detach().float() for value in values]))

    @property
    def steps(self) -> int:
        """Steps in the current interval."""
        return len(self._rows)

    def nonfinite(self) -> bool:
        """Whether a step of this rank that was not yet read was not finite. Waits for the device."""
        pending = [fault for interval in self._pending for fault in interval.read().faults]
        column = METRICS.index("nonfinite")
        return bool(pending) or bool(self._rows) and bool((torch.stack(self._rows)[:, column] > 0).any())

    def cut(self, step: int, parallel: Any, facts: Mapping[str, float]) -> None:
        """End the interval at `step`: gather it from all ranks, and start the copy to the host."""
        assert self._rows
        rows = parallel.all_gather(torch.stack(self._rows)).view(parallel.world, -1, len(METRICS))
        arrived = None
        if self.device.type == "cuda":
            pinned = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
            rows = pinned.copy_(rows, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self._pending.append(Interval(step, rows, arrived, dict(facts)))
        self._rows = []

    def read(self, everything: bool = False) -> Iterator[Reading]:
        """Intervals that are due."""
        while len(self._pending) > (0 if everything else self.lag):
            yield self._pending.popleft().read()


class Stopwatch:
    """Time of an interval, and how much of it was spent waiting for data."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._waited = 0.0

    def waited(self, seconds: float) -> None:
        """Note a wait for data."""
        self._waited += seconds

    def lap(self, pairs: int) -> dict[str, float]:
        """Pairs per second and the share of data wait since the last lap."""
        now = time.perf_counter()
        elapsed = max(now - self._start, 1e-9)
        facts = {"pairs_per_s": pairs / elapsed, "data_wait": min(self._waited / elapsed, 1.0)}
        self._start, self._waited = now, 0.0
        return facts

    def skip(self) -> None:
        """Start the interval anew: what happened since the last lap was no training."""
        self._start, self._waited = time.perf_counter(), 0.0


class Pace:
    """Keeps the host at most AHEAD steps before the device.

    Launching takes a fraction of a step: without this, batches would pile up in the device's memory, and the host would
    wait for the loader all the time, however fast it is.
    """

    AHEAD = 2

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._ends: deque[torch.cuda.Event] = deque()

    def step(self) -> None:
        """A step was launched. Waits for the one AHEAD before it, leaving the core to others."""
        if not self._on_gpu:
            return
        self._ends.append(torch.cuda.Event(blocking=True))
        self._ends[-1].record()
        if len(self._ends) > self.AHEAD:
            self._ends.popleft().synchronize()


def memory(device: torch.device) -> float:
    """Peak memory of the process so far in GiB. On a GPU these are allocations, cuDNN's trials and kNN included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


class Monitor:
    """Writes the lines of the main rank: to the terminal, log.jsonl, knn.jsonl and the sinks."""

    def __init__(
        self,
        run: Path,
        total: int,
        start: int = 0,
        *,
        tensorboard: bool = False,
        track: str = "none",
        stream: TextIO | None = None,
    ) -> None:
        """`total` and `start` are steps of the whole run; lines of a log beyond `start` are dropped."""
        self.run, self.total = run, total
        self.stream = stream or sys.stderr
        for name in (LOG, KNN):
            truncate(run / name, start)
        lines = read_lines(run / LOG)
        self._elapsed_before = lines[-1]["seconds"] if lines else 0.0
        self._begin = time.perf_counter()
        self._log, self._knn = (Lines(run / name, self.say) for name in (LOG, KNN))
        self._bar = tqdm(
            total=total,
            initial=start,
            file=self.stream,
            unit="step",
            dynamic_ncols=True,
            disable=not self.stream.isatty(),
        )
        self._sinks = open_sinks(run, start, tensorboard, track)

    @property
    def seconds(self) -> float:
        """Time since the run began, resumed parts added up."""
        return self._elapsed_before + time.perf_counter() - self._begin

    def say(self, text: str) -> None:
        """One line for people, above the bar where there is one."""
        tqdm.write(text, file=self.stream) if not self._bar.disable else print(text, file=self.stream, flush=True)

    def advance(self) -> None:
        """A step is done."""
        self._bar.update()

    def jump(self, step: int) -> None:
        """Training goes on after `step`, having left some out."""
        self._bar.n = step
        self._bar.refresh()

    def interval(self, line: Mapping[str, float]) -> None:
        """A logging interval is known: write it everywhere."""
        line = {**line, "seconds": self.seconds}
        self._log.append(line)
        self._to_sinks(line)
        text = (
            f"loss {line['loss']:.3f}  top1 {line['top1']:.1f}%  top5 {line['top5']:.1f}%  lr {line['lr']:.2e}  "
            f"{line['pairs_per_s']:.1f} pairs/s  data wait {line['data_wait']:.0%}  "
            f"queue {line['queue_filled']:.0%}  {line['memory']:.1f} GiB"
        )
        if self._bar.disable:
            self.say(f"step {line['step']}/{self.total}  epoch {line['epoch']:.2f}  {text}")
        else:
            self._bar.set_postfix_str(text)

    def knn(self, line: Mapping[str, float]) -> None:
        """A kNN evaluation is done."""
        self._knn.append(line)
        self._to_sinks({"step": line["step"], "knn_top1": line["top1"], "knn_top5": line["top5"]})
        self.say(f"kNN after step {line['step']}: top-1 {line['top1']:.2f}%, top-5 {line['top5']:.2f}%")

    def close(self) -> None:
        """Close files and bar."""
        self._bar.close()
        self._log.close()
        self._knn.close()
        for sink in self._sinks:
            sink.close()

    def _to_sinks(self, line: Mapping[str, float]) -> None:
        values = {name: value for name, value in line.items() if name != "step"}
        for sink in self._sinks:
            sink.log(int(line["step"]), values)


class Lines:
    """A JSONL file to append to, each line on disk at once.

    A disk that refuses costs a warning, not the run: what it did not take is written before the next line.
    """

    def __init__(self, path: Path, report: Callable[[str], None]) -> None:
        self._path, self._report = path, report
        self._file = path.open("ab", buffering=0)
        self._left = b""
        self._refused = False

    def append(self, line: Mapping[str, Any]) -> None:
        """Write one line, after those that are still to be written."""
        self._left += (json.dumps(line) + "\n").encode()
        if crash_points.about_to_crash("half a log line"):
            self._file.write(self._left[: len(self._left) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        self._write()

    def close(self) -> None:
        """Try once more to write what is left, and close the file."""
        self._write()
        self._file.close()

    def _write(self) -> None:
        try:
            while self._left:
                self._left = self._left[self._file.write(self._left) :]
        except OSError as error:
            if not self._refused:
                self._report(f"warning: {self._path} takes no more lines ({error.strerror}); they are kept meanwhile")
        self._refused = bool(self._left)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines of a JSONL file; a last line that was cut off by a kill is left out, and so is a missing file."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def truncate(path: Path, step: int) -> None:
    """Drop the lines after `step` and a last line that was cut off, so that a resumed log has no line twice."""
    if path.exists():
        kept = [line for line in read_lines(path) if line["step"] <= step]
        draft = path.with_name(path.name + ".writing")
        draft.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        draft.replace(path)


def draw_curves(run: Path, recipe: Recipe) -> Path:
    """RUN/curves.png from the logs: loss with its chance level, contrast accuracy, kNN."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    log, knn = read_lines(run / LOG), read_lines(run / KNN)
    figure = Figure(figsize=(12, 3.6), dpi=130, layout="constrained")
    loss, accuracy, neighbours = figure.subplots(1, 3)
    _draw_loss(loss, log, recipe)
    _draw_accuracy(accuracy, log, recipe)
    _draw_knn(neighbours, knn)
    for axes in (loss, accuracy, neighbours):
        _dress(axes)
    figure.savefig(run / "curves.png")
    return run / "curves.png"


BLUE, ORANGE, GREEN, GREY = "#2f6db5", "#dd8452", "#3a8a5f", "#8a8f98"


def _draw_loss(axes: Any, log: list[dict], recipe: Recipe) -> None:
    axes.set_title("InfoNCE loss", loc="left", fontsize=10)
    axes.plot([line["step"] for line in log], [line["loss"] for line in log], color=BLUE, linewidth=1.6)
    level = chance_level(recipe)
    axes.axhline(level, color=GREY, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
        f"chance, ln(K+1) = {level:.2f}",
        (0.99, level),
        xycoords=("axes fraction", "data"),
        ha="right",
        va="bottom",
        xytext=(0, 2),
        textcoords="offset points",
        color=GREY,
        fontsize=8,
    )
    filled = fill_steps(recipe)
    if log and filled <= log[-1]["step"]:
        axes.axvline(filled, color=GREY, linewidth=0.8, alpha=0.6)
        axes.annotate(
            "queue full",
            (filled, 0.03),
            xycoords=("data", "axes fraction"),
            xytext=(3, 0),
            textcoords="offset points",
            color=GREY,
            fontsize=8,
        )
    top = max([level, *(line["loss"] for line in log)])
    axes.set_ylim(0, top * 1.12)


def _draw_accuracy(axes: Any, log: list[dict], recipe: Recipe) -> None:
    axes.set_title(f"Contrast accuracy, 1 of {recipe.queue_size + 1} (%)", loc="left", fontsize=10)
    steps = [line["step"] for line in log]
    for name, color, label in (("top5", ORANGE, "top-5"), ("top1", BLUE, "top-1")):
        axes.plot(steps, [line[name] for line in log], color=color, linewidth=1.6, label=label)
    axes.set_ylim(0, 102)
    if log:
        axes.legend(frameon=False, fontsize=8, loc="best")


def _draw_knn(axes: Any, knn: list[dict]) -> None:
    axes.set_title("kNN top-1 on validation images (%)", loc="left", fontsize=10)
    axes.set_ylim(0, 102)
    if not knn:
        axes.annotate("no labels", (0.5, 0.5), xycoords="axes fraction", ha="center", color=GREY)
        return
    steps, top1 = [line["step"] for line in knn], [line["top1"] for line in knn]
    axes.plot(steps, top1, color=GREEN, linewidth=1.6, marker="o", markersize=5)
    for at in {0, len(knn) - 1}:
        axes.annotate(
            f"{top1[at]:.1f}",
            (steps[at], top1[at]),
            xytext=(0, 7),
            textcoords="offset points",
            ha="center",
            color=GREEN,
            fontsize=9,
        )
    chance = 100 / knn[-1]["classes"]
    axes.axhline(chance, color=GREY, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
        f"chance {chance:.3g}",
        (0.99, chance),
        xycoords=("axes fraction", "data"),
        ha="right",
        va="bottom",
        xytext=(0, 2),
        textcoords="offset points",
        color=GREY,
        fontsize=8,
    )
    axes.margins(x=0.08)


def _dress(axes: Any) -> None:
    axes.set_xlabel("step", fontsize=9)
    axes.tick_params(labelsize=8, color=GREY)
    axes.grid(axis="y", color="#e8eaee", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#c4c8cf")
