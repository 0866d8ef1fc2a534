"""How many bytes a step puts on the wires between GPUs, ours and the published way, and on which wire: a model.

`fastmoco bench scaling --model` prints it for 8, 64 and 512 GPUs, of any preset. A test holds its totals against bytes
counted in runs of two and four ranks; the share of each link rests on the two assumptions below and was measured on no
cluster.

Published means, of a queue, MoCo's code; of a batch, gathers with a gradient (an all-reduce, as SimCLR's code has it)
and torch's synchronised batch norm, and for the end-to-end form MoCo's exchange of images. Of a bank there is ours
alone.

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
from fastmoco.encoder.norm import BatchNormAct
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
    channels: int = 0
    """Channels of all batch norms together."""


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
    norms = [module for module in encoder.modules() if isinstance(module, BatchNormAct)]
    small = sum(value.numel() for norm in norms for value in norm.parameters())
    large = sum(value.numel() for value in encoder.parameters()) - small
    buffers = sum(value.numel() * value.element_size() for value in encoder.buffers())
    return Sizes(small, large, buffers, sum(norm.weight.numel() for norm in norms))


def ways(recipe: Recipe) -> tuple[Way, ...]:
    """The ways that the model knows of the recipe's dictionary."""
    return WAYS if recipe.dictionary != "bank" else ("fastmoco",)


def traffic(
    recipe: Recipe,
    way: Way,
    gpus: int,
    per_machine: int = PER_MACHINE,
    *,
    gradient_bytes: int = 2,
    counts: Sizes | None = None,
) -> list[Flow]:
    """Bytes that each GPU receives in one step, collective by collective, with `recipe.batch_size` over all of them.

    `gradient_bytes`: of our working precision; the published code reduces fp32. `counts` saves counting again. Raises
    ValueError for a way that the dictionary does not have.
    """
    if way not in ways(recipe):
        raise ValueError(f"there is no {way} way of a {recipe.dictionary}")
    counts = counts or sizes(recipe)
    if way == "fastmoco":
        flows = _ours(recipe, gpus, counts, gradient_bytes)
    else:
        flows = (_published if recipe.dictionary == "queue" else _published_batch)(recipe, gpus, counts)
    return [Flow(way, gpus, name, *_links(bytes_, kind, gpus, per_machine)) for name, kind, bytes_ in flows]


def table(recipe: Recipe, gpus: tuple[int, ...] = GPUS, per_rank: int | None = None) -> str:
    """Markdown of `traffic` for each number of GPUs; `per_rank` pairs on each, left out the recipe's batch over 8."""
    per_rank = per_rank or recipe.batch_size // 8
    counts = sizes(recipe)
    lines = [
        f"MB received by each GPU in one step ({recipe.arch}, {recipe.crop_size} px, {per_rank} pairs a GPU, "
        f"{_dictionary(recipe)}, {PER_MACHINE} GPUs a machine)",
        "",
        "| GPUs | way | collective | NVLink | network | total |",
        "|---:|---|---|---:|---:|---:|",
    ]
    for count in gpus:
        for way in ways(recipe):
            flows = traffic(replace(recipe, batch_size=per_rank * count), way, count, counts=counts)
            whole = (sum(getattr(flow, link) for flow in flows) for link in ("nvlink", "network"))
            flows.append(Flow(way, count, "all", *whole))
            lines += [_line(flow) for flow in flows]
    return "\n".join(lines)


def _published(recipe: Recipe, gpus: int, counts: Sizes) -> list[tuple[str, str, float]]:
    batch, others = recipe.batch_size, (gpus - 1) / gpus
    image, key = 3 * recipe.crop_size**2 * 4, recipe.dim * 4
    state = 2 * counts.buffers + recipe.check_queue() * key + LABEL
    passes = recipe.views
    return [
        ("all-gather of float images", "ring", passes * others * batch * image),
        ("broadcast of the permutation", "ring", passes * batch * LABEL),
        ("all-gather of keys, to unshuffle", "ring", passes * others * batch * key),
        ("all-gather of keys, for the queue", "ring", passes * others * batch * key),
        ("broadcast of buffers, queue among them", "ring", state),
        ("all-reduce of gradients", "ring", 2 * others * 4 * (counts.small + counts.large)),
    ]


def _published_batch(recipe: Recipe, gpus: int, counts: Sizes) -> list[tuple[str, str, float]]:
    batch, others = recipe.batch_size, (gpus - 1) / gpus
    embeddings = 2 * batch * recipe.dim * 4
    flows = [
        ("all-gather of embeddings", "ring", others * embeddings),
        ("all-reduce of their gradients", "ring", 2 * others * embeddings),
        ("broadcast of buffers", "ring", float(counts.buffers)),
        ("all-reduce of gradients", "ring", 2 * others * 4 * (counts.small + counts.large)),
    ]
    if recipe.shuffle_bn:
        flows.insert(0, ("all-gather of float images", "ring", others * batch * 3 * recipe.crop_size**2 * 4))
    if not recipe.bn_group:  # mean, deviation and count of each rank; the two sums backward
        statistics = (gpus - 1) * 8 * counts.channels + 2 * others * 8 * counts.channels
        flows.insert(0, ("statistics of batch norm", "ring", statistics))
    return flows


def _ours(recipe: Recipe, gpus: int, counts: Sizes, gradient_bytes: int) -> list[tuple[str, str, float]]:
    rows, others = recipe.views * recipe.batch_size, (gpus - 1) / gpus
    gradients = 4 * counts.small + gradient_bytes * counts.large
    vectors = others * rows * recipe.dim * 4
    flows = {
        "queue": [("all-gather of keys, for both", "ring", vectors)],
        "batch": [
            ("all-gather of embeddings", "ring", 2 * others * rows * recipe.dim * gradient_bytes),
            ("all-gather of normalisers", "ring", 2 * others * rows * 2 * 4),
        ],
        "bank": [
            ("all-gather of queries", "ring", vectors),
            ("all-gather of their numbers", "ring", others * rows * LABEL),
        ],
    }[recipe.dictionary]
    if recipe.shuffle_bn and recipe.dictionary != "bank":
        flows.insert(0, ("exchange of uint8 crops", "direct", others * rows / gpus * 3 * recipe.crop_size**2))
    if not recipe.bn_group:  # mean and variance of each rank; the two sums backward
        flows.append(("statistics of batch norm", "ring", (gpus - 1) * 16 * counts.channels))
    return [*flows, ("all-reduce of gradients", "ring", 2 * others * gradients)]


def _dictionary(recipe: Recipe) -> str:
    return "batch" if recipe.dictionary == "batch" else f"{recipe.dictionary} {recipe.queue_size}"


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
