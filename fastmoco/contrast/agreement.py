"""Whether all ranks hold the same queue, weights and plan: one checksum of each, compared now and then.

Nothing but gradients and keys is ever exchanged, so a rank that parts from the others (another set of files, a bit
that flipped, a kernel that raced) would train on unnoticed, against a queue of its own.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from fastmoco.contrast.step import Step
from fastmoco.contrast.update import PRECISIONS
from fastmoco.data.plan import Plan
from fastmoco.parallel import Parallel

CHECK_EVERY = 1000  # steps; reading the answer back then costs less than one of them
GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # 2^64 over the golden ratio, which is odd, as int64
CHUNK = 1 << 20
REMEDY = "look at the machine and at the files it reads, then repeat the command with --resume"
REMEDIES = {"precision": "their processors choose differently: start the run with --precision fp32 or bf16"}
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class DisagreementError(ValueError):
    """Ranks that must hold the same hold different things."""

    exit_code = 1


def digest(*values: Tensor) -> Tensor:
    """Checksum of all bits in their order, int64 [] on the device, without a sync.

    Each element is weighted by an odd number modulo 2^64, so one changed element always shows; any other difference
    goes unnoticed with a chance of about 2^-64.
    """
    device = values[0].device
    weights = torch.arange(1, 2 * CHUNK, 2, device=device) * GOLDEN
    total = torch.zeros((), dtype=torch.int64, device=device)
    for value in values:
        bits = value.detach().reshape(-1).view(BITS[value.element_size()])
        for chunk in bits.split(CHUNK):
            total = total * GOLDEN + (chunk.long() * weights[: len(chunk)]).sum()
    return total


def plan_digest(plan: Plan, step: int) -> int:
    """Checksum of everything that the plan says about the global batch of `step`: samples, boxes, draws, shuffles."""
    epoch, samples = plan.epoch(step), plan.samples(step)
    parts = [np.array(plan.sizes.shape), samples]
    parts += [draw(epoch, samples, view) for view in (0, 1) for draw in (plan.boxes, plan.photometric)]
    parts += [plan.shuffle(step, view) for view in plan.key_views]
    return bytes_digest(*(part.tobytes() for part in parts))


def bytes_digest(*parts: bytes) -> int:
    """The first 63 bits of a hash of all `parts`."""
    whole = hashlib.blake2b(digest_size=8)
    for part in parts:
        whole.update(part)
    return int.from_bytes(whole.digest(), "little") >> 1


def compare(parallel: Parallel, facts: Mapping[str, Tensor | int]) -> None:
    """Raise DisagreementError on every rank if one of `facts` (int64 [] each) is not the same on all of them.

    The error names ranks that differ from most, or from the first where there is no majority. All ranks call it.
    """
    if parallel.world == 1:
        return
    row = torch.stack([torch.as_tensor(fact, dtype=torch.int64, device=parallel.device) for fact in facts.values()])
    table = parallel.all_gather(row[None]).tolist()
    for name, column in zip(facts, zip(*table, strict=True), strict=True):
        usual, _ = Counter(column).most_common(1)[0]
        odd = [str(rank) for rank, value in enumerate(column) if value != usual]
        if odd:
            those = f"rank {odd[0]} differs" if len(odd) == 1 else f"ranks {', '.join(odd)} differ"
            remedy = REMEDIES.get(name, REMEDY)
            raise DisagreementError(f"{name}: {those} from rank {column.index(usual)}: {remedy}")


def check(step: Step, plan: Plan, at: int) -> None:
    """Raises DisagreementError if precision, dictionary, weights, velocity or plan of step `at` differ.

    All ranks call this.
    """
    if step.parallel.world == 1:
        return
    update = step.update
    facts: dict[str, Tensor | int] = {"precision": list(PRECISIONS).index(step.precision)}  # of "auto", what a rank has
    facts |= {name.replace("_", " "): digest(value) for name, value in step.dictionary.tensors().items()}
    groups = {"query encoder": update.q, "key encoder": update.k, "velocity": update.velocity}
    facts |= {name: digest(*group.values()) for name, group in groups.items() if group}
    compare(step.parallel, facts | {"plan": plan_digest(plan, at)})
