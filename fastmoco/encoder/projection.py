"""Projection heads: what stands in the place of the classifier, under its name `fc`.

MoCo v1 is one linear layer, v2 puts a hidden layer of the features' width before it (Chen et al., 2020), without batch
norm. SimCLR's code (model_util.py) has batch norm behind both layers, which then have no bias; the last one scales and
does not shift. Names are `fc.weight`, `fc.bias`; `fc.0.*` and `fc.2.*`, as upstream; or `fc.0.*` to `fc.4.*`.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from fastmoco.encoder.norm import BatchNormAct


def projection(head: str, features: int, dim: int, bn_group: int = 0) -> nn.Linear | nn.Sequential:
    """Head "linear" (features -> dim), "mlp" (features -> features -> ReLU -> dim) or "mlp-bn", not yet initialised.

    `bn_group` are the samples that share the statistics of "mlp-bn".
    """
    if head == "mlp-bn":
        return nn.Sequential(
            nn.Linear(features, features, bias=False),
            BatchNormAct(features, group_size=bn_group),
            nn.Identity(),  # the ReLU, which the norm before it applies
            nn.Linear(features, dim, bias=False),
            BatchNormAct(dim, group_size=bn_group, relu=False, shift=False),
        )
    last = nn.Linear(features, dim)
    return last if head == "linear" else nn.Sequential(nn.Linear(features, features), nn.ReLU(), last)


def reset_linear(layer: nn.Linear, generator: torch.Generator) -> None:
    """Weights and biases uniform within 1/sqrt(inputs), torch's default for nn.Linear."""
    bound = 1 / math.sqrt(layer.in_features)
    nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
    if layer.bias is not None:
        nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
