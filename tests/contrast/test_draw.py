"""The bank's draw: the plan's hash, on the device; uniform, with replacement, another one each step."""

import numpy as np
import pytest
import torch

from fastmoco.contrast.dictionary import Draw
from fastmoco.data.draws import BANK_STREAM, hash_words


@pytest.mark.parametrize("seed", [0, 7, 2**63 - 1])
@pytest.mark.parametrize("step", [0, 1, 10**9])
def test_it_is_the_plans_hash(seed: int, step: int) -> None:
    """Word by word, in uint64 of numpy."""
    expected = (hash_words(seed, BANK_STREAM, step, np.arange(500)) >> np.uint64(1)) % np.uint64(1_281_167)
    actual = Draw(seed, 500, 1_281_167)(torch.tensor(step))
    np.testing.assert_array_equal(actual.numpy(), expected.astype(np.int64))


def test_it_is_uniform_and_new_in_each_step() -> None:
    draw = Draw(3, 20_000, 100)
    counts = torch.stack([torch.bincount(draw(torch.tensor(step)), minlength=100) for step in range(5)])
    chi_square = (counts.sum(0) - 1000).square().sum() / 1000
    assert 50 < chi_square < 160  # of 99 degrees of freedom: mean 99, standard deviation 14
    assert not torch.equal(counts[0], counts[1])
