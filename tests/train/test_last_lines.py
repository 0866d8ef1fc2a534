"""What a run says at its start and at its end: how it goes on, in a line that can be typed as it stands."""

import shlex
import signal
import sys
from pathlib import Path

import pytest

from fastmoco.cli import main
from fastmoco.contrast.step import Step
from fastmoco.runs import checkpoint
from fastmoco.runs.facts import go_on

QUICK = ["--device=cpu", "--threads=1", "--no-knn"]


def line_of(said: str) -> list[str]:
    """Words of the command after "go on with" in the last line."""
    return shlex.split(said.splitlines()[-1].partition("go on with ")[2])


def test_the_lines_that_stopped_runs_end_with_go_on_to_the_end(images, flags, tmp_path, monkeypatch, capsys):
    out, step = tmp_path / "a run", Step.step
    command = ["pretrain", "demo", f"--data={images}", f"--out={out}", *QUICK, *flags]
    assert main([*command, "--stop-after=3"]) == 0
    said = capsys.readouterr().err
    assert "; 1 rank of 8 pairs on CPU" in said and "done" not in said
    assert "stopped after step 3 of 30 (--stop-after): go on with fastmoco pretrain demo --resume" in said
    words = line_of(said)
    assert words[0] == "fastmoco"

    def asking(self, batch, lr):
        signal.raise_signal(signal.SIGTERM)
        return step(self, batch, lr)

    with monkeypatch.context() as patch:
        patch.setattr(Step, "step", asking)
        assert main([*words[1:], *QUICK]) == 143
    said = capsys.readouterr().err
    assert "asked to stop: saved after step 4; go on with" in said and line_of(said) == words
    assert main([*words[1:], *QUICK]) == 0
    said = capsys.readouterr().err
    assert "done: 30 steps" in said and "go on" not in said and "nothing was left" not in said
    assert checkpoint.latest(out).name == "step_00000030"

    assert main([*words[1:], *QUICK]) == 0
    said = capsys.readouterr().err
    assert "nothing was left to train: all 30 steps were done before, loss" in said and "done:" not in said


def test_a_preset_left_out_on_resume_is_named(tmp_path, capsys):
    (tmp_path / "recipe.json").write_text('{"preset": "small"}')
    assert main(["pretrain", "--resume", "--out", str(tmp_path)]) == 2
    assert f"was started with: fastmoco pretrain small --resume --out {tmp_path}" in capsys.readouterr().err
    for argv in (["--resume", f"--out={tmp_path / 'none'}"], ["--resume"], [f"--out={tmp_path}"]):
        assert main(["pretrain", *argv]) == 2
        assert "pretrain needs one of v1, v2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("program", "world", "here", "expected"),
    [
        ("bin/fastmoco", "1", "1", "fastmoco"),
        ("fastmoco/__main__.py", "1", "1", "python -m fastmoco"),
        ("pytest/__main__.py", "1", "1", "fastmoco"),
        ("launch.py", "1", "1", "python launch.py"),
        ("launch.py", "4", "4", "python launch.py --nproc 4"),
        ("launch.py", "8", "4", "python launch.py ..."),
    ],
)
def test_a_run_goes_on_as_it_was_started(program, world, here, expected, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [program, "pretrain"])
    monkeypatch.setenv("WORLD_SIZE", world)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
    (tmp_path / "recipe.json").write_text('{"preset": "v2"}')
    assert go_on(tmp_path) == f"{expected} pretrain v2 --resume --out {tmp_path}"
