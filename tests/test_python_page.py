"""The code of docs/python.md runs from top to bottom, on a tiny run in the place of a long one."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastmoco.contrast.step import Step
from fastmoco.parallel import Parallel
from fastmoco.runs import checkpoint

PAGE = Path(__file__).parents[1] / "docs/python.md"
# What would take hours, and what takes its place; each must be on the page.
SMALLER = {
    'pretrain("small", "photos", "runs/photos")': 'pretrain("small", "photos", "runs/photos", **TINY)',
    'arch="resnet18", batch_size=128, epochs=100)': "**TINY, queue_size=16)",
    "range(recipe.epochs * plan.steps_per_epoch)": "range(3)",
}
TINY = {"arch": "resnet18", "width": 0.125, "stem": "cifar", "crop_size": 16, "batch_size": 8, "bn_group": 4}
TINY |= {"epochs": 1, "precision": "fp32"}


def test_its_code_runs(images: Path, recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("photos").symlink_to(images / "train")
    for name in ("a.jpg", "b.png"):
        Image.open(images / "val/across/0.jpg").save(name)
    run, step = Path("runs/demo"), Step(recipe, Parallel(), "fp32")
    checkpoint.save(run, 0, step.state(), {"recipe": recipe.as_dict()})
    (run / "recipe.json").write_text(json.dumps({"recipe": recipe.as_dict(), "options": {}}))
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S))
    for long, short in SMALLER.items():
        assert code.count(long) == 1, long
        code = code.replace(long, short)
    names = {"TINY": TINY}
    exec(compile(code, str(PAGE), "exec"), names)
    assert names["nearest"].shape == (40, 5) and names["summary"]["steps"] == 5
    assert isinstance(names["weights"]["conv1.weight"], torch.Tensor)
