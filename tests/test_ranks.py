"""The same run on one, two and four ranks, from JPEG files to weights; and the published algorithm over four ranks.

Ranks only change the order in which gradients and batch-norm sums are added. In float64 that is noise of 1e-16, which
thirty steps of training amplify by some powers of ten; anything else that differed would show at 1e-3 or more.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastmoco.contrast.queue as queue_module
import fastmoco.contrast.step as step_module
from fastmoco.contrast.step import Step
from fastmoco.data.loader import Batch, Loader
from fastmoco.data.manifest import scan
from fastmoco.data.plan import Plan
from fastmoco.kernels import reference
from fastmoco.parallel import Parallel
from fastmoco.recipe import Recipe

STEPS, LR, SIZE = 30, 0.03, 16
RECIPE = Recipe(
    arch="resnet18", width=0.0625, stem="cifar", head="mlp", dim=16, batch_size=16, bn_group=4, crop_size=SIZE,
    queue_size=40, temperature=0.2,
)  # fmt: skip
WORLDS = (1, 2, 4)
FLOAT64_BOUND = 1e-10
"""Losses were seen to part by 1e-15 and weights by 2e-13; the controls part by a tenth."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 JPEG files of many sizes: three batches an epoch."""
    folder = tmp_path_factory.mktemp("jpeg")
    random = np.random.RandomState(0)
    for number in range(48):
        coarse = Image.fromarray(random.randint(0, 256, (4, 5, 3)).astype(np.uint8))
        coarse.resize(tuple(random.randint(20, 48, 2)), Image.BICUBIC).save(folder / f"{number:02d}.jpg")
    return folder


@pytest.fixture(scope="module")
def known() -> dict:
    """Runs that several tests look at."""
    return {}


def in_float64() -> None:
    """These kernels refuse float64; their twins take it. Only for forked ranks: nothing is put back."""
    step_module.info_nce = reference.info_nce
    queue_module.enqueue = reference.enqueue


def train(parallel: Parallel, recipe: Recipe, folder: Path, steps: int = STEPS, precision: str = "fp64") -> dict:
    if precision == "fp64":
        in_float64()
    images = scan(folder, cache=False)
    plan = Plan(recipe, images.sizes, parallel.world, parallel.rank)
    step, losses, batches = Step(recipe, parallel, precision), [], []
    with Loader(images, plan, recipe, parallel, stop_step=steps, threads=1) as loader:
        for batch in loader:
            batches.append(copy.deepcopy(batch))
            losses.append(parallel.mean(step.step(batch, LR).loss))
    return {"losses": torch.stack(losses), "batches": batches, "state": copy.deepcopy(step.state())}


def once(known: dict, run_ranks: Callable, world: int, folder: Path, *args: object) -> list[dict]:
    key = (world, *args)
    if key not in known:
        known[key] = run_ranks(world, train, RECIPE, folder, *args)
    return known[key]


def key_batch(batch: Batch, tensor: Tensor) -> Tensor:
    placed = torch.empty_like(tensor)
    placed[batch.key_rows] = tensor
    return placed


@pytest.mark.parametrize("world", WORLDS[1:])
def test_order_boxes_and_draws_do_not_know_the_number_of_ranks(
    world: int, known: dict, run_ranks: Callable, folder: Path
) -> None:
    """Every pixel and parameter that an encoder sees, in the order it sees them."""
    (alone,), ranks = (once(known, run_ranks, count, folder) for count in (1, world))
    for number, whole in enumerate(alone["batches"]):
        parts = [result["batches"][number] for result in ranks]
        assert [part.step for part in parts] == [number] * world
        np.testing.assert_array_equal(np.concatenate([part.sample for part in parts]), whole.sample)
        for name in ("query_crops", "query_parameters"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
        for name in ("key_crops", "key_parameters"):
            gathered = torch.cat([key_batch(part, getattr(part, name)) for part in parts])
            assert torch.equal(gathered, key_batch(whole, getattr(whole, name))), f"{name} of step {number}"
    shuffled = [key_batch(batch, batch.key_crops) for batch in alone["batches"][:2]]
    assert not torch.equal(*shuffled)


@pytest.mark.parametrize("world", WORLDS[1:])
def test_thirty_steps_differ_by_rounding_alone(world: int, known: dict, run_ranks: Callable, folder: Path) -> None:
    """Losses, and the state at the end: weights, velocity, running statistics, queue in the same order, pointer."""
    (alone,), ranks = (once(known, run_ranks, count, folder) for count in (1, world))
    for result in ranks:
        torch.testing.assert_close(result["losses"], alone["losses"], rtol=FLOAT64_BOUND, atol=0)
        for name, value in result["state"].items():
            expected = alone["state"][name]
            torch.testing.assert_close(value, expected, rtol=FLOAT64_BOUND, atol=FLOAT64_BOUND, msg=name)
            assert torch.equal(value, ranks[0]["state"][name]), f"{name} differs between ranks"
    pointer, count = (int(alone["state"][f"queue_{name}"]) for name in ("pointer", "count"))
    assert (pointer, count) == (STEPS * 16 % 40, STEPS * 16)


@pytest.mark.parametrize("change", [{"shuffle_bn": False}, {"bn_group": 8}], ids=["no shuffle", "groups by rank"])
def test_other_statistics_are_another_run(change: dict, known: dict, run_ranks: Callable, folder: Path) -> None:
    """Controls of the test above: keys not shuffled, and two ranks that take statistics over all they hold."""
    (alone,) = once(known, run_ranks, 1, folder)
    ranks = run_ranks(2, train, replace(RECIPE, **change), folder, 6)
    assert (ranks[0]["losses"] - alone["losses"][:6]).abs().max() > 1e-3


def test_fp32_strays_by_its_own_rounding_and_repeats_bit_for_bit(
    known: dict, run_ranks: Callable, folder: Path
) -> None:
    """fp32 has 2^29 times the rounding of float64, amplified alike; the same ranks again give the same bits."""
    (alone,) = once(known, run_ranks, 1, folder)
    first, again = (run_ranks(2, train, RECIPE, folder, 12, "fp32") for _ in range(2))
    torch.testing.assert_close(first[0]["losses"].double(), alone["losses"][:12], rtol=1e-3, atol=0)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a["losses"], b["losses"])
        assert [name for name, value in a["state"].items() if not torch.equal(value, b["state"][name])] == []
