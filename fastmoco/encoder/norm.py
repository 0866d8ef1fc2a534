"""Batch norm over groups of samples, fused with what follows it in a residual network."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmoco.encoder.norm_over_ranks import Gather, batch_norm_over_ranks
from fastmoco.kernels.batch_norm import Norm, batch_norm_act, batch_norm_act_twice
from fastmoco.kernels.batch_norm_pool import batch_norm_pool


class BatchNormAct(nn.Module):
    """Batch norm, an optional residual and an optional ReLU, in one pass over memory.

    In training, statistics are taken over consecutive groups of `group_size` samples (0: the whole batch), so that
    they do not depend on how a batch is spread over GPUs. Parameters and buffers carry nn.BatchNorm2d's names and
    stay fp32 whatever the activations are; evaluation is nn.BatchNorm2d's. `num_batches_tracked` is kept by the
    encoder, which advances all of them in one launch. Without `shift` the bias is a buffer and stays 0.
    """

    impl: Literal["auto", "triton", "reference", "torch"] = "auto"
    """Who does it: our kernel on a GPU and compiled loops on a CPU, one of kernel and twin, or torch by groups."""

    gather: Gather | None = None
    """Where the batch is spread over ranks and all of it shares statistics: what gathers those of the ranks."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    bias: Tensor

    def __init__(self, channels: int, *, group_size: int = 0, relu: bool = True, shift: bool = True) -> None:
        super().__init__()
        self.group_size, self.relu = group_size, relu
        self.momentum, self.eps = 0.1, 1e-5
        self.weight = nn.Parameter(torch.empty(channels))
        bias = torch.empty(channels)
        self.register_parameter("bias", nn.Parameter(bias)) if shift else self.register_buffer("bias", bias)
        self.register_buffer("running_mean", torch.empty(channels))
        self.register_buffer("running_var", torch.empty(channels))
        self.register_buffer("num_batches_tracked", torch.empty((), dtype=torch.int64))

    def reset(self) -> None:
        """Scale 1, shift 0, and statistics of a standard normal."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)
        self.running_mean.zero_()
        self.running_var.fill_(1)
        self.num_batches_tracked.zero_()

    @property
    def norm(self) -> Norm:
        """What another layer needs to apply this one to its residual."""
        return Norm(self.weight, self.bias, (self.running_mean, self.running_var))

    def groups(self, samples: int) -> int:
        """Groups among `samples`; raises ValueError if they do not divide."""
        if not self.training or not self.group_size:
            return 1
        if samples % self.group_size:
            raise ValueError(
                f"{samples} samples do not split over batch-norm groups of {self.group_size}: "
                f"use a multiple of {self.group_size}, or another group size"
            )
        return samples // self.group_size

    def forward(
        self, x: Tensor, residual: Tensor | None = None, shortcut: BatchNormAct | None = None, *, twice: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Normalise `x` [N, C, H, W] (channels-last), add `residual` (through `shortcut`'s own norm), apply ReLU.

        With `twice` the result is a pair, for two readers: their gradients are added in this layer's backward, and not
        in a pass of their own. Both share their memory.
        """
        if self.training and (self.impl == "torch" or self.gather is not None):
            y = self._with_torch(x, residual, shortcut)
            return (y, y) if twice else y
        call = batch_norm_act_twice if twice else batch_norm_act
        return call(
            x,
            self.weight,
            self.bias,
            (self.running_mean, self.running_var),
            self.groups(x.shape[0]),
            residual=residual,
            residual_norm=None if shortcut is None else shortcut.norm,
            relu=self.relu,
            momentum=self.momentum,
            eps=self.eps,
            training=self.training,
            impl="auto" if self.impl == "torch" else self.impl,
        )

    def pooled(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Normalise `x` [N, C, H, W], apply ReLU and pool its maxima, 3 x 3 with stride 2; twice, for two readers."""
        if self.training and (self.impl == "torch" or self.gather is not None):
            y = F.max_pool2d(self._with_torch(x, None, None), 3, stride=2, padding=1)
            return y, y
        return batch_norm_pool(
            x,
            self.weight,
            self.bias,
            (self.running_mean, self.running_var),
            self.groups(x.shape[0]),
            momentum=self.momentum,
            eps=self.eps,
            training=self.training,
            impl="auto" if self.impl == "torch" else self.impl,
        )

    def _with_torch(self, x: Tensor, residual: Tensor | None, shortcut: BatchNormAct | None) -> Tensor:
        y = self._normalise(x)
        if residual is not None:
            y = y + (residual if shortcut is None else shortcut._normalise(residual))
        return F.relu(y) if self.relu else y

    def _normalise(self, x: Tensor) -> Tensor:
        if self.gather is not None:
            running = (self.running_mean, self.running_var)
            options = {"momentum": self.momentum, "eps": self.eps}
            return batch_norm_over_ranks(x, self.weight, self.bias, running, self.gather, **options)
        groups = self.groups(x.shape[0])
        # With momentum 1 torch leaves each group's own statistics in these.
        mean, var = (torch.zeros(groups, self.weight.shape[0], device=x.device) for _ in range(2))
        parts = [
            F.batch_norm(part, mean[group], var[group], self.weight, self.bias, True, 1.0, self.eps)
            for group, part in enumerate(x.chunk(groups))
        ]
        with torch.no_grad():
            self.running_mean.lerp_(mean.mean(0).to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(var.mean(0).to(self.running_var.dtype), self.momentum)
        return torch.cat(parts)
