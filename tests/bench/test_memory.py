"""Counted peaks against sizes known beforehand."""

import torch

from fastmoco.bench.memory import LiveBytes, peak_bytes

CPU = torch.device("cpu")


def test_the_peak_is_of_what_lives_at_once():
    def both() -> None:
        one, two = torch.ones(1000), torch.ones(2000)
        del one, two
        torch.ones(500)

    def in_turn() -> None:
        for size in (1000, 2000):
            torch.ones(size)

    assert peak_bytes(both, CPU) == 4 * 3000
    assert peak_bytes(in_turn, CPU) == 4 * 2000


def test_views_and_work_in_place_cost_nothing():
    with LiveBytes() as counted:
        x = torch.zeros(1000)
        x.view(10, 100).add_(1).t()[3:].mul_(2)
    assert counted.peak == counted.live == 4000


def test_what_was_there_before_is_not_counted():
    before = torch.ones(1000)
    assert peak_bytes(lambda: before.add_(1), CPU) == 0
