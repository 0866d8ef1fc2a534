"""RUN/recipe.json and other JSON files of a run. Only the standard library is imported, for the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastmoco.options import UsageError
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
