"""What all tests share: the interpreter where there is no GPU, one thread, a device."""

import os

import torch

if not torch.cuda.is_available():
    # Triton reads this once, when it is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch._dynamo  # noqa: F401  forked ranks would each import it again, eight seconds at a time

torch.set_num_threads(1)  # the last bits of a sum depend on the number of threads


@pytest.fixture
def device() -> torch.device:
    """Where kernels are tested: the GPU, or the interpreter on the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
