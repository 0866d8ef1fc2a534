"""The switches of cuDNN and cuBLAS: set for a GPU as asked, put back where it was for a block, never for a CPU."""

import os

import pytest
import torch

from fastmoco.contrast.algorithms import WORKSPACE, algorithms, choose_algorithms
from fastmoco.contrast.step import Step
from fastmoco.parallel import Parallel
from fastmoco.recipe import Recipe

TINY = Recipe(
    arch="resnet18", width=0.125, stem="cifar", dim=16, batch_size=16, bn_group=4, crop_size=12, queue_size=40
)
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def switches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)


def state() -> tuple[bool, bool, str | None]:
    cudnn = torch.backends.cudnn
    return cudnn.deterministic, cudnn.benchmark, os.environ.get("CUBLAS_WORKSPACE_CONFIG")


def test_deterministic_is_neither_timed_nor_free_to_add_up_in_any_order():
    choose_algorithms(GPU, True)
    assert state() == (True, False, WORKSPACE)
    choose_algorithms(GPU, False)
    assert state() == (False, True, WORKSPACE)


def test_nothing_is_set_for_a_cpu_and_what_the_user_set_of_cublas_stays(monkeypatch):
    choose_algorithms(CPU, True)
    assert state() == (False, False, None)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    choose_algorithms(GPU, True)
    assert state() == (True, False, ":16:8")


def test_a_block_puts_the_switches_back_whatever_was_set_in_it():
    with pytest.raises(KeyError), algorithms(GPU, True):
        assert state()[:2] == (True, False)
        choose_algorithms(GPU, False)
        raise KeyError
    assert state()[:2] == (False, False)


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_step_sets_what_it_was_asked_for(monkeypatch, deterministic):
    calls = []
    monkeypatch.setattr("fastmoco.contrast.build.choose_algorithms", lambda *given: calls.append(given))
    Step(TINY, Parallel(), deterministic=deterministic)
    assert calls == [(CPU, deterministic)]
