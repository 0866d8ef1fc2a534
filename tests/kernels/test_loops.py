"""Loops compiled for a CPU: threads, forks, the cache, and an installation without numba."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastmoco.kernels import dispatch
from fastmoco.kernels.photometric import photometric

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def views(**options: object) -> Tensor:
    """Views of a few crops, each with a jitter, grey, a blur or a flip."""
    crops = torch.randint(0, 256, (5, 9, 9, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    parameters = torch.tensor([[i % 2, i % 3, 27 * i - 1, 0.7, 1.2, 0.8, 0.1, i % 2] for i in range(5)])
    return photometric(crops, parameters, MEAN, STD, **options)


@pytest.fixture
def threads() -> Iterator[None]:
    """The number of threads is again what it was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_any_number_of_threads_gives_the_same_bits(threads) -> None:
    torch.set_num_threads(1)
    alone = views()
    for count in (2, 3, 8):
        torch.set_num_threads(count)
        assert torch.equal(views(), alone)


def test_a_forked_child_computes_after_its_parent_did(threads) -> None:
    torch.set_num_threads(2)
    expected = views()
    child = os.fork()
    if not child:
        torch.set_num_threads(1)
        os._exit(0 if torch.equal(views(), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0


SCRIPT = """
import sys, torch
from fastmoco.kernels.cpu.photometric import LOOPS
from fastmoco.kernels.photometric import photometric
crops = torch.zeros(1, 4, 4, 3, dtype=torch.uint8)
photometric(crops, torch.tensor([[0, 0, -1, 0, 0, 0, 0, 0.0]]), (0, 0, 0), (1, 1, 1))
print(LOOPS[torch.float32]._compiled.cache_hits)
"""


def in_a_new_process(cache: str | Path) -> int:
    """Loops that a new process found compiled in the folder `cache`: one or none."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(cache)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_a_second_process_compiles_nothing() -> None:
    views()
    assert in_a_new_process(os.environ["NUMBA_CACHE_DIR"]) == 1


@pytest.mark.slow
def test_without_a_place_to_write_each_process_compiles(tmp_path: Path) -> None:
    """A file stands where the folder would be, which stops the superuser too."""
    (tmp_path / "file").touch()
    assert in_a_new_process(tmp_path / "file" / "folder") == 0


def test_an_installation_without_numba_says_so_and_does_without(monkeypatch) -> None:
    monkeypatch.setattr(dispatch, "HAS_NUMBA", False)
    with pytest.warns(UserWarning, match="pip install numba"):
        assert torch.equal(views(), views(impl="reference"))
