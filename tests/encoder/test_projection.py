"""Projection heads: upstream's names, and torch's own initialisation."""

import pytest
import torch
from torch import nn

from fastmoco.encoder.projection import projection, reset_linear


@pytest.mark.parametrize(
    ("head", "names"), [("linear", ["weight", "bias"]), ("mlp", ["0.weight", "0.bias", "2.weight", "2.bias"])]
)
def test_names_and_shapes(head: str, names: list[str]) -> None:
    fc = projection(head, 24, 8)
    assert list(fc.state_dict()) == names
    assert fc(torch.zeros(2, 24)).shape == (2, 8)


def test_v2_is_two_layers_with_a_relu_and_no_norm() -> None:
    assert [type(layer) for layer in projection("mlp", 24, 8)] == [nn.Linear, nn.ReLU, nn.Linear]


def test_initialisation_is_within_torchs_bounds_and_fills_them() -> None:
    layer = nn.Linear(400, 300)
    reset_linear(layer, torch.Generator().manual_seed(0))
    for value in (layer.weight, layer.bias):
        assert 0.95 / 20 < value.abs().max() <= 1 / 20
