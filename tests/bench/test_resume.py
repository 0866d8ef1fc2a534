"""A run that is killed and resumed is compared bit for bit with one that was not, and a difference is a failure."""

import pytest
import torch

from fastmoco.bench import resume
from fastmoco.bench.journal import Journal
from fastmoco.bench.record_files import Row
from fastmoco.bench.resume import CONTROL, RESUMED, ResumeError, judge
from fastmoco.recipe import Recipe

CPU = torch.device("cpu")


def rows(resumed: int, control: int) -> list[Row]:
    extra = {"compared": 9, "largest": 0.5}
    pairs = ((RESUMED, resumed), (CONTROL, control))
    return [Row(resume.NAME, name, resume.UNIT, (float(count),), extra=extra) for name, count in pairs]


def test_a_difference_is_a_failure_and_so_is_a_blind_comparison():
    judge(rows(0, 9))
    with pytest.raises(ResumeError, match="2 of 9 tensors differ, by 0.5 at most"):
        judge(rows(2, 9))
    with pytest.raises(ResumeError, match="the comparison is blind"):
        judge(rows(0, 0))


def test_a_process_that_ends_otherwise_than_it_should_is_said(monkeypatch):
    """The second is meant to be killed: one that lives on has reached no point at which it was to die."""
    codes = iter([0, 0])
    monkeypatch.setattr(resume.synthetic, "make", lambda folder: folder)
    monkeypatch.setattr(resume.subprocess, "run", lambda *_, **__: type("Done", (), {"returncode": next(codes)}))
    journal = Journal()
    assert resume.run(Recipe(), CPU, journal=journal) == []
    assert "ended with code 0 instead of -9" in journal.failures[resume.NAME]


@pytest.mark.slow
def test_the_demo_killed_and_resumed_on_this_machine_equals_itself():
    journal = Journal()
    medians = {row.provider: row.median for row in resume.run(Recipe(), CPU, journal=journal)}
    assert journal.failures == {} and medians[RESUMED] == 0 < medians[CONTROL]
