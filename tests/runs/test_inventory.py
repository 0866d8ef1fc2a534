"""`checkpoint verify` and `checkpoint list` through the command line: lines, exit codes, nothing changed on disk."""

import pytest
import torch

from fastmoco.cli import main
from fastmoco.runs import checkpoint

STATE = {"encoder_q.w": torch.ones(100), "velocity.w": torch.zeros(100)}


@pytest.fixture
def run(tmp_path):
    for step in (3, 4):
        checkpoint.save(tmp_path, step, STATE, {})
    return tmp_path


def spoil(run, step: int) -> None:
    path = run / f"checkpoints/step_{step:08d}/state.pt"
    path.write_bytes(path.read_bytes()[:-1])


def test_verify_reads_every_byte_and_changes_nothing(run, capsys):
    assert main(["checkpoint", "verify", str(run)]) == 0
    assert capsys.readouterr().out.split() == ["step_00000003", "good", "step_00000004", "good"]
    spoil(run, 4)
    before = sorted(run.rglob("*"))
    assert main(["checkpoint", "verify", str(run)]) == 0
    assert "step_00000004  damaged: state.pt has" in capsys.readouterr().out
    spoil(run, 3)
    assert main(["checkpoint", "verify", str(run)]) == 3
    output = capsys.readouterr().out
    assert (
        "step_00000003  damaged" in output and "step_00000004  damaged" in output and sorted(run.rglob("*")) == before
    )


def test_list_shows_what_is_there_and_what_was_set_aside(run, capsys):
    spoil(run, 4)
    checkpoint.latest(run, lambda _: None)
    assert main(["checkpoint", "list", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["step_00000003", "step_00000004.damaged"]
    assert all("MiB" in line for line in lines)


@pytest.mark.parametrize("command", ["verify", "list"])
def test_a_run_without_checkpoints_is_wrong_use_and_so_is_a_folder_that_is_no_run(command, tmp_path, capsys):
    young = tmp_path / "young"
    young.mkdir()
    (young / "recipe.json").write_text("{}")
    for folder, words in ((young, "no checkpoint yet"), (tmp_path, "is no run"), (tmp_path / "none", "does not exist")):
        assert main(["checkpoint", command, str(folder)]) == 2
        assert words in capsys.readouterr().err
