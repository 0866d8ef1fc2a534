"""A journal keeps what is finished, says what failed, and lets go of what failed."""

import weakref

import pytest
import torch

from fastmoco.bench.clocks import Clocks
from fastmoco.bench.journal import Journal
from fastmoco.bench.record_files import Row


def row(provider: str, *samples: float) -> Row:
    return Row("step", provider, "ms", samples)


def test_rows_are_saved_as_they_come_and_later_ones_replace_their_like():
    snapshots = []
    journal = Journal(lambda so_far: snapshots.append(so_far.rows))
    journal.keep([row("a", 1.0), row("b", 2.0)])
    journal.keep([row("a", 1.0, 1.5)])
    assert (
        snapshots == [[row("a", 1.0), row("b", 2.0)], [row("a", 1.0, 1.5), row("b", 2.0)]]
        and journal.rows == snapshots[-1]
    )
    assert journal.facts() == {}


def test_what_fails_is_told_and_the_rest_goes_on(capsys):
    journal = Journal()
    with journal.attempt("a"):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
    with journal.attempt("b"):
        raise KeyError("bug")
    with journal.attempt("c"):
        journal.keep([row("c", 1.0)])
    reasons = {"a": "OutOfMemoryError: CUDA out of memory. Tried to allocate", "b": "KeyError: 'bug'"}
    assert journal.failures == reasons and journal.facts() == {"failed": reasons} and len(journal.rows) == 1
    output = capsys.readouterr().err
    assert "a failed: OutOfMemoryError: CUDA" in output and output.count("Traceback") == 1  # of the bug alone


def test_an_error_of_cuda_that_stays_costs_no_other_row(monkeypatch):
    def raises() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", raises)
    journal = Journal()
    with journal.attempt("a"):
        raises()
    assert "illegal memory access" in journal.failures["a"]


def test_an_interruption_is_no_failure():
    with pytest.raises(KeyboardInterrupt):
        with Journal().attempt("a"):
            raise KeyboardInterrupt


def test_what_a_failure_held_is_freed():
    refs = []

    def start() -> None:
        big = torch.zeros(10)
        refs.append(weakref.ref(big))
        try:
            raise torch.OutOfMemoryError("no")
        finally:
            raise RuntimeError("the capture is void")

    def failed(what: str, error: Exception) -> None:
        Journal.fail(journal, what, error)
        frees.append(refs[-1]() is None)  # while the error itself is still there

    journal, frees = Journal(), []
    journal.fail = failed
    with journal.attempt("a"):
        start()
    assert frees == [True]


def test_clocks_are_read_with_every_set_of_rows():
    class Counted(Clocks):
        taken = 0

        def __init__(self) -> None: ...

        def sample(self) -> None:
            self.taken += 1

        def summary(self) -> dict:
            return {"samples": self.taken}

    journal = Journal(clocks=Counted())
    for _ in range(3):
        journal.keep([])
    assert journal.facts() == {"clocks": {"samples": 3}}
