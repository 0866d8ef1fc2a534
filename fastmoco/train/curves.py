"""RUN/curves.png: loss with its chance level, contrast accuracy and kNN, from the run's logs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fastmoco import plots
from fastmoco.plots import BLUE, GREEN, GREY, ORANGE, Level, Series
from fastmoco.recipe import Recipe
from fastmoco.runs.lines import KNN, LOG, read_lines
from fastmoco.train.expectation import chance_formula, chance_level, fill_steps

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAME = "curves.png"


def draw_curves(run: Path, recipe: Recipe) -> Path:
    """Write the picture of the logs in `run`, and return its path; without a kNN evaluation it has two panels."""
    log, knn = read_lines(run / LOG), read_lines(run / KNN)
    panels = 3 if knn else 2
    figure = plots.figure(4 * panels, 3.6)
    loss, accuracy, *neighbours = figure.subplots(1, panels)
    _draw_loss(loss, log, recipe)
    steps = [line["step"] for line in log]
    series = [
        Series(label, steps, [line[name] for line in log], colour)
        for name, colour, label in (("top5", ORANGE, "top-5"), ("top1", BLUE, "top-1"))
    ]
    plots.line_chart(accuracy, f"Contrast accuracy, 1 of {recipe.candidates} (%)", series, high=100)
    for axes in neighbours:
        _draw_knn(axes, knn)
    plots.save(figure, run / NAME)
    return run / NAME


def _draw_loss(axes: Axes, log: list[dict], recipe: Recipe) -> None:
    loss = Series("loss", [line["step"] for line in log], [line["loss"] for line in log])
    chance = chance_level(recipe)
    plots.line_chart(
        axes, "InfoNCE loss", [loss], level=Level(chance, f"chance, {chance_formula(recipe)} = {chance:.2f}")
    )
    full = fill_steps(recipe, round(log[-1]["step"] / log[-1]["epoch"])) if log else 0
    if log and 0 < full <= log[-1]["step"]:
        axes.axvline(full, color=GREY, linewidth=0.8, alpha=0.6)
        plots.note(axes, f"{recipe.dictionary} full", (full, 0.03), ("data", "axes fraction"), xytext=(3, 0))


def _draw_knn(axes: Axes, knn: list[dict]) -> None:
    steps, top1 = [line["step"] for line in knn], [line["top1"] for line in knn]
    chance = Level(100 / knn[-1]["classes"], f"chance {100 / knn[-1]['classes']:.3g}")
    title = "kNN top-1 on validation images (%)"
    plots.line_chart(axes, title, [Series("kNN", steps, top1, GREEN)], level=chance, high=100)
    for at in {0, len(knn) - 1}:
        plots.note(axes, f"{top1[at]:.1f}", (steps[at], top1[at]), "data", GREEN, ha="center", xytext=(0, 7))
    axes.margins(x=0.08)
