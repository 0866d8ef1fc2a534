"""The whole training step: image pairs a second, beside the published step, the physical and a practical bound.

Ours is `fastmoco.contrast.step.Step` itself, from uint8 crops that already lie on the device: its time includes the
photometric augmentation. The published step is given finished float views, so the comparison leans towards it. The
provider "fastmoco bf16, finished views" gets such views too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from fastmoco.bench.baseline import plain_step
from fastmoco.bench.journal import Journal
from fastmoco.bench.record_files import Row, matches
from fastmoco.bench.roofline import (
    ASSUMED_CONVOLUTION_RATES,
    CONVOLUTION_RATES,
    LEVELS,
    convolutions,
    saved,
    seconds_per_pair,
)
from fastmoco.bench.timing import CPU_NAME, Machine, Timing, interleave, measure_convolutions, measure_machine
from fastmoco.contrast.algorithms import algorithms
from fastmoco.contrast.graph import GraphMode, runner
from fastmoco.contrast.step import Step
from fastmoco.contrast.update import resolve_precision
from fastmoco.data.batch import Batch
from fastmoco.data.noise import noise_batch, noise_images
from fastmoco.encoder import build_encoder
from fastmoco.parallel import Parallel
from fastmoco.recipe import Recipe

LEVEL = "bnrelu"  # the level of fusion that our kernels reach, and so the bound that the shares refer to
WORK = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# The published step that the others are compared with, where it is timed: the first of these.
BASELINES = ("published fp16 autocast", "published fp32", "published tf32", "published bf16 autocast")


class Provider(NamedTuple):
    """A step to time: `start` builds it and returns the call; `precision` and `level` of fusion decide its bound.

    `group` is "core" for what the project's targets are computed from, "compiled" for what torch.compile takes minutes
    to build, else "more".
    """

    start: Callable[[], Callable[[], object]]
    precision: str
    level: str = LEVEL
    group: str = "core"


def run(
    recipe: Recipe,
    device: torch.device,
    *,
    rounds: int = 20,
    warmup: int = 3,
    precision: str = "",
    group: str = "all",
    only: str = "",
    skip: str = "",
    journal: Journal | None = None,
) -> list[Row]:
    """Pairs a second of the providers that `choose` chooses. Raises ValueError if nothing is left.

    The journal has the rows after every round. A provider that fails is noted there and costs its own row.
    """
    journal = journal or Journal()
    selection = choose(providers(recipe, device), precision, group, only, skip)
    # First, while the memory is free and the process can still go without it.
    machines = {p.precision: machine_at(device, p.precision) for p in selection.values()}
    speeds = {p.precision: convolution_rates(device, p.precision) for p in selection.values()}
    if device.type == "cuda":
        torch.cuda.empty_cache()
    row = functools.partial(_row, recipe, selection, machines, speeds)
    calls: dict[str, Callable[[], object]] = {}
    for name, provider in selection.items():
        with journal.attempt(name):
            calls[name] = provider.start()

    def on_failure(name: str, error: Exception) -> None:
        calls.pop(name)  # and with it the memory
        journal.fail(name, error)

    def after_round(times: dict[str, Timing]) -> None:
        journal.keep(row(name, timing) for name, timing in times.items())

    if not calls:
        return []
    times = interleave(
        calls, rounds=rounds, warmup=warmup, device=device, after_round=after_round, on_failure=on_failure
    )
    return [row(name, timing) for name, timing in times.items()]


def choose(available: dict[str, Provider], precision: str, group: str, only: str, skip: str) -> dict[str, Provider]:
    """The providers of `group` (the baseline is in each) and `precision`, with a word of `only` and none of `skip`.

    ValueError, with the names that there are, where nothing is left.
    """
    baseline = _baseline(available)
    selection = {
        name: provider
        for name, provider in available.items()
        if (group in ("all", provider.group) or name == baseline)
        and precision in ("", provider.precision)
        and matches(name, only)
        and not (skip and matches(name, skip))
    }
    if not selection:
        raise ValueError(f"nothing to time is left: the providers are {'; '.join(available)}")
    return selection


def machine_at(device: torch.device, precision: str) -> Machine:
    """The ceilings of `device` for a precision of the step."""
    machine = measure_machine(device, WORK[precision], tf32=precision == "tf32")
    if device.type == "cpu" and precision == "bf16":
        # Where fp32 is multiplied faster, `kernels.convolution` widens bf16 numbers to it.
        machine = dataclasses.replace(machine, flops=max(machine.flops, measure_machine(device, torch.float32).flops))
    return machine


def pairs_bound(recipe: Recipe, machine: Machine, element_bytes: int, level: str = LEVEL) -> float:
    """Most pairs a second that `machine` could train at a level of fusion, by default that of our kernels."""
    convs = _convolutions(recipe)
    if machine.name == CPU_NAME:
        convs = saved(convs, recipe.batch_size, torch.float32 if element_bytes == 4 else torch.bfloat16)
    return 1 / seconds_per_pair(convs, level, recipe.batch_size, machine.flops, machine.bandwidth, element_bytes)


def practical_bounds(recipe: Recipe, machine: Machine, rates: Sequence[float], element_bytes: int) -> list[float]:
    """`pairs_bound` with convolutions at each of `rates`, in operations a second, in place of a matrix product's."""
    slower = (dataclasses.replace(machine, flops=min(rate, machine.flops)) for rate in rates)
    return [pairs_bound(recipe, each, element_bytes) for each in slower]


@functools.cache
def convolution_rates(device: torch.device, precision: str) -> tuple[float, ...]:
    """Operations a second that convolutions reach on `device`: what roofline.py knows of the GPU, else measured."""
    if device.type == "cuda" and precision in ("bf16", "fp16"):
        gpu, rated = torch.cuda.get_device_name(device), CONVOLUTION_RATES | ASSUMED_CONVOLUTION_RATES
        row = next((rates for name, rates in rated.items() if name in gpu), None)
        if row is not None:
            return row
    dtypes = {WORK[precision]} | ({torch.float32} if device.type == "cpu" else set())  # as in `machine_at`
    with tf32(convolutions=precision == "tf32", products=False):
        return (max(measure_convolutions(device, dtype) for dtype in dtypes),)


def graph_mode(device: torch.device) -> GraphMode:
    """Captured or failed, on a GPU: a step timed eagerly under the name of a captured one would be a lie."""
    return "on" if device.type == "cuda" else "off"


def providers(recipe: Recipe, device: torch.device) -> dict[str, Provider]:
    """Every way to run the step on `device`, the published one first."""
    published_step = functools.partial(published, recipe, device)
    on_gpu = device.type == "cuda"
    ours_step = functools.partial(
        ours,
        recipe,
        device,
        graph=graph_mode(device),
        pool=functools.cache(torch.cuda.graph_pool_handle) if on_gpu else None,
    )
    plain = "tf32" if on_gpu else "fp32"  # torch's own default for convolutions in fp32 is TF32, where there is any
    group = "more" if on_gpu else "core"
    table = {
        f"published {plain}": Provider(published_step, plain, group=group),
        **_autocast(published_step, torch.bfloat16, "bf16", group),
        "fastmoco fp32": Provider(functools.partial(ours_step, "fp32"), "fp32", group=group),
        "fastmoco bf16": Provider(functools.partial(ours_step, "bf16"), "bf16"),
        **{
            f"fastmoco {precision}, finished views": Provider(
                functools.partial(ours_step, precision, finished_views=True), precision, group=group
            )
            for precision in ("fp32", "bf16")
        },
    }
    return table | (_gpu_providers(published_step, ours_step) if on_gpu else {})


def _gpu_providers(published_step: Callable, ours_step: Callable) -> dict[str, Provider]:
    def low(group: str = "more", **options) -> Provider:
        return Provider(functools.partial(ours_step, "bf16", **options), "bf16", group=group)

    return {
        **_autocast(published_step, torch.float16, "fp16", "core"),
        "compiled channels-last fp16 autocast": Provider(
            functools.partial(published_step, autocast=torch.float16, channels_last=True, compiled=True),
            "fp16",
            group="compiled",
        ),
        "fastmoco tf32": Provider(functools.partial(ours_step, "tf32"), "tf32", group="more"),
        "fastmoco fp16": Provider(functools.partial(ours_step, "fp16"), "fp16"),
        "fastmoco bf16, no graph": low("core", graph="off"),
        "fastmoco bf16, deterministic": low("core", deterministic=True),
        "fastmoco bf16, key stream": low(key_stream=True),
        "fastmoco bf16, eager encoder": low(encoder="eager"),
        "fastmoco bf16, compiled encoder": low("compiled", encoder="compile"),
        "fastmoco bf16, torch update": low(update="torch"),
        "fastmoco bf16, three channels": low(channels=3),
    }


def _autocast(published_step: Callable, dtype: torch.dtype, name: str, group: str) -> dict[str, Provider]:
    start = functools.partial(published_step, autocast=dtype)
    channels_last = functools.partial(start, channels_last=True)
    return {
        f"published {name} autocast": Provider(start, name, group=group),
        f"channels-last {name} autocast": Provider(channels_last, name, group=group),
    }


def published(recipe: Recipe, device: torch.device, **options) -> Callable[[], object]:
    """The call that trains one published step on random views; `options` are those of `PlainStep`."""
    if recipe.dictionary == "queue":  # which must be a multiple of the batch
        batches = max(1, recipe.check_queue() // recipe.batch_size)
        recipe = dataclasses.replace(recipe, queue_size=batches * recipe.batch_size)
    step = plain_step(recipe, device, **options)
    shape = (recipe.batch_size, 3, recipe.crop_size, recipe.crop_size)
    views = [torch.randn(shape, device=device) for _ in range(2)]

    def call() -> float:
        with tf32(convolutions=True, products=False), algorithms(device, False):  # torch's defaults; cuDNN by trial
            return step(*views)

    return call


def ours(
    recipe: Recipe,
    device: torch.device,
    precision: str,
    *,
    graph: GraphMode = "off",
    pool: Callable | None = None,
    finished_views: bool = False,
    deterministic: bool = False,
    **options,
) -> Callable[[], object]:
    """The call that trains one step of ours on random crops, or views; `options` are those of `Step`.

    `pool` gives the one pool of memory for all graphs, or a GPU would not hold them beside each other.
    """
    allowed = precision == "tf32"
    with tf32(convolutions=allowed, products=allowed), algorithms(device, deterministic):
        parallel = Parallel(device=device)
        step = Step(
            recipe,
            parallel,
            resolve_precision(precision, device),
            deterministic=deterministic,
            images=noise_images(recipe),
            **options,
        )
        batch = noise_batch(recipe, parallel)
        if finished_views:
            batch = _with_finished_views(batch)
        advance = runner(step, lambda: batch, graph, pool=None if pool is None else pool())

    def call() -> object:
        with tf32(convolutions=allowed, products=allowed), algorithms(device, deterministic):
            return advance(batch, 1e-3)

    return call


def _with_finished_views(batch: Batch) -> Batch:
    # As the loader gives them where DALI makes them.
    def views(crops: torch.Tensor) -> torch.Tensor:
        rows, size, *_ = crops.shape  # a bank has no rows of keys
        return torch.randn(rows, 3, size, size, device=crops.device).to(memory_format=torch.channels_last)

    return dataclasses.replace(batch, query_crops=views(batch.query_crops), key_crops=views(batch.key_crops))


@contextlib.contextmanager
def tf32(*, convolutions: bool, products: bool) -> Iterator[None]:
    """Whether convolutions and matrix products in fp32 may use TF32 inside: switches of the whole process.

    Steps of several precisions take turns in one process, and each sets them for itself when it is built.
    """
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = convolutions
    torch.set_float32_matmul_precision("high" if products else "highest")
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before[0]
        torch.set_float32_matmul_precision(before[1])


def _row(
    recipe: Recipe,
    selection: dict[str, Provider],
    machines: dict[str, Machine],
    speeds: dict[str, tuple[float, ...]],
    name: str,
    timing: Timing,
) -> Row:
    _, precision, level, _ = selection[name]
    bound = functools.partial(pairs_bound, recipe, machines[precision], WORK[precision].itemsize)
    config = config_of(recipe)
    rates = tuple(recipe.batch_size / sample for sample in timing.samples)
    extra = {
        "level": level,
        "bounds": {each: bound(each) for each in LEVELS},
        "convolutions": list(speeds[precision]),
        "practical": practical_bounds(recipe, machines[precision], speeds[precision], WORK[precision].itemsize),
        "assumed": speeds[precision] in ASSUMED_CONVOLUTION_RATES.values(),
    }
    return Row("step", name, "pairs/s", rates, config, _baseline(selection), bound(level), extra)


def config_of(recipe: Recipe) -> dict[str, object]:
    """What a row of a step says of its recipe."""
    config: dict[str, object] = {"arch": recipe.arch, "px": recipe.crop_size, "batch": recipe.batch_size}
    if recipe.dictionary == "batch":
        return config | {"dictionary": "batch", "symmetric": recipe.symmetric}
    return config | {recipe.dictionary: recipe.queue_size}


def _baseline(selection: dict[str, Provider]) -> str:
    return next((name for name in BASELINES if name in selection), next(iter(selection)))


@functools.lru_cache
def _convolutions(recipe: Recipe) -> list:
    return convolutions(build_encoder(recipe), recipe.crop_size)
