"""Views of a batch, as the encoders take them: from uint8 crops by the photometric kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmoco.contrast.parts import part
from fastmoco.kernels.photometric import photometric
from fastmoco.recipe import Augmentation


class Views:
    """Makes views of crops by the parameters that the plan drew, in `dtype`, with `channels` channels."""

    def __init__(self, augmentation: Augmentation, dtype: torch.dtype, channels: int) -> None:
        self.augmentation, self.dtype, self.channels = augmentation, dtype, channels

    @part("photometric")
    def __call__(self, crops: Tensor, parameters: Tensor, rows: Tensor | None = None) -> Tensor:
        """Views [M, channels, S, S], channels-last, of `crops` uint8 [M, S, S, 3] with `parameters` fp32 [M, 8].

        View i is written to row `rows[i]`. Crops in floating point are views already, which DALI has made, in their
        rows.
        """
        if crops.is_floating_point():
            return crops.to(self.dtype)
        augmentation = self.augmentation
        return photometric(
            crops,
            parameters,
            augmentation.mean,
            augmentation.std,
            dtype=self.dtype,
            channels=self.channels,
            rows=rows,
            max_sigma=augmentation.blur_sigma[1],
        )
