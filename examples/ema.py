"""A multi-tensor EMA for any student and teacher: BYOL, DINO, Mean Teacher, MoCo, timm's ModelEmaV3.

teacher <- m teacher + (1 - m) student over all parameters in one launch on a GPU, where a loop launches two or more for
each. Run this file to see the average beside the loop.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fastmoco.kernels import TensorTable, ema


class Teacher(nn.Module):
    """A frozen copy of `student` that follows it: call `follow` after each step of the optimiser.

    Parameters are averaged. Buffers are averaged, too, where they are floats ("average", as timm does), copied ("copy",
    as Mean Teacher's code and torch's swa_utils do by default), or left alone ("keep", as MoCo, BYOL and DINO do,
    whose teachers have batch-norm statistics of their own). Integers are copied unless they are kept.
    """

    def __init__(self, student: nn.Module, buffers: str = "keep") -> None:
        super().__init__()
        if buffers not in ("average", "copy", "keep"):
            raise ValueError(f"buffers is {buffers!r}: use average, copy or keep")
        self.module = copy.deepcopy(student).requires_grad_(False)
        averaged, copied = [*student.parameters()], []
        ours, ours_copied = [*self.module.parameters()], []
        if buffers != "keep":
            for theirs, mine in zip(student.buffers(), self.module.buffers(), strict=True):
                moves = buffers == "average" and theirs.is_floating_point()
                (averaged if moves else copied).append(theirs)
                (ours if moves else ours_copied).append(mine)
        self._table = TensorTable.averaging(averaged, ours)
        self._copied = (ours_copied, copied)

    @torch.no_grad()
    def follow(self, momentum: float | Tensor) -> None:
        """Move towards the student; `momentum` is a number, or one in a tensor on the device, never read back."""
        ema(self._table, momentum)
        for mine, theirs in zip(*self._copied, strict=True):
            mine.copy_(theirs)

    def forward(self, *inputs: Any) -> Any:
        """What the teacher's module gives."""
        return self.module(*inputs)


def model_ema_v3() -> type:
    """A ModelEmaV3 of timm with the kernel in place of its foreach: a class with the same arguments and state_dict.

    For models and averages in fp32 on one device; others go timm's way. Parameters must stay where they are (a later
    `.to(device)` or `.half()` makes new ones: build the average after that, as timm asks, too).
    """
    from timm.utils import ModelEmaV3

    class FusedModelEmaV3(ModelEmaV3):
        table: TensorTable | None = None

        def apply_update_(self, model: nn.Module, decay: float) -> None:
            ours, theirs = list(self.module.state_dict().values()), list(model.state_dict().values())
            moving = [i for i, value in enumerate(ours) if value.is_floating_point()]
            if any(value.dtype != torch.float32 for i in moving for value in (ours[i], theirs[i])) or not self.foreach:
                super().apply_update_(model, decay)
                return
            if self.table is None:
                self.table = TensorTable.averaging([theirs[i] for i in moving], [ours[i] for i in moving])
            ema(self.table, decay)
            for mine, other in zip(ours, theirs, strict=True):
                if not mine.is_floating_point():
                    mine.copy_(other)

    return FusedModelEmaV3


def main() -> None:
    """Ten steps of a small student, followed by the kernel and by a loop."""
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 32))
    teacher, loop = Teacher(student), copy.deepcopy(student)
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    for _ in range(10):
        optimizer.zero_grad()
        student(torch.randn(16, 64)).square().mean().backward()
        optimizer.step()
        teacher.follow(0.99)
        with torch.no_grad():
            for mine, theirs in zip(loop.parameters(), student.parameters(), strict=True):
                mine.mul_(0.99).add_(theirs, alpha=0.01)
    pairs = zip(teacher.module.parameters(), loop.parameters(), strict=True)
    print(f"largest difference after ten steps: {max((a - b).abs().max().item() for a, b in pairs):.1e}")


if __name__ == "__main__":
    main()
