"""`profile PRESET`: which kernels take the time of a step, which part of it they belong to, and how fast they are.

torch.profiler traces a few steps; the trace opens in Perfetto (ui.perfetto.dev), and `timeline.py` reads it for the
tables. On a GPU Triton's proton can take its place: it keeps sums by part and kernel instead of single events. For
Nsight the exact command is printed, and run where the tool is installed: it runs this module's steps with NVTX ranges
and the profiler switched on after the warm-up.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gzip
import importlib
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from fastmoco import plots, terminal
from fastmoco.bench.options import Profile
from fastmoco.bench.roofline import ACTIVATION_BYTES, backward_work, convolutions, forward_work, saved
from fastmoco.bench.size import at_size
from fastmoco.bench.timeline import STEP, Row, kernels, leaves, seconds_of_parts
from fastmoco.bench.timing import CPU_NAME, Machine, measure_machine
from fastmoco.contrast.graph import runner
from fastmoco.contrast.parts import naming
from fastmoco.contrast.step import Step
from fastmoco.contrast.update import PRECISIONS
from fastmoco.data import manifest
from fastmoco.data.noise import noise_batch
from fastmoco.data.plan import Plan
from fastmoco.encoder import build_encoder
from fastmoco.kernels.photometric import cost as photometric_cost
from fastmoco.kernels.sgd_ema import cost as sgd_ema_cost
from fastmoco.kernels.tensor_table import TensorTable
from fastmoco.options import UsageError
from fastmoco.parallel import Parallel
from fastmoco.presets import PRESETS
from fastmoco.recipe import Recipe

WARMUP = 3  # steps before the recorded ones: kernels are compiled and memory is reserved
TRACE, TREE, PICTURE = "trace.json.gz", "step.hatchet", "step.svg"
NCU_KERNELS = 100  # that it measures: it runs each of them dozens of times, and a step has a thousand
NOTHING = "without a GPU there is nothing for Nsight to record here"
OPENED_BY = {"torch": (TRACE, "open it at ui.perfetto.dev"), "proton": (TREE, "see proton-viewer --metrics time/ms")}
LABELLED = 0.1  # share of a step from which a part's bar has room for a text
OVER = (
    "over its bound: a cache held the part's data, or the machine was slower while its rates were measured than during "
    "the steps; measure again on a quiet machine"
)
UNSTEADY = 1.5  # slowest step over the fastest, from where a mean says little


class Recording(NamedTuple):
    """Kernels of the recorded steps, the slowest first, and the wall time of each step in seconds."""

    rows: list[Row]
    seconds: list[float]


class Cost(NamedTuple):
    """Least work of one part of a step, and the least time that this machine needs for it."""

    nbytes: float
    flops: float
    seconds: float


def __getattr__(name: str) -> Callable[[Profile], None]:
    # `profile PRESET`: the command's function has the preset's name.
    preset = name.replace("_", "-")
    if preset in PRESETS:
        return partial(run, preset)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def run(preset: str, options: Profile) -> None:
    """Profile the preset's step with the tool that `options` names."""
    if options.tool in ("nsys", "ncu"):
        return _nsight(preset, options)
    parallel = Parallel.start(options.device)
    recipe = at_size(dataclasses.replace(PRESETS[preset][1], precision=options.precision), options, parallel.device)
    if _under_nsight() and parallel.device.type != "cuda":
        raise UsageError(f"FASTMOCO_NSIGHT is set, but {NOTHING}: unset it")
    record = partial(count_kernels, _proton(parallel)) if options.tool == "proton" else trace
    name, how = OPENED_BY[options.tool]
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
    with prepare(recipe, options, parallel) as (advance, step), tempfile.TemporaryDirectory() as unasked:
        if _under_nsight():
            return _mark(advance, options.steps, parallel.device)
        recording = record(advance, options.steps, parallel.device, path=(options.out or Path(unasked)) / name)
        machine = measure_machine(parallel.device, PRECISIONS[step.precision].work, tf32=step.precision == "tf32")
        costs = costs_of_parts(step, machine)
        title = describe(preset, step, options)
    tables = [*table_of_parts(recording, costs, machine), "", *table_of_kernels(recording, options.rows)]
    print(terminal.lay_out("\n".join([title, *pace(recording, recipe.batch_size), "", *tables, ""])))
    if options.out is None:
        print("--out FOLDER keeps the trace and a picture of the step")
        return
    draw(recording, costs, title, options.out / PICTURE)
    print(f"trace: {options.out / name} ({how}); picture: {options.out / PICTURE}")


@contextlib.contextmanager
def prepare(recipe: Recipe, options: Profile, parallel: Parallel) -> Iterator[tuple[Callable[[], object], Step]]:
    """A call that trains one step, warmed up, and the step; batches come from `options.data`."""
    images = None
    if options.data != "synthetic":
        images = manifest.scan(manifest.split(Path(options.data))[0], max_pixels=recipe.max_pixels)
    step = Step(
        recipe,
        parallel,
        encoder=options.encoder,
        update=options.update,
        key_stream=options.key_stream,
        images=recipe.batch_size if images is None else len(images),
    )
    noise = noise_batch(recipe, parallel)
    advance = runner(step, lambda: noise, options.graph, options.update)
    with contextlib.ExitStack() as stack:
        draw = lambda: noise  # noqa: E731
        if images is not None:
            from fastmoco.data.loader import Loader  # here, because it needs DALI, and noise does not

            plan = Plan(recipe, images.sizes, shards=images.shards)
            draw = partial(next, stack.enter_context(Loader(images, plan, parallel, range(1 << 30))))
        for _ in range(WARMUP):
            advance(draw(), 1e-3)
        yield lambda: advance(draw(), 1e-3), step


def time_steps(
    advance: Callable[[], object], steps: int, device: torch.device, mark: Callable[[str], Any] = record_function
) -> list[float]:
    """Train `steps` steps, each in a range called "step N", and give the wall time of each in seconds.

    On a GPU it is the device's, from one step's end to the next: waiting for each step would leave gaps in the trace.
    """
    on_gpu = device.type == "cuda"
    moment: Callable[[], Any] = _event if on_gpu else time.perf_counter
    moments = [moment()]
    for number in range(1, steps + 1):
        with mark(f"{STEP}{number}"):
            advance()
        moments.append(moment())
    if on_gpu:
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in pairwise(moments)]
    return [end - start for start, end in pairwise(moments)]


def trace(advance: Callable[[], object], steps: int, device: torch.device, path: Path) -> Recording:
    """Record `steps` steps under torch.profiler, and write the trace to `path` (.json.gz)."""
    events, seconds = record_events(advance, steps, device, path)
    return Recording(kernels(events), seconds)


def record_events(
    advance: Callable[[], object], steps: int, device: torch.device, path: Path
) -> tuple[list[dict[str, Any]], list[float]]:
    """The events of `steps` steps under torch.profiler, which `path` (.json.gz) then holds, and each step's seconds."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with naming(), profile(activities=activities) as profiler:
        seconds = time_steps(advance, steps, device)
    profiler.export_chrome_trace(str(path))
    with gzip.open(path, "rt") as file:
        return json.load(file)["traceEvents"], seconds


def count_kernels(
    proton: Any, advance: Callable[[], object], steps: int, device: torch.device, path: Path
) -> Recording:
    """Record `steps` steps under `proton`, the module, and write its tree to `path` (.hatchet)."""
    if proton.start(str(path.with_suffix("")), context="shadow") is None:
        raise UsageError("proton is switched off here: unset PROTON_DISABLE, or use --tool torch")
    try:
        # A thread that first launches inside a range inherits it: so autograd's are in `backward`. A range of
        # proton's around each step would keep them in the first step for ever.
        with naming(proton.scope):
            seconds = time_steps(advance, steps, device)
    finally:
        proton.finalize()
    return Recording(leaves(json.loads(path.read_text())[0]), seconds)


def costs_of_parts(step: Step, machine: Machine) -> dict[str, Cost]:
    """What each part of a step must cost on `machine`, from the kernels' own formulas and the encoder's convolutions.

    The bound of the encoders is that of our fusion, layer by layer: `bench/roofline.py`, level bnrelu, or key.
    """
    recipe, update, work = step.recipe, step.update, PRECISIONS[step.precision].work
    rows, size = recipe.forward_views * recipe.batch_size // step.parallel.world, work.itemsize
    keys = 0 if step.encoder_k is None else rows
    convs = convolutions(build_encoder(recipe), recipe.crop_size)
    if machine.name == CPU_NAME:
        convs = saved(convs, rows, work)
    encoders = (step.encoder_q, step.encoder_k)
    copies: list[list[torch.Tensor]] = [[] if each is None else list(each.parameters()) for each in encoders]
    table = TensorTable(*(list(group.values()) for group in (update.q, update.velocity, update.k)), *copies)
    blurred = recipe.augmentation.blur_p
    single = {
        # Of three channels: a fourth of zeros, where the step asks for one, is no work that must be done.
        "photometric": photometric_cost(rows + keys, recipe.crop_size, dtype=work, blurred=blurred),
        "update": sgd_ema_cost(table, [copy.dtype for copy in copies[0]]),
        **step.dictionary.costs(rows, work),
    }
    by_part = {name: Cost(*cost, machine.bound(*cost)) for name, cost in single.items()}
    layers: dict[str, Callable[..., Any]] = {
        "key encoder": functools.partial(forward_work, keep=False),
        "query encoder": forward_work,
        "backward": backward_work,
    }
    for name, count in layers.items():
        many = keys if name == "key encoder" else rows
        costs = [
            (many * layer.nbytes * size / ACTIVATION_BYTES, many * layer.flops)
            for layer in count(convs, "bnrelu", rows)
        ]
        nbytes, flops = (sum(column) for column in zip(*costs, strict=True))
        by_part[name] = Cost(nbytes, flops, sum(machine.bound(*cost) for cost in costs))
    return by_part


def describe(preset: str, step: Step, options: Profile) -> str:
    """Two lines: what was trained, and in which precision and on what."""
    recipe, device, threads = step.recipe, step.parallel.device, torch.get_num_threads()
    where = f"CPU, {threads} torch thread{'s' * (threads > 1)}"
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    how = f"encoder {options.encoder}, update {options.update}, graph {options.graph}"
    return (
        f"{preset}: {recipe.arch}, {recipe.batch_size:,} pairs of {recipe.crop_size} px, "
        f"{recipe.candidates - 1:,} keys\n"
        f"{step.precision} on {where}; {how}{', key stream' * options.key_stream}"
    )


def pace(recording: Recording, pairs: int) -> list[str]:
    """Lines on the recorded steps, of `pairs` pairs each: time in kernels, wall time, and whether it was steady."""
    walls, total = recording.seconds, sum(row.seconds for row in recording.rows)
    median, fastest, slowest = statistics.median(walls), min(walls), max(walls)
    lines = [
        f"{len(walls)} step{'s' * (len(walls) > 1)}: {_ms(total / len(walls))} ms of kernels a step in the mean",
        f"wall time a step, under the profiler: median {_ms(median)} ms ({_ms(fastest)} to {_ms(slowest)}), "
        f"{pairs / median:,.1f} pairs/s at the median",
    ]
    if slowest > UNSTEADY * fastest:
        ratio = f"the slowest step took {slowest / fastest:.1f} times the fastest"
        lines.append(f"unsteady: {ratio}; measure again on a quiet machine")
    return lines


def table_of_parts(recording: Recording, costs: dict[str, Cost], machine: Machine) -> list[str]:
    """Lines of the table of parts: mean and range over the steps, speed, and share of the bound."""
    steps, total, over = len(recording.seconds), sum(row.seconds for row in recording.rows), False
    lines = ["| part | ms a step | min to max | share | memory | arithmetic | share of bound |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|")
    for name, (seconds, by_step) in seconds_of_parts(recording.rows).items():
        mean = seconds / steps
        spread = f"{_ms(min(by_step))} to {_ms(max(by_step))}" if by_step else "-"
        speed = "- | - | -"
        if name in costs and mean:
            nbytes, flops, bound = costs[name]
            speed = f"{_rate(nbytes / mean, 'B/s')} | {_rate(flops / mean, 'FLOP/s')} | {bound / mean:.1%}"
            over = over or round(100 * bound / mean) > 100
        lines.append(f"| {name} | {_ms(mean)} | {spread} | {seconds / total:.1%} | {speed} |")
    rates = f"{_rate(machine.bandwidth, 'B/s')} and {_rate(machine.flops, 'FLOP/s')}"
    least = "the least time this machine needs for the part's bytes and flops over the time it took"
    lines += ["", f"share of bound: {least}; the machine's rates, measured right after the steps: {rates}"]
    return [*lines, OVER] if over else lines


def table_of_kernels(recording: Recording, count: int) -> list[str]:
    """Lines of the table of the `count` slowest kernels."""
    steps, total = len(recording.seconds), sum(row.seconds for row in recording.rows)
    lines = ["| kernel | part | calls a step | ms a step | share |", "|---|---|---:|---:|---:|"]
    for row in recording.rows[:count]:
        name, calls = row.name[:60].replace("|", " "), row.calls / steps
        lines.append(f"| {name} | {row.part} | {calls:g} | {_ms(row.seconds / steps)} | {row.seconds / total:.1%} |")
    return lines


def draw(recording: Recording, costs: dict[str, Cost], title: str, path: Path) -> None:
    """A step as a stacked bar, part after part, in milliseconds of kernels; below it the least that each part costs."""
    figure = plots.figure(9, 3.2)
    axis, steps = figure.add_subplot(), len(recording.seconds)
    parts = {name: seconds / steps for name, (seconds, _) in seconds_of_parts(recording.rows).items()}
    total, right, bound = sum(parts.values()), 0.0, 0.0
    for name, seconds in parts.items():
        least, share = costs[name].seconds if name in costs else 0.0, seconds / total
        label = f"{name} {_ms(seconds)} ms ({share:.1%})"
        axis.barh([1, 0], [1e3 * seconds, 1e3 * least], left=[right, bound], edgecolor="white", label=label)
        if least and share > LABELLED:
            text, middle = f"{name}\n{least / seconds:.0%} of its bound", right + 500 * seconds
            axis.annotate(text, (middle, 1), ha="center", va="center", color="white", fontsize=8)
        right, bound = right + 1e3 * seconds, bound + 1e3 * least
    axis.set_yticks([1, 0], ["measured", "bound"])
    axis.set_xlabel(f"milliseconds of kernels a step, mean of {steps} step{'s' * (steps > 1)}")
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=9)
    plots.save(figure, path)


def nsight_command(preset: str, options: Profile, python: str = "python") -> list[str]:
    """The command line that profiles the same steps under nsys or ncu, run by the interpreter `python`."""
    ours = [python, "-m", "fastmoco", "profile", preset, "--tool", "torch"]
    for field in dataclasses.fields(Profile):
        value = getattr(options, field.name)
        # ncu replays every kernel many times over: one step is plenty.
        if field.name == "tool" or value == field.default or (field.name, options.tool) == ("steps", "ncu"):
            continue
        flag = f"--{field.name.replace('_', '-')}"
        ours += [flag] if value is True else [flag, str(value)]
    assert options.out is not None
    out = str(options.out / "step")
    if options.tool == "nsys":
        window = ["--capture-range=cudaProfilerApi", "--capture-range-end=stop"]
        return ["nsys", "profile", "--trace=cuda,nvtx,cudnn,cublas", "--sample=none", *window, "-o", out, *ours]
    window = ["--profile-from-start=off", f"--launch-count={NCU_KERNELS}", "--set=full", "--nvtx"]
    # Left to itself it lowers the card's clocks, for good where it is killed.
    window += ["--import-source=yes", "--clock-control=none"]
    return ["ncu", *window, "-o", out, *ours, "--steps", "1"]


def _nsight(preset: str, options: Profile) -> None:
    print("FASTMOCO_NSIGHT=1 " + shlex.join(nsight_command(preset, options)))
    print("FASTMOCO_NSIGHT=1: the steps after the warm-up run for Nsight to record, and this program records none")
    if not torch.cuda.is_available() or options.device == "cpu":
        print(f"{NOTHING}: run the first line where there is one")
    elif shutil.which(options.tool) is None:
        print(f"{options.tool} is not installed here: run the first line where it is")
    else:
        assert options.out is not None
        _run_nsight(nsight_command(preset, options, sys.executable), options.out)


def _run_nsight(command: list[str], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    result = subprocess.run(["env", "FASTMOCO_NSIGHT=1", *command])
    if result.returncode:
        raise UsageError(f"{command[0]} ended with exit code {result.returncode}: see its message above")


def _proton(parallel: Parallel) -> Any:
    if parallel.device.type != "cuda":
        raise UsageError("profile --tool proton needs an NVIDIA GPU, and there is none here: use --tool torch")
    try:
        return importlib.import_module("triton.profiler")
    except ImportError as error:
        raise UsageError(f"this Triton has no proton ({error}): use --tool torch") from error


def _under_nsight() -> bool:
    return bool(os.environ.get("FASTMOCO_NSIGHT"))


def _mark(advance: Callable[[], object], steps: int, device: torch.device) -> None:
    torch.cuda.cudart().cudaProfilerStart()
    with naming():
        time_steps(advance, steps, device, torch.cuda.nvtx.range)
    torch.cuda.cudart().cudaProfilerStop()


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _ms(seconds: float) -> str:
    milliseconds = 1e3 * seconds
    return f"{milliseconds:,.1f}" if milliseconds >= 10 else f"{milliseconds:.3f}"


def _rate(value: float, unit: str) -> str:
    from matplotlib.ticker import EngFormatter

    return EngFormatter(unit, places=1)(value) if value else "-"
