"""`report RUN`: one HTML page that holds everything worth knowing about a run, and asks nothing of the network."""

from __future__ import annotations

import io
import json
import statistics
from datetime import datetime, timezone
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastmoco import atomic
from fastmoco.interop.card import accuracies
from fastmoco.options import Report
from fastmoco.page import chart, page, picture, section, table, tiles
from fastmoco.plots import GREEN, ORANGE, Level, Series
from fastmoco.presets import PRESETS
from fastmoco.recipe import Recipe
from fastmoco.runs import checkpoint
from fastmoco.runs import run_folder as runs
from fastmoco.runs.facts import read_facts, read_json
from fastmoco.runs.lines import KNN, LOG, read_lines
from fastmoco.terminal import counted
from fastmoco.train.expectation import chance_formula, chance_level

if TYPE_CHECKING:
    from fastmoco.data.batch import Batch
    from fastmoco.data.manifest import Manifest

PAIRS, TILE = 8, 150
MAPPED = 2000  # images of a map
PICTURES = {
    "linear.png": "Linear probe",
    "linear-fast.png": "Linear probe, fast",
    "finetune.png": "Fine-tuned",
    "finetune-0.1.png": "Fine-tuned on 10 % of the labels",
    "finetune-0.01.png": "Fine-tuned on 1 % of the labels",
    "knn.png": "kNN",
    "map.png": "Images whose features are alike stand together",
    "duplicates.png": "Images that are nearly the same, a group a row",
    "search.png": "Images that were looked for, and their nearest neighbours with their similarity",
    "neighbours.png": "Validation images (grey) and the training images nearest to them: green is of the same class",
}
VIEWS = {
    "queue": "Two views of the same image: the query encoder sees the left one, the key encoder the right one.",
    "batch": "Two views of the same image: one encoder sees both. The negatives are the other images of the batch.",
    "bank": "One view of each image: its key is the entry that the bank keeps of it.",
}
SAME = ("commit", "command", "device", "ranks", "precision", "images", "steps")


def run(options: Report) -> None:
    """Write the page and say where; raises UsageError if RUN is no run."""
    out = options.out or options.run / "report.html"
    if options.map:
        _draw_map(options.run)
    text = render(options.run, views=options.views)
    atomic.write_text(out, text)
    print(f"{out}: {len(text) / 1e6:.1f} MB, opens in any browser and needs no network")


def _draw_map(folder: Path) -> None:
    import numpy as np

    from fastmoco.data.rewrite import Reading
    from fastmoco.evaluate.feature_map import draw_map
    from fastmoco.evaluate.index import Source, index, scan_of

    parallel = runs.one_rank("auto")
    encoder, recipe, _ = runs.load_encoder(folder, parallel)
    images = scan_of(folder, None, recipe.max_pixels)
    some = np.unique(np.linspace(0, len(images) - 1, min(MAPPED, len(images))).astype(np.int64))
    features = index(Source(encoder, recipe, parallel, "backbone"), images.take(some))
    method = draw_map(folder / "map.png", *features, Reading.of(recipe))
    print(f"{folder / 'map.png'}: {counted(len(features.images), 'image')} by {method}")


def render(folder: Path, views: bool = True) -> str:
    """The page of a run that may still be training; raises UsageError if `folder` is no run."""
    facts = read_facts(folder)
    recipe = Recipe.from_dict(facts["recipe"])
    log, knn = read_lines(folder / LOG), read_lines(folder / KNN)
    parts = [
        _head(folder, facts, recipe, log),
        _tiles(folder, recipe, log, knn),
        section("Learning", f'<div class="wide">{_learning(recipe, log, knn)}</div>'),
        section("Speed", f'<div class="grid">{_speed(log)}</div>'),
        _evaluation(folder),
        _detection(folder),
        _views(facts, recipe) if views else "",
        _checkpoints(folder),
        _recipe(facts, recipe),
        _origin(facts),
    ]
    return page(f"{folder.name} · fastmoco", filter(None, parts))


def _head(folder: Path, facts: dict[str, Any], recipe: Recipe, log: list[dict]) -> str:
    step, total = (log[-1]["step"] if log else 0), facts.get("steps")
    finished = (folder / "summary.json").is_file()
    state = "finished" if finished else f"{step} of {counted(total, 'step')}" if total else counted(step, "step")
    what = f"{facts.get('preset', 'custom')} · {recipe.arch} · {counted(recipe.epochs, 'epoch')} · {state}"
    ranks = counted(facts.get("ranks", 1), "rank")
    where = f"{facts.get('device', 'unknown device')}, {ranks}, {facts.get('precision', '')}"
    return f'<header><h1>{escape(folder.name)}</h1><p class="soft">{escape(what)}<br>{escape(where)}</p></header>'


def _tiles(folder: Path, recipe: Recipe, log: list[dict], knn: list[dict]) -> str:
    rows = []
    if log:
        end = log[-1]
        rows.append(("InfoNCE loss", f"{end['loss']:.3f}", f"chance {chance_level(recipe):.3f}"))
        rows.append(("contrast top-1", f"{end['top1']:.1f}%", f"1 of {recipe.candidates}"))
        rate = statistics.median(line["pairs_per_s"] for line in log)
        wait = statistics.median(line["data_wait"] for line in log)
        rows.append(("throughput", f"{rate:,.0f}", "pairs/s, median"))
        rows.append(("data wait", f"{wait:.0%}", "of the time, median"))
    for name, figures in accuracies(folder).items():
        remark = f"top-1, {figures.get('classes', '?')} classes"
        if name == "kNN" and knn and knn[0]["step"] == 0 < figures["step"]:
            remark = f"before training {knn[0]['top1']:.1f}%"
        rows.append((name, f"{figures['top1']:.1f}%", remark))
    if log:
        rows.append(("time", _duration(log[-1]["seconds"]), f"{log[-1]['epoch']:.3g} epochs"))
    return tiles(rows)


def _learning(recipe: Recipe, log: list[dict], knn: list[dict]) -> str:
    steps = [line["step"] for line in log]
    chance = chance_level(recipe)
    charts = [
        chart(
            "InfoNCE loss",
            [Series("loss", steps, _column(log, "loss"))],
            level=Level(chance, f"chance, {chance_formula(recipe)}"),
        ),
        chart(
            "Contrast accuracy (%)",
            [Series("top-5", steps, _column(log, "top5"), ORANGE), Series("top-1", steps, _column(log, "top1"))],
            high=100,
        ),
    ]
    if knn:
        level = Level(100 / knn[-1]["classes"], "chance") if knn[-1].get("classes") else None
        line = Series("kNN", [one["step"] for one in knn], _column(knn, "top1"), GREEN)
        charts.append(
            chart("kNN top-1 on validation images (%)", [line], level=level, high=100, end=max(steps, default=0))
        )
    charts.append(chart("Learning rate", [Series("lr", steps, _column(log, "lr"))]))
    return "".join(charts)


def _speed(log: list[dict]) -> str:
    steps = [line["step"] for line in log]
    wait = [100 * value for value in _column(log, "data_wait")]
    return (
        chart("Image pairs a second", [Series("pairs/s", steps, _column(log, "pairs_per_s"))])
        + chart("Time spent waiting for data (%)", [Series("wait", steps, wait, ORANGE)], high=100)
        + chart("Peak memory (GiB)", [Series("memory", steps, _column(log, "memory"), GREEN)])
    )


def _evaluation(folder: Path) -> str:
    rows = []
    for name, figures in accuracies(folder).items():
        how = f"k {figures['k']}, T {figures['temperature']}" if "k" in figures else _protocol(figures)
        accuracy = (f"{figures['top1']:.2f}%", f"{figures['top5']:.2f}%")
        rows.append((name, *accuracy, figures["step"], figures.get("queries", ""), how))
    head = ("", "top-1", "top-5", "step", "images", "how")
    cards = [
        f'<div class="card">{picture((folder / name).read_bytes(), "png", caption, caption)}</div>'
        for name, caption in PICTURES.items()
        if (folder / name).is_file()
    ]
    if not rows and not cards:
        return ""
    return section(
        "Evaluation",
        table(rows, head) if rows else "",
        f'<div class="wide" style="margin-top:12px">{"".join(cards)}</div>',
    )


def _detection(folder: Path) -> str:
    """What detectors that began with this run reached, beside those that began with its first weights."""
    rows, cards = [], []
    for name, label in (("detection", "pretrained"), ("detection-untrained", "first weights")):
        figures = read_json(folder / name / "detection.json")
        if "AP50" in figures:
            steps = counted(figures["iterations"], "step")
            how = f"{steps} of {figures['batch_size']}, lr {figures['lr']:g}, {figures['size']} px"
            rows.append((label, *(f"{figures[key]:.2f}" for key in ("AP", "AP50", "AP75")), figures["metric"], how))
        image = folder / name / "detections.png"
        if image.is_file():
            caption = f"Detections, {label}: objects in white, detections from a score of 0.5 in colours"
            cards.append(f'<div class="card">{picture(image.read_bytes(), "png", caption, caption)}</div>')
    if not rows:
        return ""
    pictures = f'<div class="wide" style="margin-top:12px">{"".join(cards)}</div>'
    return section("Detection", table(rows, ("", "AP", "AP50", "AP75", "metric", "how")), pictures)


def _protocol(figures: dict[str, Any]) -> str:
    protocol = figures.get("protocol", {})
    parts = [
        f"{counted(protocol['epochs'], 'epoch')}, batch {protocol['batch_size']}, lr {protocol['lr']:g} for 256"
        if protocol
        else ""
    ]
    if rate := figures.get("rate"):
        parts.append(f"the rate chosen on {rate['held_out']} training images held out")
    return ", ".join(filter(None, [*parts, f"backbone {figures['backbone']}" if "backbone" in figures else ""]))


def _views(facts: dict[str, Any], recipe: Recipe) -> str:
    try:
        rows_of_views = first_views(facts, recipe)
    except (ValueError, OSError) as error:
        return section("First batch", f'<p class="soft">The images cannot be shown: {_plain(error)}</p>')
    alt = "view" if recipe.dictionary == "bank" else "two views"
    rows = "".join(picture(data, "jpeg", f"{alt} of {name}", name) for name, data in rows_of_views)
    return section("First batch", f'<p class="soft">{VIEWS[recipe.dictionary]}</p><div class="card views">{rows}</div>')


def first_views(facts: dict[str, Any], recipe: Recipe, count: int = PAIRS) -> list[tuple[str, bytes]]:
    """Name and JPEG of the augmented views of the first images of step 0, side by side, as they were trained on.

    There are two views, or one where keys come from a bank. Raises ValueError or OSError if the images are not there
    any more.
    """
    import torch
    from PIL import Image

    from fastmoco.kernels.photometric import photometric

    images, batch = _first_batch(facts, recipe)
    sides = [(batch.query_crops[:count], batch.query_parameters[:count])]
    if len(batch.key_crops):
        # The second view stands last: alone or, where a queue is symmetric, after the first one.
        second = slice(len(batch.key_crops) - len(batch.sample), None)
        sides.append((batch.key_crops[second][:count], batch.key_parameters[second][:count]))
    colours = recipe.augmentation
    mean, std = (torch.tensor(value)[:, None, None] for value in (colours.mean, colours.std))
    views = torch.cat([photometric(*side, colours.mean, colours.std) for side in sides], dim=3)
    pixels_of_all = (views * std + mean).clamp(0, 1).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1)
    rows = []
    for sample, pixels in zip(batch.sample[:count], pixels_of_all, strict=True):
        data, row = io.BytesIO(), Image.fromarray(pixels.contiguous().numpy())
        row.resize((len(sides) * TILE, TILE), Image.Resampling.BICUBIC).save(data, "JPEG", quality=88)
        rows.append((images.paths[int(sample)], data.getvalue()))
    return rows


def _first_batch(facts: dict[str, Any], recipe: Recipe) -> tuple[Manifest, Batch]:
    from fastmoco.data import manifest
    from fastmoco.data.loader import Loader
    from fastmoco.data.plan import Plan
    from fastmoco.parallel import Parallel

    source = facts.get("options", {}).get("data")
    if not source:
        raise ValueError("the run does not say where its images are")
    images = manifest.scan(manifest.split(source)[0], max_pixels=recipe.max_pixels)
    plan = Plan(recipe, images.sizes, shards=images.shards)
    with Loader(images, plan, Parallel(), range(1)) as loader:
        return images, next(iter(loader))


def _checkpoints(folder: Path) -> str:
    rows = []
    for path in reversed(checkpoint.steps(folder)):
        when = datetime.fromtimestamp(path.stat().st_mtime, timezone.utc)
        size = sum(file.stat().st_size for file in path.iterdir())
        state = checkpoint.damage(path) or "every byte as written"
        rows.append((path.name, f"{size / 2**20:.1f} MiB", f"{when:%Y-%m-%d %H:%M} UTC", state))
    return section("Checkpoints", table(rows, ("", "size", "written", "state"))) if rows else ""


def _recipe(facts: dict[str, Any], recipe: Recipe) -> str:
    values = _flat(recipe)
    preset = PRESETS.get(facts.get("preset", ""))
    changes = [name for name, value in values.items() if preset and _flat(preset[1])[name] != value]
    note = f"changed from preset {facts['preset']}: {', '.join(changes) or 'nothing'}" if preset else ""
    rows = list(values.items())
    half = -(-len(rows) // 2)
    halves = table(rows[:half], highlights=changes) + table(rows[half:], highlights=changes)
    return section("Recipe", f'<p class="soft">{_plain(note)}</p>', f'<div class="wide">{halves}</div>')


def _origin(facts: dict[str, Any]) -> str:
    rows = [(name, facts[name]) for name in SAME if name in facts]
    rows += [(name, value) for name, value in facts.get("options", {}).items() if name in ("data", "val") and value]
    rows += list(facts.get("versions", {}).items())
    rows += [(f"resumed at step {one['step']}", one["command"]) for one in facts.get("resumed", [])]
    rows += [("imported from", json.dumps(facts["imported"]))] if "imported" in facts else []
    return section("Made with", table(rows))


def _flat(recipe: Recipe) -> dict[str, Any]:
    values = recipe.as_dict()
    return {**{name: value for name, value in values.items() if name != "augmentation"}, **values["augmentation"]}


def _column(lines: list[dict], name: str) -> list[float]:
    return [line.get(name, float("nan")) for line in lines]


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 1.5 else f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def _plain(text: object) -> str:
    return escape(" ".join(str(text).split()))
