"""Ways to do the same update: our one kernel, torch's own optimiser, NVIDIA's apex.

Each takes the tensors of an update once, and then, step by step, gradients, learning rate [], the flag that a
non-finite gradient sets (int32 [1]) and the loss scale [] or None. All compute what `kernels.sgd_ema` defines; they
differ in how often memory is passed over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastmoco.kernels.sgd_ema import TensorTable, sgd_ema
from fastmoco.kernels.tensor_table import Tensors
from fastmoco.options import UsageError
from fastmoco.recipe import Recipe

Backend = Literal["fused", "torch", "apex"]
CHUNK = 2048 * 32  # elements that a block of apex's kernels takes, apex's own choice


class FusedUpdate:
    """`kernels.sgd_ema`: one pass over memory."""

    def __init__(self, tensors: Tensors, recipe: Recipe) -> None:
        self.recipe = recipe
        self._table = TensorTable(*tensors)

    def __call__(self, grads: list[Tensor], lr: Tensor, nonfinite: Tensor, scale: Tensor | None) -> None:
        """Advance all tensors, in place."""
        numbers = (self.recipe.sgd_momentum, self.recipe.weight_decay, self.recipe.ema_momentum)
        sgd_ema(self._table, grads, lr, *numbers, nonfinite, grad_scale=scale)


class TorchUpdate:
    """What a careful user of torch writes: fused SGD, then the average and the casts as foreach operations."""

    def __init__(self, tensors: Tensors, recipe: Recipe) -> None:
        self.recipe, self._tensors = recipe, tensors
        self._casts = _casts(tensors)
        self._grads = _own_gradients(tensors)
        # Under the name by which torch.amp.GradScaler tells an optimiser, on the device, to skip the step.
        self._optimizer = torch.optim.SGD(
            list(tensors.q), 0.0, momentum=recipe.sgd_momentum, weight_decay=recipe.weight_decay, fused=True
        )
        self._bad = torch.zeros((), device=tensors.q[0].device)
        self._optimizer.found_inf = self._bad  # type: ignore[attr-defined]
        _give_velocity(self._optimizer, tensors)

    @torch.no_grad()
    def __call__(self, grads: list[Tensor], lr: Tensor, nonfinite: Tensor, scale: Tensor | None) -> None:
        """Advance all tensors, in place."""
        bad = self._bad.zero_()
        unscale = torch.ones_like(bad) if scale is None else scale.reciprocal()
        torch._foreach_copy_(self._grads, grads)
        torch._amp_foreach_non_finite_check_and_unscale_(self._grads, bad, unscale)
        nonfinite.copy_(bad)
        self._optimizer.param_groups[0]["lr"] = lr
        self._optimizer.step()
        if self._tensors.k:
            # A lerp whose weight is zero after a bad gradient; torch's own takes its weight from the host.
            way = torch._foreach_sub(list(self._tensors.q), list(self._tensors.k))
            torch._foreach_mul_(way, (1 - bad) * (1 - self.recipe.ema_momentum))
            torch._foreach_add_(list(self._tensors.k), way)
        _cast(self._casts)


class ApexUpdate:
    """apex's FusedSGD on the fp32 masters, and `multi_tensor_axpby` for the average.

    Both take numbers from the host, so each step waits for the device, and no CUDA graph can hold it. Raises
    UsageError if apex is not installed with its CUDA extensions.
    """

    def __init__(self, tensors: Tensors, recipe: Recipe) -> None:
        try:
            import amp_C
            from apex.multi_tensor_apply import multi_tensor_applier
            from apex.optimizers import FusedSGD
        except ImportError as error:
            raise UsageError(
                f"--update apex needs NVIDIA's apex, built from source with APEX_CUDA_EXT=1 ({error}); the `apex` on "
                "PyPI is another project: use --update fused or --update torch"
            ) from error
        self.recipe, self._tensors = recipe, tensors
        self._casts, self._grads = _casts(tensors), _own_gradients(tensors)
        self._optimizer = FusedSGD(list(tensors.q), 0.0, momentum=recipe.sgd_momentum, weight_decay=recipe.weight_decay)
        _give_velocity(self._optimizer, tensors)
        # axpby reports infinities here; q and k hold none, because gradients are checked first.
        self._overflow = torch.zeros(1, dtype=torch.int32, device=tensors.q[0].device)
        self._axpby = lambda *arguments: multi_tensor_applier(amp_C.multi_tensor_axpby, self._overflow, *arguments)

    @torch.no_grad()
    def __call__(self, grads: list[Tensor], lr: Tensor, nonfinite: Tensor, scale: Tensor | None) -> None:
        """Advance all tensors, in place."""
        torch._foreach_copy_(self._grads, grads)
        bad = torch.zeros((), device=nonfinite.device)
        unscale = torch.ones_like(bad) if scale is None else scale.reciprocal()
        torch._amp_foreach_non_finite_check_and_unscale_(self._grads, bad, unscale)
        nonfinite.copy_(bad)
        if bad.item():
            return
        self._optimizer.param_groups[0]["lr"] = lr.item()
        self._optimizer.step()
        m, (q, k) = self.recipe.ema_momentum, (list(self._tensors.q), list(self._tensors.k))
        if k:
            self._axpby([q, k, k], 1 - m, m, -1)
        _cast(self._casts)


BACKENDS: dict[str, Callable[[Tensors, Recipe], Callable]] = {
    "fused": FusedUpdate,
    "torch": TorchUpdate,
    "apex": ApexUpdate,
}


class _Casts(NamedTuple):
    copies: list[Tensor]
    masters: list[Tensor]


def _casts(tensors: Tensors) -> _Casts:
    pairs = zip((*tensors.q_work, *tensors.k_work), (*tensors.q, *tensors.k), strict=True)
    apart = [(work.detach(), master) for work, master in pairs if work.data_ptr() != master.data_ptr()]
    return _Casts([work for work, _ in apart], [master for _, master in apart])


def _cast(casts: _Casts) -> None:
    if casts.copies:
        torch._foreach_copy_(casts.copies, casts.masters)


def _own_gradients(tensors: Tensors) -> list[Tensor]:
    grads = [torch.empty_like(q) for q in tensors.q]
    for q, grad in zip(tensors.q, grads, strict=True):
        q.grad = grad
    return grads


def _give_velocity(optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
    # The velocity is part of the state that Step saves, so the optimiser must use ours and not one of its own.
    for q, velocity in zip(tensors.q, tensors.velocity, strict=True):
        optimizer.state[q]["momentum_buffer"] = velocity
