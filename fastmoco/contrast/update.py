"""Numbers of the encoders, and the update: fp32 masters, low-precision working copies, one pass over both.

The optimiser moves fp32 masters; the encoders compute with casts of them. Batch-norm parameters are small and stay
fp32, so there, and everywhere in fp32, the working copy is the master itself. The key masters must be fp32: in bf16 a
step of (1 - m) = 0.001 towards the query rounds to nothing.
"""

from __future__ import annotations

from functools import partial
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from fastmoco.contrast.backends import BACKENDS, Backend
from fastmoco.contrast.lars import Lars
from fastmoco.encoder import Encoder
from fastmoco.kernels.convolution import instructions
from fastmoco.kernels.tensor_table import Tensors
from fastmoco.recipe import Recipe

Precision = Literal["fp32", "tf32", "bf16", "fp16", "fp64"]

# torch.amp.GradScaler's constants.
FIRST_SCALE, LARGEST_SCALE, GROWTH_INTERVAL = 2.0**16, 2.0**24, 2000


class Numbers(NamedTuple):
    """Types that a precision stands for."""

    work: torch.dtype
    master: torch.dtype = torch.float32
    tf32: bool = False
    scaled: bool = False


PRECISIONS: dict[Precision, Numbers] = {
    "fp32": Numbers(torch.float32),
    "tf32": Numbers(torch.float32, tf32=True),
    "bf16": Numbers(torch.bfloat16),
    "fp16": Numbers(torch.float16, scaled=True),
    "fp64": Numbers(torch.float64, master=torch.float64),  # for parity tests
}


def resolve_precision(precision: str, device: torch.device) -> Precision:
    """`precision` with "auto" resolved: bf16 on a GPU or CPU that has it, fp16 on an older GPU, fp32 on another CPU.

    A CPU has it with AVX-512 bf16 or AMX. Three seeds of two runs showed no loss of accuracy there (bench/NOTES.md).
    Raises ValueError on another name.
    """
    if precision != "auto":
        for name in PRECISIONS:
            if name == precision:
                return name
        raise ValueError(f"precision is {precision!r}: use auto, fp32, tf32, bf16 or fp16")
    if device.type != "cuda":
        return "fp32" if instructions() == "none" else "bf16"
    return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"


class LossScale:
    """Dynamic loss scale that never leaves the device (Micikevicius et al., 2018).

    `value` fp32 [] multiplies the loss; it halves after an overflow and doubles after GROWTH_INTERVAL steps without.
    """

    def __init__(self, device: torch.device) -> None:
        self.value = torch.full((), FIRST_SCALE, device=device)
        self.good_steps = torch.zeros((), dtype=torch.int32, device=device)

    def advance(self, overflow: Tensor) -> None:
        """Take in whether this step's gradients overflowed, bool []."""
        self.good_steps.add_(1).masked_fill_(overflow, 0)
        grown = self.good_steps == GROWTH_INTERVAL
        self.good_steps.masked_fill_(grown, 0)
        self.value.mul_(1 + grown - 0.5 * overflow).clamp_(1, LARGEST_SCALE)


class Update:
    """SGD or LARS, as the recipe says, on the query encoder, and the momentum update of the key encoder, if any.

    Casts the encoders' convolutions and linear layers to `numbers.work`, in place, and keeps their masters: `q`,
    `velocity` and `k`, by parameter name; without a key encoder `k` is empty. `lr` [] and `nonfinite` int32 [1] live on
    the device; nothing is reallocated. `backend` chooses who does it; raises UsageError if apex is missing.
    """

    def __init__(
        self,
        encoder_q: Encoder,
        encoder_k: Encoder | None,
        recipe: Recipe,
        numbers: Numbers,
        backend: Backend = "fused",
    ) -> None:
        self._parameters = list(encoder_q.parameters())
        key_parameters = [] if encoder_k is None else list(encoder_k.parameters())
        device = self._parameters[0].device
        self.q = _take_masters(encoder_q, numbers)
        self.k = {} if encoder_k is None else _take_masters(encoder_k, numbers)
        self.velocity = {name: torch.zeros_like(master) for name, master in self.q.items()}
        self._work = [*self._parameters, *key_parameters]
        q, velocity, k = (list(tensors.values()) for tensors in (self.q, self.velocity, self.k))
        tensors = Tensors(q, velocity, k, self._parameters, key_parameters)
        make = partial(Lars, BACKENDS[backend]) if recipe.optimizer == "lars" else BACKENDS[backend]
        self._advance = make(tensors, recipe)
        self.lr = torch.zeros((), dtype=numbers.master, device=device)
        self.nonfinite = torch.zeros(1, dtype=torch.int32, device=device)
        self.scale = LossScale(device) if numbers.scaled else None

    def backward(self, loss: Tensor) -> None:
        """Gradients of `loss`, into `.grad` of the query encoder's parameters, multiplied by the loss scale."""
        for parameter in self._parameters:
            parameter.grad = None
        (loss if self.scale is None else loss * self.scale.value).backward()

    def apply(self) -> Tensor:
        """Move all masters and working copies by the gradients at hand; bool [], whether none was infinite or NaN.

        Where one was, nothing moves but the loss scale.
        """
        self.nonfinite.zero_()
        grads = [cast(Tensor, parameter.grad) for parameter in self._parameters]
        self._advance(grads, self.lr, self.nonfinite, None if self.scale is None else self.scale.value)
        overflow = self.nonfinite[0] > 0
        if self.scale is not None:
            self.scale.advance(overflow)
        return ~overflow

    def refresh(self) -> None:
        """Cast the masters to the working copies, after the masters were set from outside."""
        for work, master in zip(self._work, [*self.q.values(), *self.k.values()], strict=True):
            if work.data_ptr() != master.data_ptr():
                work.data.copy_(master)


def _take_masters(encoder: Encoder, numbers: Numbers) -> dict[str, Tensor]:
    encoder.to(numbers.master)
    masters = {name: parameter.detach() for name, parameter in encoder.named_parameters()}
    if numbers.work != numbers.master:
        for module in encoder.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.to(numbers.work)
    return masters
