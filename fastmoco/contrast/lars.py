"""LARS: layer-wise adaptive rates for large batches, in front of any backend of the update.

Before SGD, the gradient g of a weight w of two or more dimensions becomes

    ratio (g + decay w),    ratio = eta |w| / (|g| + decay |w|)    (1 where |w| or |g| is zero)

with Euclidean norms over the whole tensor (You, Gitman and Ginsburg, 2017, arXiv:1708.03888, equation 6). Biases and
batch-norm parameters keep plain SGD, without weight decay: so moco-v3 does, and SimCLR and BYOL before it.

Two forms are in use. moco-v3 multiplies the velocity by the learning rate: v = m v + g, w -= lr v. SimCLR's code
(lars_optimizer.py) has the rate inside the velocity, v = m v + lr g, w -= v, which differs whenever the rate changes,
and takes its ratio of the decayed gradient: eta |w| / |g + decay w|.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastmoco.kernels.tensor_table import Tensors
from fastmoco.recipe import Recipe


class Lars:
    """A backend of the update (see `backends.py`) that adapts the gradients and lets `backend` do the rest.

    It keeps one tensor in the masters' precision for each gradient, and reads nothing back to the host. A gradient
    that holds an infinity or NaN, or of which the norm overflows, still does afterwards, so that `backend` notices.
    """

    def __init__(self, backend: Callable[[Tensors, Recipe], Callable], tensors: Tensors, recipe: Recipe) -> None:
        self._eta, self._decay = recipe.lars_eta, recipe.weight_decay
        self._inside = recipe.lars_momentum == "inside"
        self._one = torch.ones((), dtype=tensors.q[0].dtype, device=tensors.q[0].device)
        self._grads = [torch.empty_like(q) for q in tensors.q]
        pairs = [(q.detach(), grad) for q, grad in zip(tensors.q, self._grads, strict=True) if q.dim() > 1]
        self._weights, self._adapted = [q for q, _ in pairs], [grad for _, grad in pairs]
        self._advance = backend(tensors, dataclasses.replace(recipe, weight_decay=0.0))

    @torch.no_grad()
    def __call__(self, grads: list[Tensor], lr: Tensor, nonfinite: Tensor, scale: Tensor | None) -> None:
        """Advance all tensors, in place."""
        torch._foreach_copy_(self._grads, grads)
        if scale is not None:
            torch._foreach_mul_(self._grads, scale.reciprocal())
        w, g = self._norms(self._weights), self._norms(self._adapted)
        torch._foreach_add_(self._adapted, self._weights, alpha=self._decay)
        decayed = self._norms(self._adapted) if self._inside else g + self._decay * w
        torch._foreach_mul_(self._adapted, self._ratios(w, g, decayed, decayed if self._inside else g))
        if self._inside:
            torch._foreach_mul_(self._grads, lr)
            lr = self._one
        self._advance(self._grads, lr, nonfinite, None)

    @staticmethod
    def _norms(tensors: list[Tensor]) -> Tensor:
        return torch.stack(torch._foreach_norm(tensors))

    def _ratios(self, w: Tensor, g: Tensor, decayed: Tensor, slope: Tensor) -> list[Tensor]:
        ratio = self._eta * w / decayed
        ratio = torch.where((w > 0) & (slope > 0), ratio, torch.ones_like(ratio))
        # An infinite norm makes the ratio zero, under which a diverged gradient would pass for a small one.
        return list(ratio.masked_fill(g.isinf(), math.nan).unbind())
