"""Warnings: one of a kind, not before the queue is full, not for a run that learns."""

from dataclasses import replace

import pytest

from fastmoco.recipe import PRESETS
from fastmoco.train.health import BAD_IN_A_ROW, Health

RECIPE = replace(PRESETS["demo"][1], queue_size=999, batch_size=100, bn_group=50)  # 5 in 1000 queries hit by chance
CHANCE = 0.5


def line(**changes: float) -> dict[str, float]:
    return {"step": 70, "queue_filled": 1.0, "spread": 0.8, "top5": 40.0, **changes}


def test_a_run_that_learns_gets_no_warning():
    health = Health(RECIPE)
    assert not any(health.warnings(line(top5=share), 10) for share in (3.0, 10.0, 90.0) for _ in range(10))


def test_collapsed_keys_are_warned_of_once():
    health = Health(RECIPE)
    assert health.warnings(line(spread=0.001, queue_filled=0.5), 10) == []
    [warning] = health.warnings(line(spread=0.001), 10)
    assert "collapsed at step 70" in warning and "0.001" in warning and warning.count("\n") == 0
    assert health.warnings(line(spread=0.001), 10) == []


@pytest.mark.parametrize(("share", "expected"), [(0.0, 1), (CHANCE, 1), (1.9 * CHANCE, 1), (2.2 * CHANCE, 0)])
def test_accuracy_at_chance_is_warned_of_once_there_are_enough_queries(share, expected):
    health = Health(RECIPE)
    assert health.warnings(line(top5=share), 10) == []  # 1000 queries: 5 hits by chance, too few to judge
    found = [warning for _ in range(20) for warning in health.warnings(line(top5=share), 10)]
    assert len(found) == expected and all("at chance" in warning for warning in found)


def test_skipping_gives_up_only_where_nothing_is_finite_for_long():
    health = Health(RECIPE)
    assert all(health.skip(9, 1) for _ in range(50)) and health.skipped == 450
    assert all(health.skip(10, 0) for _ in range(BAD_IN_A_ROW // 10 - 1))
    assert not health.skip(10, 0)
