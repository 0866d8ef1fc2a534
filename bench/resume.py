"""Whether a run that is killed and resumed ends as one that was left in peace, on this device, through the command.

Three processes of `pretrain demo --deterministic on`: one to the end; one that is killed (SIGKILL) after a step between
two checkpoints; one that resumes it. Their last checkpoints are compared bit for bit. The control compares the last
checkpoint with the one before.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from fastmoco.bench.journal import Journal
from fastmoco.bench.proof import differences
from fastmoco.bench.record_files import Row
from fastmoco.data import synthetic
from fastmoco.process import crash_points
from fastmoco.recipe import Recipe
from fastmoco.runs import checkpoint

NAME, UNIT = "resumed equals undisturbed", "tensors differ"
RESUMED, CONTROL = "killed and resumed", "control: the checkpoint before"
EVERY = {"cpu": 2, "cuda": 20}  # steps between two checkpoints, of which there are three
DEMO = ("pretrain", "demo", "--no-knn", "--save-minutes", "0", "--deterministic", "on")


class ResumeError(RuntimeError):
    """A resumed run is not the undisturbed one, or a process did not end as it should."""


def run(recipe: Recipe, device: torch.device, *, journal: Journal | None = None) -> list[Row]:
    """Rows of NAME, in tensors that differ. What is not as promised is a failure in the journal. `recipe` is not asked:
    the run is the demo's."""
    journal, every = journal or Journal(), EVERY[device.type]
    with journal.attempt(NAME), tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        images = synthetic.make(folder / "images")
        flags = ("--device", device.type, "--save-every", str(every), "--stop-after", str(3 * every), "--keep", "3")
        whole, victim = folder / "undisturbed", folder / "killed"
        _ends(0, "--data", str(images), "--out", str(whole), *flags)
        _ends(-signal.SIGKILL, "--data", str(images), "--out", str(victim), *flags, dies_after=every + every // 2)
        _ends(0, "--resume", "--out", str(victim), *flags)
        rows = compare(whole, victim, every)
        journal.keep(rows)
        judge(rows)
    return journal.rows


def compare(whole: Path, victim: Path, every: int) -> list[Row]:
    """How many tensors of the last checkpoints of two runs differ, and of the first one's last and the one before."""

    def state(of: Path, step: int) -> dict[str, torch.Tensor]:
        return checkpoint.load(of / "checkpoints" / f"step_{step:08d}").state

    last, rows = state(whole, 3 * every), []
    for provider, other in ((RESUMED, state(victim, 3 * every)), (CONTROL, state(whole, 2 * every))):
        odd, largest = differences(last, other)
        extra = {"compared": len(last), "largest": largest, "differ": odd[:10]}
        rows.append(Row(NAME, provider, UNIT, (float(len(odd)),), {"steps": 3 * every}, extra=extra))
    return rows


def judge(rows: list[Row]) -> None:
    """Raises ResumeError if the rows do not show what is promised; its text says what they show instead."""
    resumed, control = rows
    if not control.median:
        raise ResumeError("the comparison is blind: two checkpoints of different steps are equal")
    if resumed.median:
        raise ResumeError(
            f"a resumed run is not the undisturbed one: {resumed.median:.0f} of {resumed.extra['compared']} tensors "
            f"differ, by {resumed.extra['largest']:.3g} at most"
        )


def _ends(code: int, *flags: str, dies_after: int | None = None) -> None:
    environment = dict(os.environ)
    if dies_after is not None:
        environment[crash_points.VARIABLE] = f"after step:{dies_after}"
    exit_code = subprocess.run([sys.executable, "-m", "fastmoco", *DEMO, *flags], env=environment).returncode
    if exit_code != code:
        raise ResumeError(f"a run ended with code {exit_code} instead of {code}: {' '.join(flags)}")
