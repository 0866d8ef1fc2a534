"""The layout of facebookresearch/moco's checkpoints (`main_moco.py`), in and out.

`state_dict` holds module.queue [D, K] fp32, module.queue_ptr int64 [1], module.encoder_q.* and module.encoder_k.*;
the optimiser was built over both encoders, so its parameters 0 to n-1 are the query's, in module order, and the n that
follow are the key's, which have no momentum. A checkpoint is written after SGD and before the momentum update that the
next step begins with. Ours is written after both, and says so, so that nothing is applied twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fastmoco.encoder import build_encoder
from fastmoco.interop.names import MODULE
from fastmoco.recipe import Recipe
from fastmoco.runs.run_folder import KEY, QUERY

OWN = "fastmoco"
"""Entry of our own files: recipe, step, precision, and what the layout has no place for."""
PLACED = (QUERY, KEY, "velocity.")
WRAPPERS = ("module", "_orig_mod")
# Names under which programs keep a model's weights, the trained ones before their averages.
CONTAINERS = (
    *("state_dict", "model_state_dict", "model_state", "model", "net", "network", "weights", "params"),
    *("student", "teacher", "state_dict_ema", "model_ema", "ema_state_dict", "ema"),
)
QUEUE, POINTER = "queue", "queue_ptr"


def pack(state: Mapping[str, Tensor], recipe: Recipe, step: int, epoch: int, lr: float, precision: str) -> dict:
    """`state` (of `Step.state`) in upstream's layout; `epoch` counts finished ones, `lr` is the last one used."""
    encoder = build_encoder(recipe)
    names, parameters = list(encoder.state_dict()), [name for name, _ in encoder.named_parameters()]
    weights = {
        f"{MODULE}{QUEUE}": state["queue"].float().T.contiguous(),
        f"{MODULE}{POINTER}": state["queue_pointer"].clone(),
    }
    for side in (QUERY, KEY):
        weights |= {f"{MODULE}{side}{name}": state[side + name].contiguous() for name in names}
    rest = {name: value for name, value in state.items() if not name.startswith(PLACED)}
    rest = {name: value.clone() for name, value in rest.items() if name not in ("queue", "queue_pointer")}
    return {
        "epoch": epoch,
        "arch": recipe.arch,
        "state_dict": weights,
        "optimizer": {
            "state": {
                index: {"momentum_buffer": state[f"velocity.{name}"].contiguous()}
                for index, name in enumerate(parameters)
            },
            "param_groups": [_group(recipe, lr, 2 * len(parameters))],
        },
        OWN: {
            "recipe": recipe.as_dict(),
            "step": step,
            "precision": precision,
            "key_is_updated": True,
            "queue_dtype": str(state["queue"].dtype).removeprefix("torch."),
            "rest": rest,
        },
    }


def velocities(optimizer: Any, recipe: Recipe) -> dict[str, Tensor]:
    """Momentum buffers of the query encoder by parameter name; those that the file lacks are left out."""
    state = optimizer.get("state", {}) if isinstance(optimizer, dict) else {}
    buffers = {}
    for index, (name, _) in enumerate(build_encoder(recipe).named_parameters()):
        buffer = state.get(index, {}).get("momentum_buffer")
        if isinstance(buffer, Tensor):
            buffers[name] = buffer
    return buffers


def group(optimizer: Any) -> dict[str, Any]:
    """The optimiser's settings: lr, momentum, weight_decay; empty where the file has none."""
    groups = optimizer.get("param_groups") if isinstance(optimizer, dict) else None
    return groups[0] if isinstance(groups, list) and groups and isinstance(groups[0], dict) else {}


def weights_of(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors by name, from the entry that holds them where there is one, without what wrappers put into names."""
    inner: Any = content
    for _ in range(3):  # {"model": {"state_dict": ...}} is not unheard of
        key = next((key for key in CONTAINERS if isinstance(inner.get(key), dict)), None)
        if key is None:
            break
        inner = inner[key]
    tensors = {name: value for name, value in inner.items() if isinstance(name, str) and isinstance(value, Tensor)}
    return {unwrap(name): value for name, value in tensors.items()}


def unwrap(name: str) -> str:
    """A weight's name without the parts that DistributedDataParallel and torch.compile put into it, wherever."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _group(recipe: Recipe, lr: float, count: int) -> dict[str, Any]:
    return {
        "lr": lr,
        "momentum": recipe.sgd_momentum,
        "dampening": 0,
        "weight_decay": recipe.weight_decay,
        "nesterov": False,
        "maximize": False,
        "foreach": None,
        "differentiable": False,
        "fused": None,
        "params": list(range(count)),
    }
