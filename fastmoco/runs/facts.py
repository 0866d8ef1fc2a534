"""RUN/recipe.json and other JSON files of a run, and the command line that goes on with it. It imports no torch."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from fastmoco.options import UsageError
from fastmoco.presets import PRESETS
from fastmoco.recipe_file import RUN_FILE as RECIPE


def read_facts(run: Path, remedy: str = "give the folder that pretrain wrote") -> dict[str, Any]:
    """What RUN/recipe.json holds. Raises UsageError if it is missing, with what to do (`remedy`), or damaged."""
    path = run / RECIPE
    if not path.is_file():
        raise UsageError(f"{run} is no run (it has no {RECIPE}): {remedy}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path} is damaged ({error}): restore it, or start another run") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file; an empty dictionary if it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def go_on(run: Path) -> str:
    """The command line that goes on with `run`, started as this process was, with as many ranks."""
    preset = read_json(run / RECIPE).get("preset")
    preset = preset if preset in PRESETS else next(iter(PRESETS))  # a run of none goes on under any
    return f"{program()} pretrain {preset} --resume --out {shlex.quote(str(run))}"


def program() -> str:
    """What a command line starts with that starts as many ranks as there are here."""
    world, here = (os.environ.get(name, "1") for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if world != "1":  # of several machines each has its own flags
        return f"python launch.py --nproc {world}" if world == here else "python launch.py ..."
    if Path(sys.argv[0]).name == "launch.py":
        return "python launch.py"
    return "python -m fastmoco" if Path(sys.argv[0]).parts[-2:] == ("fastmoco", "__main__.py") else "fastmoco"
