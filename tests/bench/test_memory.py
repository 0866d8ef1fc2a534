"""Counted peaks against sizes known beforehand."""

import dataclasses

import torch

from fastmoco.bench import memory
from fastmoco.bench.journal import Journal
from fastmoco.bench.memory import LiveBytes, peak_bytes
from fastmoco.presets import PRESETS

CPU = torch.device("cpu")
SMALL = dataclasses.replace(
    PRESETS["v2"][1], arch="resnet18", width=0.125, batch_size=32, crop_size=16, queue_size=96, dim=16
)


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
    with LiveBytes() as counter:
        x = torch.zeros(1000)
        x.view(10, 100).add_(1).t()[3:].mul_(2)
    assert counter.peak == counter.live == 4000


def test_what_was_there_before_is_not_counted():
    before = torch.ones(1000)
    assert peak_bytes(lambda: before.add_(1), CPU) == 0


def test_what_was_prepared_counts_as_far_as_it_stays():
    values = []

    def prepare() -> None:
        values.append(torch.ones(1000))

    assert peak_bytes(lambda: torch.ones(500), CPU, prepare) == 4 * 1500


def test_a_case_that_fails_costs_its_own_row(monkeypatch):
    def published(*_: object) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(memory, "published", published)
    journal = Journal()
    rows = memory.run(SMALL, CPU, dtype=torch.float32, only="fp32", journal=journal)
    assert [row.provider for row in rows] == ["fastmoco fp32"]
    assert journal.failures == {"step published fp32": "OutOfMemoryError: no room"}


def test_the_published_step_is_named_by_what_it_computes_in():
    devices = {name: torch.device(name) for name in ("cpu", "cuda")}
    names = {name: {case for _, case in memory._step_cases(SMALL, device)} for name, device in devices.items()}
    assert "published fp32" in names["cpu"] and "published tf32" in names["cuda"]
    assert "published tf32" not in names["cpu"] and "published fp32" not in names["cuda"]
