"""What a record says of the moment it was measured in is what was so."""

import re

import pytest
import torch

from fastmoco import environment


def test_the_moment_is_the_threads_load_and_time_of_now(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fastmoco.environment.os.getloadavg", lambda: (3.0, 0.0, 0.0))
    monkeypatch.setattr("fastmoco.environment.cores", lambda: 2)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    now = environment.moment()
    assert (now["threads"], now["load"], now["omp_num_threads"]) == (torch.get_num_threads(), 1.5, "7")
    assert re.fullmatch(r"\d\d:\d\d UTC", now["time"])
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert environment.moment()["omp_num_threads"] is None
