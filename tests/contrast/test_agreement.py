"""Ranks that part are found and named; ranks that agree are left in peace."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from fastmoco.contrast import agreement
from fastmoco.contrast.agreement import DisagreementError, compare, digest, plan_digest
from fastmoco.contrast.step import Step
from fastmoco.data.plan import Plan
from fastmoco.parallel import Parallel
from fastmoco.recipe import Recipe

RECIPE = Recipe(
    arch="resnet18", width=0.0625, stem="cifar", dim=16, batch_size=16, bn_group=4, crop_size=12, queue_size=40
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.float64])
def test_one_changed_bit_or_two_swapped_rows_change_the_digest(dtype: torch.dtype) -> None:
    value = (100 * torch.rand(30, 7, generator=torch.Generator().manual_seed(0))).to(dtype)
    whole = int(digest(value))
    assert int(digest(value.clone())) == whole
    bits = value.clone().view(agreement.BITS[value.element_size()])
    bits[17, 3] ^= 1
    assert int(digest(bits.view(dtype))) != whole
    assert int(digest(value[torch.tensor([1, 0, *range(2, 30)])])) != whole
    assert int(digest(value, value[:1])) != int(digest(value[:1], value))


def test_every_chunk_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "CHUNK", 8)
    value = torch.arange(30)
    digests = {int(digest(value + (torch.arange(30) == i))) for i in range(30)} | {int(digest(value))}
    assert len(digests) == 31


def test_the_plan_is_hashed_whole() -> None:
    def of(step: int = 0, rank: int = 0, side: int = 64, **fields: object) -> int:
        recipe = Recipe(**{**RECIPE.as_dict(), "augmentation": RECIPE.augmentation, **fields})
        return plan_digest(Plan(recipe, np.full((48, 2), side, np.int32), 2, rank), step)

    assert of() == of(rank=1)
    others = [of(1), of(side=65), of(seed=1), of(shuffle_bn=False), of(batch_size=8)]
    assert len({of(), *others}) == 6


def with_one_changed_key(parallel: Parallel, make_batch: Callable, culprit: int, what: str) -> str:
    step = Step(RECIPE, parallel, "fp32")
    plan = Plan(RECIPE, np.full((48, 2), 64, np.int32), parallel.world, parallel.rank)
    for number in range(2):
        step.step(make_batch(RECIPE, number, parallel.world, parallel.rank), 0.03)
        agreement.check(step, plan, number)
    if parallel.rank == culprit:
        if what == "queue":
            step.dictionary.queue.keys[7, 3] += 2.0**-20
        if what == "queue pointer":
            step.dictionary.queue.pointer += 1
        if what == "query encoder":
            step.update.q["fc.weight"][0, 0] += 1e-3
        if what == "precision":
            step.precision = "bf16"
        if what == "plan":
            plan.sizes[plan.samples(2)[0]] += 16
    try:
        agreement.check(step, plan, 2)
    except DisagreementError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("what", ["nothing", "precision", "queue", "queue pointer", "query encoder", "plan"])
def test_a_rank_with_one_changed_key_is_named_by_all(what: str, run_ranks: Callable, make_batch: Callable) -> None:
    message = run_ranks(4, with_one_changed_key, make_batch, 2, what)
    expected = "" if what == "nothing" else f"{what}: rank 2 differs from rank 0: "
    assert all(text.startswith(expected) for text in message)
    # A run that goes on would find the same processors.
    assert all(("--precision fp32 or bf16" in text) == (what == "precision") for text in message)
    assert all(("--resume" in text) == (what not in ("nothing", "precision")) for text in message)
    assert (what == "nothing") == (set(message) == {""})


def differing(parallel: Parallel, values: list[int]) -> str:
    with pytest.raises(DisagreementError) as error:
        compare(parallel, {"fine": 7, "thing": values[parallel.rank]})
    return str(error.value).split(":")[1]


def test_without_a_majority_the_first_rank_is_believed(run_ranks: Callable) -> None:
    assert run_ranks(2, differing, [1, 2]) == [" rank 1 differs from rank 0"] * 2
    assert run_ranks(3, differing, [1, 2, 2]) == [" rank 0 differs from rank 1"] * 3
    compare(Parallel(), {"thing": 1})
