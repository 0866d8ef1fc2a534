"""The map of features: PCA against numpy's singular values, places that hold, pictures that are drawn."""

import numpy as np
import pytest
import torch
from PIL import Image

from fastmoco.data import manifest
from fastmoco.evaluate import feature_map
from fastmoco.evaluate.feature_map import CELLS, draw_map, place, principal_axes, representatives


def test_axes_are_those_of_a_singular_value_decomposition():
    rows = torch.randn(80, 9, generator=torch.Generator().manual_seed(0)) * torch.tensor([9.0, 5, 1, 1, 1, 1, 1, 1, 1])
    found, share = principal_axes(rows)
    u, s, _ = np.linalg.svd(rows.double().numpy() - rows.double().numpy().mean(0), full_matrices=False)
    for axis in range(2):
        expected = u[:, axis] * s[axis]
        expected *= np.sign(expected @ found[:, axis])
        np.testing.assert_allclose(found[:, axis], expected, atol=1e-9)
    assert share == pytest.approx((s[:2] ** 2).sum() / (s**2).sum())
    again, _ = principal_axes(rows + 100)
    np.testing.assert_allclose(again, found, atol=1e-3)


def test_one_image_stands_for_each_cell():
    places = np.random.RandomState(0).rand(500, 2)
    chosen = representatives(places)
    cells = {tuple(np.minimum((row * CELLS).astype(int), CELLS - 1).tolist()) for row in places}
    assert set(chosen) == cells and len(set(chosen.values())) == len(chosen)


def test_two_far_groups_are_two_groups_on_the_map(monkeypatch):
    monkeypatch.setattr(feature_map, "_umap", lambda: None)
    rows = torch.randn(60, 8, generator=torch.Generator().manual_seed(1))
    rows[30:] += 20
    placed = place(rows)
    assert placed.method.startswith("PCA") and placed.places.min() == 0 and placed.places.max() == 1
    side = placed.places[:, 0] > 0.5
    assert len({*side[:30].tolist()}) == 1 and side[0] != side[30] and len({*side[30:].tolist()}) == 1
    np.testing.assert_array_equal(place(rows).places, placed.places)


def test_umap_is_taken_where_it_is_installed():
    pytest.importorskip("umap")
    rows = torch.randn(60, 8, generator=torch.Generator().manual_seed(1))
    rows[30:] += 20
    placed = place(rows)
    assert placed.method == "UMAP"
    np.testing.assert_array_equal(place(rows).places, placed.places)


@pytest.mark.parametrize("labelled", [True, False])
def test_a_map_is_drawn(stripes, tmp_path, labelled):
    images = manifest.scan(stripes / "train" if labelled else stripes / "train/down")
    draw_map(tmp_path / "map.png", images, torch.randn(len(images), 8))
    assert Image.open(tmp_path / "map.png").size == (1440, 720)
    draw_map(tmp_path / "same.png", images, torch.ones(len(images), 8))  # features of no extent
