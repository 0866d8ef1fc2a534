"""Momentum Contrast (MoCo), exact, fast and measured.

Pretraining is a command: `fastmoco --help`. From Python, `fastmoco.Recipe` and `fastmoco.PRESETS` say what to train,
`fastmoco.Step` is one training step, and `fastmoco.kernels` holds the kernels for use in other trainers. Importing this
package imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastmoco.recipe import PRESETS, Recipe

if TYPE_CHECKING:
    from fastmoco.contrast.step import Step

__all__ = ["PRESETS", "Recipe", "Step", "__version__"]
__version__ = "0.1.0"
_LATER = {"Step": "fastmoco.contrast.step"}  # these import torch


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LATER[name]), name)
