"""`export RUN`: the pretrained weights as other projects read them.

moco         .pth.tar of facebookresearch/moco: both encoders, queue, optimiser; its scripts go on from it
torchvision  .pth with the backbone's weights, for load_state_dict
timm         folder of model.safetensors, config.json and a model card: timm.create_model("local-dir:FOLDER")
detectron2   .pkl as its checkpointer reads it, backbone renamed
safetensors  folder of model.safetensors (backbone and projection head) and a model card
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fastmoco import atomic
from fastmoco.encoder.resnet import ARCHITECTURES, STAGE_CHANNELS
from fastmoco.interop import upstream
from fastmoco.interop.card import model_card
from fastmoco.interop.names import backbone, to_detectron2
from fastmoco.options import Export, UsageError, require_new
from fastmoco.recipe import Recipe
from fastmoco.runs import run_folder
from fastmoco.runs.run_folder import SavedRun

CARD = "README.md"


def export(folder: Path, form: str, out: Path) -> Path:
    """Write the newest checkpoint of the run in `folder` to `out` in one of the formats above; returns `out`.

    Raises UsageError if `folder` is no run, `out` exists or the format cannot hold this network. Raises CheckpointError
    if the run has no good checkpoint.
    """
    saved_run = run_folder.load(folder)
    require_new(out)
    save = WRITERS[form](folder, saved_run)
    with atomic.replacing(out) as draft:
        save(draft)
    return out


def backbone_weights(saved_run: SavedRun) -> dict[str, Tensor]:
    """Weights of the query encoder without its head, by torchvision's names."""
    query = saved_run.query
    return {name: query[name] for name in backbone(query)}


def detectron2_content(weights: dict[str, Tensor]) -> dict[str, Any]:
    """What detectron2's checkpointer takes: renamed weights as NumPy arrays."""
    model = {to_detectron2(name): value.numpy() for name, value in weights.items()}
    return {"model": model, "__author__": "fastmoco", "matching_heuristics": True}


def timm_config(recipe: Recipe) -> dict[str, Any]:
    """config.json of a headless timm model; raises UsageError if timm has no such network."""
    if not is_standard(recipe):
        raise UsageError(
            f"timm has no {recipe.arch} of width {recipe.width} with the {recipe.stem} stem: use --format safetensors"
        )
    features = STAGE_CHANNELS[-1] * ARCHITECTURES[recipe.arch].expansion
    colours = recipe.augmentation
    return {
        "architecture": recipe.arch,
        "num_classes": 0,
        "num_features": features,
        "pretrained_cfg": {
            "tag": "fastmoco",
            "custom_load": False,
            "input_size": [3, recipe.crop_size, recipe.crop_size],
            "fixed_input_size": False,
            "interpolation": "bilinear",
            "crop_pct": 0.875,
            "crop_mode": "center",
            "mean": list(colours.mean),
            "std": list(colours.std),
            "num_classes": 0,
            "pool_size": [7, 7],
            "first_conv": "conv1",
            "classifier": "fc",
        },
    }


def is_standard(recipe: Recipe) -> bool:
    """Whether torchvision, timm and detectron2 have this very network."""
    return recipe.width == 1 and recipe.stem == "imagenet"


def command(options: Export) -> None:
    """`export RUN`: write the file and say what it is."""
    assert options.out is not None
    out = export(options.run, options.format, options.out)
    print(f"{out}: {DESCRIPTIONS[options.format].format(out=out)}")
    recipe = run_folder.load(options.run).recipe
    if not is_standard(recipe) and options.format in ("torchvision", "detectron2"):
        print(
            f"note: names are {options.format}'s, but it has no {recipe.arch} of width {recipe.width} with the "
            f"{recipe.stem} stem: load them into a network of your own"
        )
    if recipe.optimizer != "sgd" and options.format == "moco":
        print(
            f"note: trained with {recipe.optimizer.upper()}, which upstream's scripts do not have: resumed there, it "
            "goes on with SGD at a learning rate that was not chosen for it"
        )


def _moco(_: Path, saved_run: SavedRun) -> Callable[[Path], None]:
    if saved_run.recipe.dictionary != "queue":
        raise UsageError(
            f"--format moco holds a key encoder and a queue, and this run has a {saved_run.recipe.dictionary} in their "
            "place: use torchvision, timm, detectron2 or safetensors"
        )
    per_epoch = max(1, saved_run.facts.get("steps", 0) // saved_run.recipe.epochs)
    lr = saved_run.recipe.learning_rate(max(saved_run.step - 1, 0), per_epoch)
    content = upstream.pack(
        saved_run.state, saved_run.recipe, saved_run.step, saved_run.step // per_epoch, lr, saved_run.precision
    )
    return partial(_torch_file, content)


def _torchvision(_: Path, saved_run: SavedRun) -> Callable[[Path], None]:
    return partial(_torch_file, backbone_weights(saved_run))


def _torch_file(content: dict[str, Any], path: Path) -> None:
    with path.open("wb") as file:  # given a name, torch would write it into the file
        torch.save(content, file)


def _detectron2(_: Path, saved_run: SavedRun) -> Callable[[Path], None]:
    content = detectron2_content(backbone_weights(saved_run))
    return partial(_bytes_file, pickle.dumps(content))


def _bytes_file(content: bytes, path: Path) -> None:
    path.write_bytes(content)


def _timm(folder: Path, saved_run: SavedRun) -> Callable[[Path], None]:
    config = timm_config(saved_run.recipe)
    return _hub_folder(
        backbone_weights(saved_run),
        {"format": "pt"},
        {"config.json": json.dumps(config, indent=2) + "\n", CARD: model_card(folder, saved_run)},
    )


def _safetensors(folder: Path, saved_run: SavedRun) -> Callable[[Path], None]:
    metadata = {"format": "pt", "recipe": json.dumps(saved_run.recipe.as_dict()), "step": str(saved_run.step)}
    return _hub_folder(saved_run.query, metadata, {CARD: model_card(folder, saved_run)})


def _hub_folder(weights: dict[str, Tensor], metadata: dict[str, str], texts: dict[str, str]) -> Callable[[Path], None]:
    def save(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        save_file(weights, folder / "model.safetensors", metadata=metadata)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")

    return save


WRITERS = {
    "moco": _moco,
    "torchvision": _torchvision,
    "timm": _timm,
    "detectron2": _detectron2,
    "safetensors": _safetensors,
}
DESCRIPTIONS = {
    "moco": "checkpoint of facebookresearch/moco, for its main_lincls.py and detection converter",
    "torchvision": 'for torchvision: model.load_state_dict(torch.load("{out}", weights_only=True), strict=False)',
    "timm": 'folder for timm: timm.create_model("local-dir:{out}", pretrained=True)',
    "detectron2": "backbone for detectron2: MODEL.WEIGHTS {out}",
    "safetensors": "folder with model.safetensors (backbone and projection head) and a model card",
}
