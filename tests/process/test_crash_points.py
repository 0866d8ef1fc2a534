"""The crash matrix: a process killed at any of 14 points, and restarted, ends bit-equal to one that was not."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastmoco.options import Options
from fastmoco.process import crash_points
from fastmoco.runs import checkpoint
from fastmoco.runs.lines import read_lines
from fastmoco.train.loop import pretrain

STEPS = 7
QUICK = {"after load", "half a log line", "state written"}


@pytest.fixture(scope="module")
def tiny(recipe):
    """Four steps an epoch of the smallest encoder there is."""
    return replace(recipe, width=0.0625, batch_size=8, bn_group=4, epochs=2)


def train(recipe, images: Path, out: Path, crash: str | None) -> None:
    os.environ.pop(crash_points.VARIABLE, None)
    if crash:
        os.environ[crash_points.VARIABLE] = crash
    # Like a launcher that starts its workers again: the run is resumed where there is one.
    resume = (out / "recipe.json").exists()
    pretrain(
        recipe,
        Options(
            data=images,
            out=out,
            device="cpu",
            threads=1,
            knn=False,
            log_every=2,
            save_every=2,
            save_minutes=0,
            stop_after=STEPS,
            resume=resume,
        ),
    )


def where(point: str) -> str:
    """In the first run every point of saving and stepping is met more than once; die at a later visit."""
    if point in ("before load", "verified", "after load", "pruning"):
        return point
    return f"{point}:{6 if 'step' in point and point != 'state written' else 2}"


@pytest.fixture(scope="module")
def whole(tiny, images, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    train(tiny, images, out, None)
    return out


@pytest.mark.parametrize(
    "point", [point if point in QUICK else pytest.param(point, marks=pytest.mark.slow) for point in crash_points.POINTS]
)
def test_a_run_killed_at_any_point_ends_as_if_it_had_not_been(point, tiny, images, whole, in_fork, tmp_path):
    out = tmp_path / "run"
    if "load" in point or point == "verified":
        assert in_fork(train, tiny, images, out, "after step:5") == -signal.SIGKILL
    assert in_fork(train, tiny, images, out, where(point)) == -signal.SIGKILL, (tmp_path / "said").read_text()
    assert not (out / "summary.json").exists()
    assert in_fork(train, tiny, images, out, None) == 0, (tmp_path / "said").read_text()
    one, other = (checkpoint.load(checkpoint.latest(run)) for run in (out, whole))
    assert one.step == other.step == STEPS
    assert [name for name in one.state if not torch.equal(one.state[name], other.state[name])] == []
    assert [line["step"] for line in read_lines(out / "log.jsonl")] == [2, 4, 6, 7]
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == [
        "latest",
        "step_00000006",
        "step_00000007",
    ]


def test_a_point_without_the_variable_does_nothing(monkeypatch):
    monkeypatch.delenv(crash_points.VARIABLE, raising=False)
    assert len(crash_points.POINTS) == len(set(crash_points.POINTS)) == 14
    assert not any(crash_points.about_to_crash(point) for point in crash_points.POINTS)


def test_a_point_counts_its_visits(monkeypatch):
    monkeypatch.setattr(crash_points, "_counts", crash_points.Counter())
    monkeypatch.setenv(crash_points.VARIABLE, "renamed:3")
    assert [crash_points.about_to_crash("renamed") for _ in range(4)] == [False, False, True, False]
    assert not crash_points.about_to_crash("pruning")
