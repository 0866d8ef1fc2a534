"""`profile PRESET`: which kernels take the time of a step, which part of it they belong to, and how fast they are.

torch.profiler traces a few steps; the trace opens in Perfetto (ui.perfetto.dev) and is read here for the table. On a
GPU Triton's proton can take its place: it keeps sums by part and kernel instead of single events. For Nsight the exact
command is printed, and run where the tool is installed: it runs this module's steps with NVTX ranges and the profiler
switched on after the warm-up.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import importlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from fastmoco.bench.roofline import ACTIVATION_BYTES, KEY_LEVEL, backward_work, convolutions, forward_work
from fastmoco.bench.timing import measure_machine
from fastmoco.contrast.graph import runner
from fastmoco.contrast.parts import PARTS, named
from fastmoco.contrast.step import Step
from fastmoco.contrast.update import PRECISIONS
from fastmoco.data import manifest
from fastmoco.data.loader import Loader
from fastmoco.data.placeholder import noise_batch
from fastmoco.data.plan import Plan
from fastmoco.encoder import build_encoder
from fastmoco.kernels import enqueue, info_nce, photometric, sgd_ema
from fastmoco.kernels.tensor_table import TensorTable
from fastmoco.options import Profile, UsageError
from fastmoco.parallel import Parallel
from fastmoco.recipe import PRESETS, Recipe

WARMUP = 3  # steps before the recorded ones: kernels are compiled and memory is reserved
SIZES = ("arch", "batch_size", "crop_size", "queue_size")
TRACE, TREE, PICTURE = "trace.json.gz", "step.hatchet", "step.svg"
OPENED_BY = {"torch": (TRACE, "open it at ui.perfetto.dev"), "proton": (TREE, "see proton-viewer --metrics time/ms")}
LAUNCHES = ("cuda_runtime", "cuda_driver")  # Triton launches through the driver


class Row(NamedTuple):
    """One kernel (on a CPU: one operator without what it calls) over all recorded steps."""

    name: str
    part: str
    """Part of the step that launched it, one of `parts.PARTS`, or "other"."""
    calls: int
    seconds: float


class Cost(NamedTuple):
    """Least work of one part of a step, and the least time that this machine needs for it."""

    nbytes: float
    flops: float
    seconds: float


def v1(options: Profile) -> None:
    """`profile v1`."""
    run("v1", options)


def v2(options: Profile) -> None:
    """`profile v2`."""
    run("v2", options)


def cifar(options: Profile) -> None:
    """`profile cifar`."""
    run("cifar", options)


def demo(options: Profile) -> None:
    """`profile demo`."""
    run("demo", options)


def run(preset: str, options: Profile) -> None:
    """Profile the preset's step with the tool that `options` names."""
    given = {name: getattr(options, name) for name in SIZES if getattr(options, name) is not None}
    recipe = dataclasses.replace(PRESETS[preset][1], precision=options.precision, **given)
    if options.tool in ("nsys", "ncu"):
        return _nsight(preset, options)
    parallel = Parallel.start(options.device)
    record = partial(traced, path=options.out / TRACE)
    if options.tool == "proton":
        record = partial(counted, _proton(parallel), path=options.out / TREE)
    options.out.mkdir(parents=True, exist_ok=True)
    with prepared(recipe, options, parallel) as (advance, step):
        if _under_nsight():
            return _marked(advance, options.steps)
        rows = record(advance, options.steps)
        costs = costs_of_parts(step)
    draw(rows, options.steps, options.out / PICTURE)
    print(report(rows, costs, options, step.precision, parallel))


@contextlib.contextmanager
def prepared(recipe: Recipe, options: Profile, parallel: Parallel) -> Iterator[tuple[Callable[[], object], Step]]:
    """A call that trains one step, warmed up, and the step; batches come from `options.data`."""
    step = Step(recipe, parallel, encoder=options.encoder, update=options.update, key_stream=options.key_stream)
    noise = noise_batch(recipe, parallel)
    advance = runner(step, lambda: noise, options.graph, options.update)
    with contextlib.ExitStack() as stack:
        draw = lambda: noise  # noqa: E731
        if options.data != "synthetic":
            images = manifest.scan(manifest.split(Path(options.data))[0], max_pixels=recipe.max_pixels)
            plan = Plan(recipe, images.sizes)
            draw = partial(next, stack.enter_context(Loader(images, plan, recipe, parallel, stop_step=1 << 30)))
        for _ in range(WARMUP):
            advance(draw(), 1e-3)
        yield lambda: advance(draw(), 1e-3), step


def traced(advance: Callable[[], object], steps: int, path: Path) -> list[Row]:
    """Record `steps` steps under torch.profiler, write the trace to `path` (.json.gz), and give its kernels."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with named(), profile(activities=activities, record_shapes=True) as recorded:
        for _ in range(steps):
            advance()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    recorded.export_chrome_trace(str(path))
    with gzip.open(path, "rt") as file:
        return kernels(json.load(file)["traceEvents"])


def counted(proton: Any, advance: Callable[[], object], steps: int, path: Path) -> list[Row]:
    """Record `steps` steps under `proton`, the module, write its tree to `path` (.hatchet), and give its kernels."""
    if proton.start(str(path.with_suffix("")), context="shadow") is None:
        raise UsageError("proton is switched off here: unset PROTON_DISABLE, or use --tool torch")
    try:
        # A thread that first launches inside a range inherits it: so autograd's are in `backward`.
        with named(proton.scope):
            for _ in range(steps):
                advance()
            torch.cuda.synchronize()
    finally:
        proton.finalize()
    return leaves(json.loads(path.read_text())[0])


def leaves(tree: dict[str, Any]) -> list[Row]:
    """Rows of a tree of proton's, the slowest first: its kernels, in the part above them."""
    sums: dict[tuple[str, str], list[float]] = {}
    nodes = [(tree, "other")]
    while nodes:
        node, part = nodes.pop()
        name, measured = node["frame"]["name"], node["metrics"]
        nodes += [(child, name if name in PARTS else part) for child in node["children"]]
        if not node["children"] and "time (ns)" in measured:
            total = sums.setdefault((name, part), [0, 0.0])
            total[0] += measured["count"]
            total[1] += measured["time (ns)"] / 1e9
    return _slowest_first(sums)


def kernels(events: list[dict[str, Any]]) -> list[Row]:
    """Rows of a Chrome trace, the slowest first: the GPU's kernels, or without any, the CPU's operators."""
    spans = [event for event in events if event.get("ph") == "X" and "dur" in event]
    ranges = [event for event in spans if event.get("cat") == "user_annotation" and event["name"] in PARTS]
    launches = {_correlation(event): event["ts"] for event in spans if event.get("cat") in LAUNCHES}
    on_gpu = [event for event in spans if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    if on_gpu:
        times = [(event["name"], launches.get(_correlation(event), event["ts"]), event["dur"]) for event in on_gpu]
    else:
        times = _own_times([event for event in spans if event.get("cat") == "cpu_op"])
    sums: dict[tuple[str, str], list[float]] = {}
    for name, start, duration in times:
        total = sums.setdefault((name, _part(start, ranges)), [0, 0.0])
        total[0] += 1
        total[1] += duration / 1e6
    return _slowest_first(sums)


def _slowest_first(sums: dict[tuple[str, str], list[float]]) -> list[Row]:
    found = [Row(name, part, int(count), seconds) for (name, part), (count, seconds) in sums.items()]
    return sorted(found, key=lambda row: -row.seconds)


def costs_of_parts(step: Step) -> dict[str, Cost]:
    """What each part of a step must cost, from the kernels' own formulas and the encoder's convolutions.

    The bound of the encoders is that of our fusion, layer by layer: `bench/roofline.py`, level bnrelu, or key.
    """
    recipe, update, size = step.recipe, step.update, PRECISIONS[step.precision].work.itemsize
    rows, work = recipe.views * recipe.batch_size, PRECISIONS[step.precision].work
    machine = measure_machine(step.parallel.device, work, tf32=step.precision == "tf32")
    convs = convolutions(build_encoder(recipe), recipe.crop_size)
    copies = [list(encoder.parameters()) for encoder in (step.encoder_q, step.encoder_k)]
    table = TensorTable(*(list(group.values()) for group in (update.q, update.velocity, update.k)), *copies)
    single = {
        "photometric": photometric.cost(2 * rows, recipe.crop_size, dtype=work, blurred=recipe.augmentation.blur_p),
        "loss": info_nce.cost(rows, recipe.queue_size, recipe.dim, work, step.queue.keys.dtype),
        "update": sgd_ema.cost(table, [copy.dtype for copy in copies[0]]),
        "enqueue": enqueue.cost(recipe.queue_size, recipe.dim, rows, step.queue.keys.dtype, torch.float32),
    }
    found = {name: Cost(*cost, machine.bound(*cost)) for name, cost in single.items()}
    forward_only = any(getattr(module, "forward_only", False) for module in step.encoder_k.modules())
    layers = {"key encoder": forward_work, "query encoder": forward_work, "backward": backward_work}
    for name, count in layers.items():
        level = KEY_LEVEL if forward_only and name == "key encoder" else "bnrelu"
        costs = [
            (rows * layer.nbytes * size / ACTIVATION_BYTES, rows * layer.flops) for layer in count(convs, level, rows)
        ]
        nbytes, flops = (sum(column) for column in zip(*costs, strict=True))
        found[name] = Cost(nbytes, flops, sum(machine.bound(*cost) for cost in costs))
    return found


def report(rows: list[Row], costs: dict[str, Cost], options: Profile, precision: str, parallel: Parallel) -> str:
    """What `profile` prints: the parts with their speed and share of the bound, then the kernels that take most."""
    total = sum(row.seconds for row in rows)
    where = torch.cuda.get_device_name(parallel.device) if parallel.device.type == "cuda" else "CPU"
    count = f"{options.steps} step{'s' * (options.steps > 1)}"
    lines = [f"{count} on {where}, {precision}: {1e3 * total / options.steps:.1f} ms of kernels a step", ""]
    lines += ["| part | ms a step | share | GB/s | TFLOP/s | share of bound |", "|---|---:|---:|---:|---:|---:|"]
    for name, seconds in _seconds_of_parts(rows).items():
        seconds /= options.steps
        speed = " | | "
        if name in costs and seconds:
            nbytes, flops, bound = costs[name]
            speed = f"{nbytes / seconds / 1e9:,.3g} | {flops / seconds / 1e12:.3g} | {bound / seconds:.0%}"
        lines.append(f"| {name} | {1e3 * seconds:.2f} | {seconds * options.steps / total:.1%} | {speed} |")
    lines += ["", "| kernel | part | calls a step | ms a step | share |", "|---|---|---:|---:|---:|"]
    for row in rows[: options.rows]:
        lines.append(
            f"| {row.name[:60].replace('|', ' ')} | {row.part} | {row.calls / options.steps:g} | "
            f"{1e3 * row.seconds / options.steps:.3f} | {row.seconds / total:.1%} |"
        )
    name, how = OPENED_BY[options.tool]
    lines += ["", f"trace: {options.out / name} ({how}); picture: {options.out / PICTURE}"]
    return "\n".join(lines)


def draw(rows: list[Row], steps: int, path: Path) -> None:
    """One step as a stacked bar, part after part, in milliseconds of kernels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2), layout="constrained")
    axis, start = figure.add_subplot(), 0.0
    parts = {name: 1e3 * seconds / steps for name, seconds in _seconds_of_parts(rows).items()}
    for name, width in parts.items():
        axis.barh(0, width, left=start, edgecolor="white", label=f"{name} {width:.3g} ms")
        start += width
    axis.set_yticks([])
    axis.set_xlabel("milliseconds of kernels in one step")
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, fontsize=8, frameon=False)
    figure.savefig(path)


def _seconds_of_parts(rows: list[Row]) -> dict[str, float]:
    return {name: sum(row.seconds for row in rows if row.part == name) for name in (*PARTS, "other")}


def nsight_command(preset: str, options: Profile) -> list[str]:
    """The command line that profiles the same steps under nsys or ncu."""
    ours = [sys.executable, "-m", "fastmoco", "profile", preset, "--tool", "torch"]
    for field in dataclasses.fields(Profile):
        value = getattr(options, field.name)
        # ncu replays every kernel many times over: one step is plenty.
        if field.name == "tool" or value == field.default or (field.name, options.tool) == ("steps", "ncu"):
            continue
        flag = f"--{field.name.replace('_', '-')}"
        ours += [flag] if value is True else [flag, str(value)]
    out = str(options.out / "step")
    if options.tool == "nsys":
        window = ["--capture-range=cudaProfilerApi", "--capture-range-end=stop"]
        return ["nsys", "profile", "--trace=cuda,nvtx,cudnn,cublas", "--sample=none", *window, "-o", out, *ours]
    window = ["--profile-from-start=off", "--set=full", "--nvtx", "--import-source=yes"]
    return ["ncu", *window, "-o", out, *ours, "--steps", "1"]


def _nsight(preset: str, options: Profile) -> None:
    command = nsight_command(preset, options)
    print("FASTMOCO_NSIGHT=1 " + shlex.join(command), flush=True)
    if shutil.which(command[0]) is None:
        print(f"{command[0]} is not installed here: run this line where it is")
        return
    options.out.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["env", "FASTMOCO_NSIGHT=1", *command])
    if done.returncode:
        raise UsageError(f"{command[0]} ended with exit code {done.returncode}: see its message above")


def _proton(parallel: Parallel) -> Any:
    if parallel.device.type != "cuda":
        raise UsageError("profile --tool proton needs an NVIDIA GPU, and there is none here: use --tool torch")
    try:
        return importlib.import_module("triton.profiler")
    except ImportError as error:
        raise UsageError(f"this Triton has no proton ({error}): use --tool torch") from error


def _under_nsight() -> bool:
    return bool(os.environ.get("FASTMOCO_NSIGHT"))


def _marked(advance: Callable[[], object], steps: int) -> None:
    torch.cuda.cudart().cudaProfilerStart()
    with named():
        for _ in range(steps):
            advance()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()


def _correlation(event: dict[str, Any]) -> object:
    return event.get("args", {}).get("correlation")


def _part(moment: float, ranges: list[dict[str, Any]]) -> str:
    for event in ranges:
        if event["ts"] <= moment <= event["ts"] + event["dur"]:
            return event["name"]
    return "other"


def _own_times(events: list[dict[str, Any]]) -> list[tuple[str, float, float]]:
    """Name, start and duration of each operator, less the operators that it called, in microseconds."""
    found: list[list[Any]] = []
    open_by_thread: dict[object, list[list[Any]]] = {}
    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        stack = open_by_thread.setdefault(event["tid"], [])
        while stack and stack[-1][3] <= event["ts"]:
            stack.pop()
        if stack:
            stack[-1][2] -= event["dur"]
        entry = [event["name"], event["ts"], event["dur"], event["ts"] + event["dur"]]
        stack.append(entry)
        found.append(entry)
    return [(name, start, max(0.0, own)) for name, start, own, _ in found]
