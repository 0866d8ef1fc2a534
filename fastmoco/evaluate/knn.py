"""Weighted kNN: each of the k nearest images of the bank votes for its class with weight exp(similarity / T).

The protocol of Wu et al., 2018 (InstDisc, arXiv:1805.01978), which the authors of MoCo use as their monitor. Exact,
not approximate: similarities are computed for a chunk of queries at a time against the whole bank.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmoco import atomic
from fastmoco.data.loader import Loading
from fastmoco.data.manifest import Manifest
from fastmoco.data.rewrite import Reading
from fastmoco.encoder import Encoder
from fastmoco.evaluate.features import extract
from fastmoco.evaluate.labels import both_sides
from fastmoco.evaluate.neighbours import nearest
from fastmoco.evaluate.pictures import draw_confusion, draw_neighbours
from fastmoco.evaluate.scores import score
from fastmoco.options import EvaluateKnn
from fastmoco.parallel import Parallel
from fastmoco.recipe import Recipe
from fastmoco.runs.run_folder import figures_name, keep_earlier, load_encoder

CHUNK_ELEMENTS = 1 << 25  # similarities held at a time: 128 MiB in fp32
PICTURES = 8  # images, and neighbours of each, in the contact sheet

Side = tuple[Manifest, Tensor, Tensor]  # images, their features and labels


def knn_accuracy(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    k: int = 200,
    temperature: float = 0.1,
    classes: int | None = None,
) -> tuple[float, float]:
    """Top-1 and top-5 accuracy, in percent, of voting by the `k` nearest rows of `bank` (all of it, if it is smaller).

    `bank` [n, F] and `queries` [m, F] hold unit vectors, the labels are int64 [n] and [m] from 0 to `classes` - 1.
    """
    if len(bank) == 0 or len(queries) == 0:
        raise ValueError(f"kNN needs images on both sides, not {len(bank)} that vote and {len(queries)} to classify")
    classes = classes or int(torch.cat([bank_labels, query_labels]).max()) + 1
    rows = max(1, CHUNK_ELEMENTS // len(bank))
    hits = torch.zeros(2, dtype=torch.int64, device=queries.device)
    for chunk, labels in zip(queries.split(rows), query_labels.split(rows), strict=True):
        votes, best = knn_votes(bank, bank_labels, chunk, k, temperature, classes).topk(min(5, classes), dim=1)
        right = (best == labels[:, None]) & (votes > 0)  # a class that no neighbour is of is no prediction
        hits += torch.stack([right[:, 0].sum(), right.sum()])
    top1, top5 = (100 * hits.double() / len(queries)).tolist()
    return top1, top5


def knn_votes(bank: Tensor, bank_labels: Tensor, queries: Tensor, k: int, temperature: float, classes: int) -> Tensor:
    """Votes [m, classes] of the `k` nearest rows of `bank` for each query, float64, the largest weight being 1."""
    similarity, rows = nearest(bank, queries, k)
    # The common factor exp(-best / T) changes no ranking and keeps a small T from overflowing.
    weight = ((similarity - similarity[:, :1]).double() / temperature).exp()
    votes = weight.new_zeros(len(queries), classes)
    return votes.scatter_add_(1, bank_labels[rows], weight)


def kept_as(device: torch.device) -> torch.dtype:
    """What features are kept in: on a GPU 16 bits, because ImageNet's fill 10.5 GB in fp32."""
    return torch.float16 if device.type == "cuda" else torch.float32


def evaluate(
    encoder: Encoder,
    train: Manifest,
    val: Manifest,
    recipe: Recipe,
    parallel: Parallel,
    *,
    loading: Loading = Loading(),
    val_loading: Loading | None = None,
    **options: Any,
) -> dict[str, Any]:
    """kNN of `encoder` with the labelled images of `train` voting on those of `val`; all ranks call this.

    `loading` is how images are loaded, those of `val` too unless `val_loading` is given; what it has kept are images of
    `train` alone. `options` are the others of `features.encode`; the recipe says which features are compared.
    Returns top1 and top5 in percent, k, temperature, the number of classes and of images on either side.
    """
    options = {"features": recipe.knn_features, "dtype": kept_as(parallel.device), **options}
    bank, bank_labels = extract(encoder, train, recipe, parallel, loading=loading, **options)
    val_loading = val_loading or dataclasses.replace(loading, kept=None)
    queries, labels = extract(encoder, val, recipe, parallel, loading=val_loading, **options)
    classes = len(train.classes)
    top1, top5 = knn_accuracy(bank, bank_labels, queries, labels, recipe.knn_k, recipe.knn_temperature, classes)
    facts = {"k": min(recipe.knn_k, len(bank)), "temperature": recipe.knn_temperature, "classes": classes}
    return {"top1": top1, "top5": top5, **facts, "bank": len(bank), "queries": len(queries)}


def run(options: EvaluateKnn) -> None:
    """`evaluate knn RUN`: print the accuracies; write RUN/knn.json, RUN/knn.png and RUN/neighbours.png.

    Of untrained weights: knn-untrained and neighbours-untrained.
    """
    parallel = Parallel.start(options.device)
    try:
        encoder, recipe, step = load_encoder(options.run, parallel, options.untrained)
        recipe, loading = _with_options(recipe, options), Loading(threads=options.threads or None)
        train, val = both_sides(options.run, options.data, options.val, options.labels, recipe.max_pixels)
        if parallel.is_main:
            print(f"{len(train)} images vote on {len(val)}, encoder of {options.run} after step {step}")
        options_of_features = {"features": recipe.knn_features, "dtype": kept_as(parallel.device), "loading": loading}
        bank, queries = (extract(encoder, images, recipe, parallel, **options_of_features) for images in (train, val))
        if parallel.is_main:
            _write(options.run, step, recipe, (train, *bank), (val, *queries), options.untrained)
    finally:
        parallel.close()


def _write(run: Path, step: int, recipe: Recipe, train: Side, val: Side, untrained: bool) -> None:
    knn, neighbours = (figures_name(name, untrained) for name in ("knn", "neighbours"))
    (images, bank, bank_labels), (val_images, queries, labels) = train, val
    votes = [
        knn_votes(bank, bank_labels, chunk, recipe.knn_k, recipe.knn_temperature, len(images.classes))
        for chunk in queries.split(max(1, CHUNK_ELEMENTS // len(bank)))
    ]
    scores = score(torch.cat(votes).log(), labels)  # a class without votes is at minus infinity
    facts = {
        "step": step,
        "features": recipe.knn_features,
        "k": min(recipe.knn_k, len(bank)),
        "temperature": recipe.knn_temperature,
        "classes": len(images.classes),
        "bank": len(bank),
        "queries": len(queries),
        "data": images.root,
        "val": val_images.root,
    }
    figures = {**facts, **scores.as_dict(images.classes)}
    keep_earlier(run, figures, knn, neighbours)
    atomic.write_json(run / f"{knn}.json", figures)
    draw_confusion(run / f"{knn}.png", scores.confusion, images.classes)
    rows = np.linspace(0, len(val_images) - 1, min(PICTURES, len(val_images))).astype(np.int64)
    near = nearest(bank, queries[torch.from_numpy(rows).to(queries.device)], PICTURES).rows.cpu().numpy()
    draw_neighbours(run / f"{neighbours}.png", val_images, images, rows, near, Reading.of(recipe))
    print(
        f"kNN top-1 {scores.top1:.2f}%, top-5 {scores.top5:.2f}% (k {facts['k']}, T {facts['temperature']}, "
        f"{facts['features']} features; see {knn}.json, {knn}.png and {neighbours}.png in {run})"
    )


def _with_options(recipe: Recipe, options: EvaluateKnn) -> Recipe:
    changes: dict[str, Any] = {
        "knn_k": options.k,
        "knn_temperature": options.temperature,
        "knn_features": options.features,
    }
    return dataclasses.replace(recipe, **{name: value for name, value in changes.items() if value is not None})
