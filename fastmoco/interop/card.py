"""The model card that travels with exported weights: recipe, data, accuracy, versions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastmoco import environment
from fastmoco.runs.facts import read_json
from fastmoco.runs.lines import KNN, read_lines
from fastmoco.runs.run_folder import SavedRun
from fastmoco.terminal import counted

FIGURES = {
    "knn.json": "kNN",
    "linear.json": "linear probe",
    "linear-fast.json": "linear probe, fast",
    "finetune.json": "fine-tuned",
    "finetune-0.1.json": "fine-tuned, 10 % of the labels",
    "finetune-0.01.json": "fine-tuned, 1 % of the labels",
    "finetune-subset.json": "fine-tuned, a list of images",
}


def accuracies(run: Path) -> dict[str, dict[str, Any]]:
    """What the run's evaluations found, by name: top1, top5 and their circumstances. Empty where none was made."""
    results = {name: read_json(run / file) for file, name in FIGURES.items()}
    lines = read_lines(run / KNN)
    if lines and lines[-1]["step"] > results["kNN"].get("step", -1):
        results["kNN"] = lines[-1]
    return {name: figures for name, figures in results.items() if "top1" in figures}


def model_card(run: Path, saved_run: SavedRun) -> str:
    """Markdown, with the front matter that model hubs read. Only what the run's own files say."""
    recipe, facts = saved_run.recipe, saved_run.facts
    per_epoch = facts.get("steps", 0) / recipe.epochs
    epochs = f" ({saved_run.step / per_epoch:.4g} of {counted(recipe.epochs, 'epoch')})" if per_epoch else ""
    lines = [
        "---",
        "library_name: fastmoco",
        "tags: [image-feature-extraction, self-supervised, moco]",
        "---",
        "",
        f"# {recipe.arch}, pretrained with MoCo by fastmoco",
        "",
        f"Query encoder after step {saved_run.step}{epochs}, fp32. No labels were used in pretraining.",
        "",
        *_table("Data", _data(facts)),
        *_table("Accuracy", _accuracy(run)),
        *_table("Recipe", ((name, value) for name, value in recipe.as_dict().items() if name != "augmentation")),
        *_table("Augmentation", recipe.as_dict()["augmentation"].items()),
        *_table("Made with", _origin(saved_run)),
    ]
    return "\n".join(lines) + "\n"


def _data(facts: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    yield "images", facts.get("images", "unknown")
    yield "folder", Path(str(facts.get("options", {}).get("data") or "unknown")).name
    if "imported" in facts:
        yield "imported from", facts["imported"].get("file")


def _accuracy(run: Path) -> Iterator[tuple[str, Any]]:
    results = accuracies(run)
    for name, figures in results.items():
        where = f"after step {figures['step']}, {figures.get('classes', '?')} classes"
        yield name, f"top-1 {figures['top1']:.2f}%, top-5 {figures['top5']:.2f}% ({where})"
    if not results:
        yield "not measured", "`fastmoco evaluate knn RUN` or `fastmoco evaluate linear RUN`"


def _origin(saved_run: SavedRun) -> Iterator[tuple[str, Any]]:
    for name in ("device", "ranks", "commit", "command"):
        yield name, saved_run.facts.get(name, "unknown")
    yield "precision", saved_run.precision
    yield from saved_run.facts.get("versions", {}).items()
    yield "exported by", f"fastmoco {environment.versions()['fastmoco']}, commit {environment.commit()}"


def _table(title: str, rows: Any) -> list[str]:
    return [f"## {title}", "", "| | |", "|---|---|", *(f"| {name} | {_cell(value)} |" for name, value in rows), ""]


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|")
