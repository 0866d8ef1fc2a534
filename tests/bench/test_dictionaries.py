"""The three dictionaries side by side: the same recipe but for where negatives come from."""

import dataclasses

import pytest
import torch

from fastmoco.bench import dictionaries
from fastmoco.bench.dictionaries import forms
from fastmoco.presets import PRESETS

CPU = torch.device("cpu")
SMALL = dataclasses.replace(
    PRESETS["v2"][1], arch="resnet18", width=0.125, batch_size=32, crop_size=16, queue_size=96, dim=16
)


def test_the_forms_differ_in_the_dictionary_alone():
    for name, recipe in forms(SMALL).items():
        changed = set(recipe.differences(SMALL))
        assert changed <= {"dictionary", "symmetric", "same_view_negatives", "queue_size"}, name
        assert recipe.dictionary == name.split(",")[0]
    with pytest.raises(ValueError, match="use --preset v1"):
        forms(PRESETS["simclr"][1])


def test_a_row_of_each_for_time_and_bytes():
    rows = dictionaries.run(SMALL, CPU, rounds=1, warmup=0, precision="fp32")
    found = {}
    for row in rows:
        found.setdefault(row.name, {})[row.provider] = row.samples[0]
    assert all(list(each) == list(forms(SMALL)) and min(each.values()) > 0 for each in found.values())
    state = found["state of a checkpoint"]
    # A batch keeps nothing, a bank an entry for each image, a queue its keys and a second encoder.
    assert state["batch, all views"] == state["batch, one-sided"] < state["bank"] < state["queue"]
    assert state["bank"] - state["batch, one-sided"] == pytest.approx((2 * 96 * 16 * 4 + 8) / 1e6)
    moved = found["moved by loss, dictionary and update"]
    assert moved["batch, one-sided"] < moved["queue"]
    peak = found["peak memory of a step"]
    assert peak["bank"] < min(peak["queue"], peak["batch, all views"])
