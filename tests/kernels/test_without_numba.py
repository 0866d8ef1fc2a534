"""An installation without numba says so and computes the same, and the tests of kernels hold there too."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from batch_norm_cases import make_case, results
from photometric_cases import draws, photos
from torch import Tensor

from fastmoco.kernels import dispatch
from fastmoco.kernels.batch_norm import batch_norm_act_twice
from fastmoco.kernels.batch_norm_pool import batch_norm_pool
from fastmoco.kernels.photometric import photometric


def batch_norm(**options: object) -> list[Tensor]:
    case = make_case((8, 16, 9, 7), "dual", torch.float32, torch.device("cpu"))
    return list(results(batch_norm_act_twice, case, 4, case.grad * 3, **options).values())


def pool(**options: object) -> list[Tensor]:
    x, (weight, bias, _), *_ = make_case((8, 16, 9, 7), "none", torch.float32, torch.device("cpu"))
    y = batch_norm_pool(x.requires_grad_(), weight, bias, None, 4, **options)
    return [y[0].detach(), *torch.autograd.grad(y, x, [torch.ones_like(each) for each in y])]


def views(**options: object) -> list[Tensor]:
    return [photometric(photos(3, 9), draws(3, "v2"), (0.5, 0.4, 0.3), (0.2, 0.3, 0.2), **options)]


@pytest.mark.parametrize("call", [batch_norm, pool, views])
def test_an_installation_without_numba_says_so_and_does_without(call: Callable, monkeypatch) -> None:
    monkeypatch.setattr(dispatch, "HAS_NUMBA", False)
    with pytest.warns(UserWarning, match="pip install numba"):
        found = call()
    assert all(torch.equal(a, b) for a, b in zip(found, call(impl="reference"), strict=True))


ABSENT = """
import importlib.util, sys

found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "numba" else found(name, *rest)

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("numba", "llvmlite"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
"""


@pytest.mark.slow
def test_the_tests_of_kernels_hold_without_numba(tmp_path: Path) -> None:
    """All of them are found, and those that have to do with loops pass or are skipped."""
    (tmp_path / "absent.py").write_text(ABSENT)
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    chosen = "loops or winograd or numba or resize or auto or photometric and (compiled or operator)"
    command = [sys.executable, "-m", "pytest", "-p", "absent", "-q", "-m", "not slow", "-k", chosen, "tests/kernels"]
    child = subprocess.run(
        command, cwd=root, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=250
    )
    assert child.returncode == 0, child.stdout[-5000:]
