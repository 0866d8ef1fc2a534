"""The whole training step: image pairs a second, beside the published step and beside the physical bound.

Ours is `fastmoco.contrast.step.Step` itself, from uint8 crops that already lie on the device: its time includes the
photometric augmentation. The published step is given finished float views, so the comparison leans towards it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import torch

from fastmoco.bench.baseline import PublishedStep
from fastmoco.bench.report import Row
from fastmoco.bench.roofline import KEY_LEVEL, convolutions, flops_per_pair, seconds_per_pair
from fastmoco.bench.timing import Machine, interleave, measure_machine
from fastmoco.contrast.graph import runner
from fastmoco.contrast.step import Step
from fastmoco.contrast.update import resolve_precision
from fastmoco.data.placeholder import noise_batch
from fastmoco.encoder import build_encoder
from fastmoco.parallel import Parallel
from fastmoco.recipe import Recipe

LEVEL = "bnrelu"  # the level of fusion that our kernels reach, and so the bound that the shares refer to
WORK = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Provider(NamedTuple):
    """A step to time: `start` builds it and returns the call; `precision` and `level` of fusion decide its bound."""

    start: Callable[[], Callable[[], object]]
    precision: str
    level: str = LEVEL


def run(
    recipe: Recipe,
    device: torch.device,
    *,
    rounds: int = 20,
    warmup: int = 3,
    precision: str = "",
    only: str = "",
    skip: str = "",
) -> list[Row]:
    """Pairs a second of every provider on `device`, or of those of one precision, with `only` and without `skip` in
    their names. ValueError where nothing is left."""
    found = providers(recipe, device)
    named = [name for name in found if only in name and not (skip and skip in name)]
    chosen = {name: found[name] for name in named if precision in ("", found[name].precision)}
    if not chosen:
        raise ValueError(f"nothing to time on {device.type}: its providers are {', '.join(found)}")
    calls = {name: provider.start() for name, provider in chosen.items()}
    times = interleave(calls, rounds=rounds, warmup=warmup, device=device)
    machines = {p.precision: machine_at(device, p.precision) for p in chosen.values()}
    config = {"arch": recipe.arch, "px": recipe.crop_size, "batch": recipe.batch_size, "queue": recipe.queue_size}
    rows = []
    for name, timing in times.items():
        _, precision, level = chosen[name]
        bound = pairs_bound(recipe, machines[precision], WORK[precision].itemsize, level)
        rates = tuple(recipe.batch_size / sample for sample in timing.samples)
        rows.append(Row("step", name, "pairs/s", rates, config, _baseline(chosen), bound, {"level": level}))
    return rows


def machine_at(device: torch.device, precision: str) -> Machine:
    """The ceilings of `device` for a precision of the step."""
    return measure_machine(device, WORK[precision], tf32=precision == "tf32")


def pairs_bound(recipe: Recipe, machine: Machine, element_bytes: int, level: str = LEVEL) -> float:
    """Most pairs a second that `machine` could train at a level of fusion, by default that of our kernels."""
    convs = _convolutions(recipe)
    return 1 / seconds_per_pair(convs, level, recipe.batch_size, machine.flops, machine.bandwidth, element_bytes)


def flops_bound(recipe: Recipe, machine: Machine) -> float:
    """Most pairs a second that `machine` could train if memory were free."""
    return machine.flops / flops_per_pair(_convolutions(recipe))


def providers(recipe: Recipe, device: torch.device) -> dict[str, Provider]:
    """Every way to run the step on `device`, the published one first."""
    published = functools.partial(_published, recipe, device)
    ours = functools.partial(_ours, recipe, device, functools.cache(torch.cuda.graph_pool_handle))
    # Torch's own default for convolutions in fp32 is TF32, where there is any.
    plain = "tf32" if device.type == "cuda" else "fp32"
    found = {
        f"published {plain}": Provider(published, plain),
        **_autocast(published, torch.bfloat16, "bf16"),
        "fastmoco fp32": Provider(functools.partial(ours, "fp32"), "fp32"),
        "fastmoco bf16": Provider(functools.partial(ours, "bf16"), "bf16"),
    }
    if device.type == "cuda":
        low = functools.partial(ours, "bf16")
        found |= {
            **_autocast(published, torch.float16, "fp16"),
            "fastmoco tf32": Provider(functools.partial(ours, "tf32"), "tf32"),
            "fastmoco fp16": Provider(functools.partial(ours, "fp16"), "fp16"),
            "fastmoco bf16, no graph": Provider(functools.partial(low, graph="off"), "bf16"),
            "fastmoco bf16, key stream": Provider(functools.partial(low, key_stream=True), "bf16"),
            "fastmoco bf16, fused key encoder": Provider(
                functools.partial(low, encoder="fused-key"), "bf16", KEY_LEVEL
            ),
            "fastmoco bf16, eager encoder": Provider(functools.partial(low, encoder="eager"), "bf16"),
            "fastmoco bf16, compiled encoder": Provider(functools.partial(low, encoder="compile"), "bf16"),
            "fastmoco bf16, torch update": Provider(functools.partial(low, update="torch"), "bf16"),
        }
    return found


def _autocast(published: Callable, dtype: torch.dtype, name: str) -> dict[str, Provider]:
    options = {"": {}, "channels-last ": {"channels_last": True}}
    on_gpu = published.args[1].type == "cuda"
    if on_gpu and name == "fp16":
        options["compiled channels-last "] = {"channels_last": True, "compiled": True}
    return {
        f"{how or 'published '}{name} autocast": Provider(functools.partial(published, autocast=dtype, **given), name)
        for how, given in options.items()
    }


def _published(recipe: Recipe, device: torch.device, **options) -> Callable[[], object]:
    # Its queue must be a multiple of the batch.
    recipe = dataclasses.replace(recipe, queue_size=max(1, recipe.queue_size // recipe.batch_size) * recipe.batch_size)
    step = PublishedStep(recipe, device, **options)
    shape = (recipe.batch_size, 3, recipe.crop_size, recipe.crop_size)
    views = [torch.randn(shape, device=device) for _ in range(2)]

    def call() -> float:
        torch.backends.cudnn.allow_tf32 = True  # our own step in fp32 forbids it, for the whole process
        return step(*views)

    return call


def _ours(
    recipe: Recipe, device: torch.device, pool: Callable, precision: str, graph: str = "auto", **options
) -> Callable[[], object]:
    parallel = Parallel(device=device)
    step = Step(recipe, parallel, resolve_precision(precision, device), **options)
    batch = noise_batch(recipe, parallel)
    # One pool of memory for all graphs, or a GPU would not hold them beside each other.
    shared = pool() if device.type == "cuda" else None
    advance = runner(step, lambda: batch, graph, pool=shared)
    return lambda: advance(batch, 1e-3)


def _baseline(chosen: dict[str, Provider]) -> str:
    preferred = ("published fp16 autocast", "published fp32", "published tf32", "published bf16 autocast")
    return next((name for name in preferred if name in chosen), next(iter(chosen)))


@functools.lru_cache
def _convolutions(recipe: Recipe) -> list:
    return convolutions(build_encoder(recipe), recipe.crop_size)
