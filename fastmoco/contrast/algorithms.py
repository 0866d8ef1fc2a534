"""Which algorithms cuDNN and cuBLAS take on a GPU: the fastest by trial, or those that give the same bits each time.

By trial, cuDNN times the algorithms of each convolution anew in every process, so that a resumed run may round
otherwise; and some of them add up in an order that changes from call to call. All of these are switches of the process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

WORKSPACE = ":4096:8"
"""Of cuBLAS, in every setting: eight blocks of 4 MiB for each handle and stream, torch's own choice on Hopper. Of a
fixed size, its results do not depend on which stream multiplies."""


def choose_algorithms(device: torch.device, deterministic: bool) -> None:
    """Set the switches for steps on `device`; on a CPU, whose results are the same bits anyway, nothing is set."""
    if device.type != "cuda":
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", WORKSPACE)  # read when the first matrices are multiplied
    torch.backends.cudnn.deterministic = deterministic
    # Shapes never change, so where it may, cuDNN times its algorithms once, as in the published code.
    torch.backends.cudnn.benchmark = not deterministic


@contextmanager
def algorithms(device: torch.device, deterministic: bool) -> Iterator[None]:
    """`choose_algorithms` for a block; its end puts cuDNN's switches back, whatever was set meanwhile."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    choose_algorithms(device, deterministic)
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before
