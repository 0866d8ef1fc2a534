"""The memory bank against a few lines of numpy, step by step; what it leaves alone; another number of images."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastmoco.contrast.step import Step
from fastmoco.data.draws import BANK_STREAM, hash_words
from fastmoco.options import UsageError
from fastmoco.parallel import Parallel
from fastmoco.presets import PRESETS

IMAGES = 48
RECIPE = replace(
    PRESETS["bank"][1],
    arch="resnet18",
    width=0.125,
    stem="cifar",
    dim=16,
    batch_size=16,
    bn_group=4,
    crop_size=12,
    queue_size=30,
)
LR = 0.03


def bank_step(**fields: object) -> Step:
    return Step(replace(RECIPE, **fields), Parallel(), "fp64", images=IMAGES)


def projections(step: Step, batch: object) -> Tensor:
    """What the query encoder makes of the batch, statistics as in training; only they move."""
    views = step.dictionary.views(batch)
    return step.encoder_q(views)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def draw(step: int, count: int = 30) -> np.ndarray:
    words = hash_words(RECIPE.seed, BANK_STREAM, step, np.arange(count))
    return ((words >> np.uint64(1)) % np.uint64(IMAGES)).astype(np.int64)


def expected(
    q: np.ndarray, bank: np.ndarray, ids: np.ndarray, step: int, temperature: float
) -> tuple[float, list[int]]:
    """InfoNCE against the own entry and the drawn ones but the own, row by row; and the ranks."""
    losses, ranks, choice = [], [], draw(step)
    for row, own in zip(q, ids, strict=True):
        negatives = bank[choice[choice != own]] @ row
        positive = bank[own] @ row
        losses.append(np.log(np.exp(negatives / temperature).sum() + np.exp(positive / temperature)))
        losses[-1] -= positive / temperature
        ranks.append(int((negatives > positive).sum()))
    return float(np.mean(losses)), ranks


def test_ten_steps_by_hand(make_batch: Callable) -> None:
    """The loss, which rows change and to what; the others keep their bits."""
    step = bank_step()
    bank = step.dictionary.bank.numpy().copy()
    np.testing.assert_allclose(np.linalg.norm(bank, axis=1), 1, rtol=1e-6)
    for number in range(10):
        batch = make_batch(step.recipe, number)
        before = step.statistics.snapshot()
        q = unit(projections(step, batch).detach().numpy())
        step.statistics.flat.copy_(before)
        ids = batch.sample
        loss, ranks = expected(q, bank, ids, number, step.recipe.temperature)
        metrics = step.step(batch, LR)
        np.testing.assert_allclose(metrics.loss.item(), loss, rtol=1e-9)
        assert metrics.top1.item() == pytest.approx(100 * np.mean(np.array(ranks) == 0))
        bank[ids] = unit(0.5 * bank[ids] + 0.5 * q)
        others = np.setdiff1d(np.arange(IMAGES), ids)
        np.testing.assert_allclose(step.dictionary.bank.numpy(), bank, rtol=1e-9, atol=1e-12)
        assert np.array_equal(step.dictionary.bank.numpy()[others], bank[others])
        bank = step.dictionary.bank.numpy().copy()
    assert int(step.state()["bank_steps"]) == 10


def test_an_own_entry_among_the_negatives_is_left_out(make_batch: Callable) -> None:
    """The control: 30 draws of 48 images hit samples of the batch, and with them the loss would be higher."""
    step, batch = bank_step(), make_batch(RECIPE, 0)
    assert np.isin(batch.sample, draw(0)).any()
    bank = step.dictionary.bank.clone()
    q = F.normalize(projections(step, batch).detach(), dim=1)
    negatives = q @ bank[torch.from_numpy(draw(0))].T
    positive = (q * bank[torch.from_numpy(batch.sample)]).sum(1, keepdim=True)
    logits = torch.cat([positive, negatives], 1) / RECIPE.temperature
    with_own = F.cross_entropy(logits, torch.zeros(16, dtype=torch.long))
    loss, _ = expected(q.numpy(), bank.numpy(), batch.sample, 0, RECIPE.temperature)
    assert with_own.item() > loss + 1e-3


@pytest.mark.parametrize("keys", [IMAGES, 100])
def test_where_more_would_be_drawn_than_there_are_all_entries_are_negatives(keys: int, make_batch: Callable) -> None:
    """The softmax over the whole bank, of which the own entry is the positive."""
    step, batch = bank_step(queue_size=keys), make_batch(RECIPE, 0)
    bank = step.dictionary.bank.clone()
    q = F.normalize(projections(step, batch).detach(), dim=1)
    expected = F.cross_entropy(q @ bank.T / RECIPE.temperature, torch.from_numpy(batch.sample))
    torch.testing.assert_close(step.step(batch, LR).loss, expected)
    assert replace(RECIPE, queue_size=keys).for_images(IMAGES).queue_size == IMAGES
    assert RECIPE.for_images(IMAGES) == replace(RECIPE, order="table")


def test_a_substitute_is_written_at_its_own_place_and_the_last_one_counts(make_batch: Callable) -> None:
    step, batch = bank_step(), make_batch(RECIPE, 0)
    batch.origins = batch.origins.clone()
    lost = [int(batch.origins[2]), int(batch.origins[5])]
    substitute = int(batch.origins[9])
    batch.origins[[2, 5]] = substitute
    before = step.dictionary.bank.clone()
    entries = F.normalize(torch.randn(16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), dim=1)
    step.dictionary.commit(entries, batch)
    after = step.dictionary.bank
    assert torch.equal(after[lost], before[lost])
    torch.testing.assert_close(after[substitute], F.normalize(0.5 * before[substitute] + 0.5 * entries[9], dim=0))
    again = bank_step()
    again.dictionary.commit(entries, batch)
    assert torch.equal(again.dictionary.bank, after)


def test_a_row_that_is_not_finite_leaves_no_trace(make_batch: Callable) -> None:
    step, batch = bank_step(), make_batch(RECIPE, 0)
    entries = torch.randn(16, 16, dtype=torch.float64)
    entries[3, 5] = float("nan")
    before = step.dictionary.bank.clone()
    step.dictionary.commit(F.normalize(entries, dim=1), batch)
    changed = (step.dictionary.bank != before).any(1)
    assert step.dictionary.bank.isfinite().all()
    assert not changed[batch.origins[3]] and int(changed.sum()) == 15


def test_it_goes_on_bit_for_bit_and_refuses_other_images(make_batch: Callable) -> None:
    runs = [Step(RECIPE, Parallel(), images=IMAGES) for _ in range(2)]
    for number in range(3):
        runs[0].step(make_batch(RECIPE, number), LR)
    runs[1].load({name: value.clone() for name, value in runs[0].state().items()})
    for number in (3, 4):
        losses = [run.step(make_batch(RECIPE, number), LR).loss for run in runs]
        assert torch.equal(*losses)
    for name, value in runs[0].state().items():
        assert torch.equal(value, runs[1].state()[name]), name
    with pytest.raises(UsageError, match="the bank holds 48 images, the data 50"):
        Step(RECIPE, Parallel(), images=50).load(runs[0].state())
    with pytest.raises(ValueError, match="say how many"):
        Step(RECIPE, Parallel())


def test_there_is_one_view_and_no_key_encoder(make_batch: Callable) -> None:
    step, batch = bank_step(), make_batch(RECIPE, 0)
    assert step.encoder_k is None and len(batch.key_crops) == 0 and len(batch.query_crops) == 16
    assert step.dictionary.bank.dtype == torch.float64
    low = Step(RECIPE, Parallel(), "bf16", images=IMAGES)
    assert low.dictionary.bank.dtype == torch.float32
    for number in range(2):
        assert low.step(make_batch(RECIPE, number), LR).loss.isfinite()
