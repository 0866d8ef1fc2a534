"""Momentum Contrast (MoCo), exact, fast and measured: pretrain image encoders without labels, and use them.

On the command line: `fastmoco pretrain demo` tries it on a small set that it makes itself; `fastmoco --help` lists the
commands. In Python:

    import fastmoco

    encoder = fastmoco.load("runs/demo")                     # a run, a checkpoint, or published weights
    photos = fastmoco.embed(encoder, "photos")               # a row of features for each image of a folder
    photos.features, photos.files                            # float32 [n, F], names [n]

    encoder.features(images)                                 # [N, 3, S, S] -> [N, F]: an nn.Module like any other
    encoder.transform(picture)                               # Pillow image, path or array -> [3, S, S]

    summary = fastmoco.pretrain("v2", "photos", "runs/photos", epochs=400)   # what the command does

    fastmoco.PRESETS                                         # recipes by name: v1, v2, cifar, simclr, demo ...
    fastmoco.Recipe                                          # everything that decides a result, as frozen data
    fastmoco.Step                                            # one training step, for loops of your own

    from fastmoco.kernels import info_nce, nt_xent, sgd_ema, ema, batch_norm_act, photometric

`help(fastmoco.load)` and so on say what each takes, gives and raises. Pages: docs/python.md, docs/kernels.md.
Importing this package imports no torch; the first use of a name that needs it does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastmoco.presets import PRESETS
from fastmoco.recipe import Recipe

if TYPE_CHECKING:
    from fastmoco import kernels as kernels
    from fastmoco.calls import pretrain
    from fastmoco.contrast.step import Step
    from fastmoco.evaluate.embed import Embedding as Embedding
    from fastmoco.evaluate.embed import embed
    from fastmoco.interop.pretrained import load
    from fastmoco.runs.pretrained import Pretrained as Pretrained

__all__ = ["PRESETS", "Recipe", "Step", "__version__", "embed", "load", "pretrain"]
__version__ = "0.1.0"
_LATER = {  # these import torch
    "Embedding": "fastmoco.evaluate.embed",
    "Pretrained": "fastmoco.runs.pretrained",
    "Step": "fastmoco.contrast.step",
    "embed": "fastmoco.evaluate.embed",
    "load": "fastmoco.interop.pretrained",
    "pretrain": "fastmoco.calls",
}


def __getattr__(name: str) -> Any:
    if name == "kernels":
        return importlib.import_module("fastmoco.kernels")
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LATER[name]), name)


def __dir__() -> list[str]:
    return sorted({*__all__, *_LATER, "kernels", *(name for name in globals() if name.startswith("__"))})
