"""How many bytes a step puts on the wires between GPUs, ours and the published way, and on which wire: a model.

`fastmoco bench scaling --model` prints it for 8, 64 and 512 GPUs. A test holds its totals against bytes counted in a
run of four ranks; the share of each link rests on the two assumptions below and was measured on no cluster.

- Collectives run as rings (Patarasu and Yuan, 2009), one for each GPU of a machine, each carrying an equal share and
  leaving the machine by another GPU's network card. So of what a GPU receives, one part in `per_machine` comes by
  network and the rest by NVLink; within one machine everything comes by NVLink.
- The exchange of crops is direct: a crop goes from the GPU that holds it to the one that encodes it, each GPU being
  equally likely, and stays on NVLink where both are in one machine.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, NamedTuple

import torch

from fastmoco.encoder import build_encoder
from fastmoco.recipe import Recipe

Way = Literal["published", "fastmoco"]
WAYS: tuple[Way, ...] = ("published", "fastmoco")
GPUS = (8, 64, 512)
PER_MACHINE = 8
LABEL = 8  # bytes of an index


class Sizes(NamedTuple):
    """What the traffic of a recipe's step depends on."""

    small: int
    """Parameters of batch norm, whose gradients are always fp32."""
    large: int
    """All other parameters."""
    buffers: int
    """Bytes of one encoder's batch-norm buffers."""


class Flow(NamedTuple):
    """One collective of a step, as one GPU sees it: bytes that it receives."""

    way: Way
    gpus: int
    name: str
    nvlink: float
    network: float

    @property
    def total(self) -> float:
        """Bytes over both links."""
        return self.nvlink + self.network


def sizes(recipe: Recipe) -> Sizes:
    """Count the parameters and buffers of the recipe's encoder; nothing is allocated."""
    with torch.device("meta"):
        encoder = build_encoder(recipe)
    small = sum(value.numel() for name, value in encoder.named_parameters() if value.dim() == 1 and "fc" not in name)
    large = sum(value.numel() for value in encoder.parameters()) - small
    return Sizes(small, large, sum(value.numel() * value.element_size() for value in encoder.buffers()))


def traffic(
    recipe: Recipe,
    way: Way,
    gpus: int,
    per_machine: int = PER_MACHINE,
    *,
    gradient_bytes: int = 2,
    counted: Sizes | None = None,
) -> list[Flow]:
    """Bytes that each GPU receives in one step, collective by collective, with `recipe.batch_size` over all of them.

    `gradient_bytes`: of our working precision; the published code reduces fp32. `counted` saves counting again.
    """
    counted = counted or sizes(recipe)
    flows = _published(recipe, gpus, counted) if way == "published" else _ours(recipe, gpus, counted, gradient_bytes)
    return [Flow(way, gpus, name, *_links(bytes_, kind, gpus, per_machine)) for name, kind, bytes_ in flows]


def table(recipe: Recipe, gpus: tuple[int, ...] = GPUS, per_rank: int | None = None) -> str:
    """Markdown of `traffic` for each number of GPUs; `per_rank` pairs on each, left out the recipe's batch over 8."""
    per_rank = per_rank or recipe.batch_size // 8
    counted = sizes(recipe)
    lines = [
        f"MB received by each GPU in one step ({recipe.arch}, {recipe.crop_size} px, {per_rank} pairs a GPU, "
        f"queue {recipe.queue_size}, {PER_MACHINE} GPUs a machine)",
        "",
        "| GPUs | way | collective | NVLink | network | total |",
        "|---:|---|---|---:|---:|---:|",
    ]
    for count in gpus:
        for way in WAYS:
            flows = traffic(replace(recipe, batch_size=per_rank * count), way, count, counted=counted)
            whole = (sum(getattr(flow, link) for flow in flows) for link in ("nvlink", "network"))
            flows.append(Flow(way, count, "all", *whole))
            lines += [_line(flow) for flow in flows]
    return "\n".join(lines)


def _published(recipe: Recipe, gpus: int, counted: Sizes) -> list[tuple[str, str, float]]:
    batch, others = recipe.batch_size, (gpus - 1) / gpus
    image, key = 3 * recipe.crop_size**2 * 4, recipe.dim * 4
    state = 2 * counted.buffers + recipe.check_queue() * key + LABEL
    passes = recipe.views
    return [
        ("all-gather of float images", "ring", passes * others * batch * image),
        ("broadcast of the permutation", "ring", passes * batch * LABEL),
        ("all-gather of keys, to unshuffle", "ring", passes * others * batch * key),
        ("all-gather of keys, for the queue", "ring", passes * others * batch * key),
        ("broadcast of buffers, queue among them", "ring", state),
        ("all-reduce of gradients", "ring", 2 * others * 4 * (counted.small + counted.large)),
    ]


def _ours(recipe: Recipe, gpus: int, counted: Sizes, gradient_bytes: int) -> list[tuple[str, str, float]]:
    rows, others = recipe.views * recipe.batch_size, (gpus - 1) / gpus
    gradients = 4 * counted.small + gradient_bytes * counted.large
    return [
        ("exchange of uint8 crops", "direct", others * rows / gpus * 3 * recipe.crop_size**2),
        ("all-gather of keys, for both", "ring", others * rows * recipe.dim * 4),
        ("all-reduce of gradients", "ring", 2 * others * gradients),
    ]


def _links(total: float, kind: str, gpus: int, per_machine: int) -> tuple[float, float]:
    if gpus <= per_machine:
        return total, 0.0
    away = 1 / per_machine if kind == "ring" else (gpus - per_machine) / (gpus - 1)
    return total * (1 - away), total * away


def _line(flow: Flow) -> str:
    figures = " | ".join(_megabytes(value) for value in (flow.nvlink, flow.network, flow.total))
    return f"| {flow.gpus} | {flow.way} | {flow.name} | {figures} |"


def _megabytes(value: float) -> str:
    return f"{value / 1e6:,.0f}" if value >= 1e8 else f"{value / 1e6:.3g}"
