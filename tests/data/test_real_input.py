"""Real photographs of every kind that folders hold, trained on for an epoch by the command that users run."""

import json
import math
from pathlib import Path

from fastmoco.cli import main

SMALL = "--device cpu --arch resnet18 --width 0.25 --stem cifar --crop-size 32 --batch-size 64 --queue-size 128"


def test_an_epoch_over_312_photographs_of_13_kinds(many_photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert main(["pretrain", "v2", "--data", str(many_photos), "--out", str(out), "--epochs", "1", *SMALL.split()]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["steps"] == 312 // 64 and math.isfinite(summary["loss"])
    assert not (out / "quarantine.jsonl").exists()
