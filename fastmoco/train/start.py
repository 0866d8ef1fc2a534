"""Weights that a run starts from, in place of random ones: the backbone of whatever `fastmoco.load` reads."""

from __future__ import annotations

from pathlib import Path

from fastmoco.contrast.step import Step
from fastmoco.interop.names import backbone
from fastmoco.interop.pretrained import load
from fastmoco.options import UsageError
from fastmoco.runs.run_folder import KEY, QUERY, without


def start_from(step: Step, source: Path) -> None:
    """Give both encoders of `step` the backbone of `source`, its batch-norm statistics too; the head stays as it is.

    `source` is a run, a checkpoint, what `export` wrote, a MoCo checkpoint or a torchvision network. Raises UsageError
    if it is another network than the recipe's, and what `load` raises.
    """
    encoder = load(source, device="cpu")
    weights = {name: value for name, value in encoder.state_dict().items() if not name.startswith("fc.")}
    state = step.state()
    names = backbone(without(QUERY, state))
    unlike = [name for name in names if name not in weights or weights[name].shape != state[QUERY + name].shape]
    if unlike or set(weights) - set(names):
        theirs = encoder.recipe
        raise UsageError(
            f"--start-from {source} is a {theirs.arch} of width {theirs.width:g} with the {theirs.stem} stem: give "
            f"--arch {theirs.arch} --width {theirs.width:g} --stem {theirs.stem}"
        )
    sides = [side for side in (QUERY, KEY) if any(name.startswith(side) for name in state)]
    step.load(state | {side + name: weights[name].to(state[side + name]) for side in sides for name in names})
