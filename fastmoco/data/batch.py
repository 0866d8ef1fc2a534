"""The batch that one training step consumes. A separate file, so that code without images does not import DALI."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor


@dataclass
class Batch:
    """One rank's part of a training step: N samples, M = N rows of crops, or 2N when symmetric, view by view.

    A dictionary that takes its keys from earlier steps, a bank, has no key crops: there M of the keys is 0.

    A loader with `photometric="dali"` has finished views in the place of crops, float32 [M, 3, S, S] channels-last, and
    those of the keys stand in the rows of the key batch.
    """

    step: int
    epoch: int
    sample: np.ndarray
    """int64 [N]: samples of this rank's query slots, as planned."""
    query_crops: Tensor
    """uint8 [M, S, S, 3]."""
    query_parameters: Tensor
    """float32 [M, 8]: photometric parameters of the query crops."""
    key_crops: Tensor
    """uint8 [M, S, S, 3]: crops that this rank's key encoder sees, in order of arrival."""
    key_parameters: Tensor
    """float32 [M, 8]: photometric parameters of the key crops."""
    key_rows: Tensor
    """int64 [M]: row of the key batch that each key crop is written to."""
    unshuffle: Tensor
    """int64 [views * B]: row of the keys gathered from all ranks, for each key view and slot of the global batch."""
    shown: Tensor
    """int64 [N]: samples whose crops stand here: a bad one's substitute, which may then stand here twice."""
