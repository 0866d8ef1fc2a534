"""Projection heads: what stands in the place of the classifier, under its name `fc`.

v1 is one linear layer, v2 puts a hidden layer of the features' width before it (Chen et al., 2020). There is no batch
norm in either. Keys are `fc.weight`, `fc.bias`, or `fc.0.*` and `fc.2.*`, as upstream.
"""

from __future__ import annotations

import math

import torch
from torch import nn


def projection(head: str, features: int, dim: int) -> nn.Linear | nn.Sequential:
    """Head "linear" (features -> dim) or "mlp" (features -> features -> ReLU -> dim), not yet initialised."""
    last = nn.Linear(features, dim)
    return last if head == "linear" else nn.Sequential(nn.Linear(features, features), nn.ReLU(), last)


def reset_linear(layer: nn.Linear, generator: torch.Generator) -> None:
    """Weights and biases uniform within 1/sqrt(inputs), torch's default for nn.Linear."""
    bound = 1 / math.sqrt(layer.in_features)
    nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
    nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
