"""A run that goes on with another number of ranks sees the samples it would have seen, and parts by rounding alone."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fastmoco.options import Options
from fastmoco.parallel import Parallel
from fastmoco.process.stop import StopRequest
from fastmoco.recipe import Recipe
from fastmoco.runs import checkpoint
from fastmoco.runs.lines import read_lines
from fastmoco.train import loop
from fastmoco.train.loop import Run

LEGS = (2, 4, 6)  # the steps after which a run is cut


def go_on(parallel: Parallel, recipe: Recipe, data: Path, out: Path, stop: int) -> list[list[int]]:
    """Train `out` up to step `stop`; the samples of this rank, step by step."""
    loop.draw_curves = lambda *_: None
    options = Options(
        data=data, out=out, resume=out.exists(), knn=False, stop_after=stop, log_every=1, threads=1, save_minutes=0
    )
    parallel.barrier()  # before any rank makes `out`
    run, records = Run(recipe, options, "custom", parallel), []
    advance = run.advance

    def remember(batch: object, rate: float) -> object:
        records.append(batch.sample.tolist())
        return advance(batch, rate)

    run.advance = remember
    run.train(StopRequest())
    return records


def legs(run_ranks: Callable, worlds: tuple[int, ...], recipe: Recipe, data: Path, out: Path) -> list[list[int]]:
    samples: list[list[int]] = []
    for world, stop in zip(worlds, LEGS, strict=True):
        ranks = run_ranks(world, go_on, recipe, data, out, stop)
        samples += [[sample for part in step for sample in part] for step in zip(*ranks, strict=True)]
    return samples


def end(out: Path) -> dict[str, Tensor]:
    return checkpoint.load(checkpoint.latest(out)).state


def test_two_ranks_one_and_two_again_are_one_run(
    run_ranks: Callable, recipe: Recipe, images: Path, tmp_path: Path
) -> None:
    """In float64, where what is left is noise of 1e-16, amplified; another seed moves the queue by 0.1 and more."""
    recipe = replace(recipe, width=0.0625, precision="fp64")
    samples = legs(run_ranks, (2, 1, 2), recipe, images, tmp_path / "run")
    expected = legs(run_ranks, (1, 1, 1), recipe, images, tmp_path / "whole")
    assert samples == expected and len(samples) == LEGS[-1]
    one, whole = end(tmp_path / "run"), end(tmp_path / "whole")
    for name, value in whole.items():
        torch.testing.assert_close(one[name], value, rtol=1e-10, atol=1e-10, msg=name)
    lines = read_lines(tmp_path / "run/log.jsonl")
    assert [line["step"] for line in lines] == list(range(1, LEGS[-1] + 1))
    legs(run_ranks, (1, 1, 1), replace(recipe, seed=1), images, tmp_path / "other")
    assert (end(tmp_path / "other")["queue"] - whole["queue"]).abs().max() > 0.1


def test_the_same_two_ranks_go_on_bit_for_bit(
    run_ranks: Callable, recipe: Recipe, images: Path, tmp_path: Path
) -> None:
    """The undisturbed run writes checkpoints at the same steps: there statistics become the mean over ranks."""
    recipe = replace(recipe, width=0.0625)
    legs(run_ranks, (2, 2, 2), recipe, images, tmp_path / "cut")
    run_ranks(2, uncut, recipe, images, tmp_path / "uncut")
    one, whole = end(tmp_path / "cut"), end(tmp_path / "uncut")
    assert [name for name in one if not torch.equal(one[name], whole[name])] == []


def uncut(parallel: Parallel, recipe: Recipe, data: Path, out: Path) -> None:
    options = Options(
        data=data, out=out, knn=False, stop_after=LEGS[-1], log_every=1, threads=1, save_minutes=0, save_every=LEGS[0]
    )
    loop.draw_curves = lambda *_: None
    parallel.barrier()
    Run(recipe, options, "custom", parallel).train(StopRequest())
