"""The same run on one, two and four ranks, from JPEG files to weights; and the published algorithm over four ranks.

Ranks only change the order in which gradients and batch-norm sums are added. In float64 that is noise of 1e-16, which
thirty steps of training amplify by some powers of ten; anything else that differed would show at 1e-3 or more.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from oracle import PlainResNet18, contrastive_loss, enqueue, momentum_update
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastmoco.parallel as parallel_module
from fastmoco.bench.traffic import WAYS, traffic
from fastmoco.contrast.build import BUFFERS
from fastmoco.contrast.step import Step
from fastmoco.data.batch import Batch
from fastmoco.data.loader import Loader, Loading
from fastmoco.data.manifest import scan
from fastmoco.data.plan import Plan
from fastmoco.kernels import reference
from fastmoco.parallel import Parallel
from fastmoco.presets import PRESETS
from fastmoco.recipe import Recipe

STEPS, LR, SIZE = 30, 0.03, 16
RECIPE = Recipe(
    arch="resnet18",
    width=0.0625,
    stem="cifar",
    head="mlp",
    dim=16,
    batch_size=16,
    bn_group=4,
    crop_size=SIZE,
    queue_size=40,
    temperature=0.2,
)
SMALL = {"arch": "resnet18", "width": 0.0625, "stem": "cifar", "dim": 16, "batch_size": 16, "crop_size": SIZE}
OTHERS = {
    "end-to-end": replace(PRESETS["end-to-end"][1], **SMALL, bn_group=4),
    "simclr": replace(PRESETS["simclr-cifar"][1], **SMALL),
    "bank": replace(PRESETS["bank"][1], **SMALL, bn_group=4, queue_size=40),
}
# At SimCLR's temperature for ImageNet, a fifth of that for CIFAR-10, rounding grows tenfold a step: fewer of them.
COLD, COLD_STEPS = "simclr, T 0.1", 4
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
def runs() -> dict:
    """Runs that several tests look at."""
    return {}


def train(parallel: Parallel, recipe: Recipe, folder: Path, steps: int = STEPS, precision: str = "fp64") -> dict:
    images = scan(folder, cache=False)
    plan = Plan(recipe, images.sizes, parallel.world, parallel.rank)
    step, losses, batches = Step(recipe, parallel, precision, images=len(images)), [], []
    rate = LR if recipe.optimizer == "sgd" else 0.1
    with Loader(images, plan, parallel, range(steps), Loading(threads=1)) as loader:
        for batch in loader:
            batches.append(copy.deepcopy(batch))
            losses.append(parallel.mean(step.step(batch, rate).loss))
    return {"losses": torch.stack(losses), "batches": batches, "state": copy.deepcopy(step.state())}


def once(runs: dict, run_ranks: Callable, world: int, folder: Path, *args: object) -> list[dict]:
    key = (world, *args)
    if key not in runs:
        runs[key] = run_ranks(world, train, RECIPE, folder, *args)
    return runs[key]


def key_batch(batch: Batch, tensor: Tensor) -> Tensor:
    placed = torch.empty_like(tensor)
    placed[batch.key_rows] = tensor
    return placed


@pytest.mark.parametrize("world", WORLDS[1:])
def test_order_boxes_and_draws_do_not_know_the_number_of_ranks(
    world: int, runs: dict, run_ranks: Callable, folder: Path
) -> None:
    """Every pixel and parameter that an encoder sees, in the order it sees them."""
    (alone,), ranks = (once(runs, run_ranks, count, folder) for count in (1, world))
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
def test_thirty_steps_differ_by_rounding_alone(world: int, runs: dict, run_ranks: Callable, folder: Path) -> None:
    """Losses, and the state at the end: weights, velocity, running statistics, queue in the same order, pointer."""
    (alone,), ranks = (once(runs, run_ranks, count, folder) for count in (1, world))
    for result in ranks:
        torch.testing.assert_close(result["losses"], alone["losses"], rtol=FLOAT64_BOUND, atol=0)
        for name, value in result["state"].items():
            expected = alone["state"][name]
            torch.testing.assert_close(value, expected, rtol=FLOAT64_BOUND, atol=FLOAT64_BOUND, msg=name)
            assert torch.equal(value, ranks[0]["state"][name]), f"{name} differs between ranks"
    pointer, count = (int(alone["state"][f"queue_{name}"]) for name in ("pointer", "count"))
    assert (pointer, count) == (STEPS * 16 % 40, STEPS * 16)


# The other dictionaries


@pytest.mark.parametrize("world", WORLDS[1:])
@pytest.mark.parametrize("name", [*OTHERS, COLD])
def test_no_dictionary_knows_the_number_of_ranks(name: str, world: int, run_ranks: Callable, folder: Path) -> None:
    """Shuffled groups, batch norm over all ranks, an entry for each image: ten steps in more than three epochs."""
    recipe, steps = OTHERS.get(name, OTHERS["simclr"]), 10
    if name == COLD:
        recipe, steps = replace(recipe, temperature=PRESETS["simclr"][1].temperature), COLD_STEPS
    (alone,), ranks = (run_ranks(count, train, recipe, folder, steps) for count in (1, world))
    for result in ranks:
        torch.testing.assert_close(result["losses"], alone["losses"], rtol=FLOAT64_BOUND, atol=0)
        assert result["state"].keys() == alone["state"].keys()
        for key, value in result["state"].items():
            torch.testing.assert_close(
                value, alone["state"][key], rtol=FLOAT64_BOUND, atol=FLOAT64_BOUND, msg=f"{name}: {key}"
            )
            assert torch.equal(value, ranks[0]["state"][key]), f"{key} differs between ranks"
    assert (alone["losses"][0] - alone["losses"][-1]).abs() > 1e-3


def first_gradient(parallel: Parallel, recipe: Recipe, folder: Path, without_columns: bool) -> dict:
    """Loss and gradient of one step; `without_columns`: what other rows pull at a row is lost, as by a plain gather."""
    if without_columns:
        reference.nt_xent_columns = lambda z, *_: torch.zeros_like(z)
    images = scan(folder, cache=False)
    step = Step(recipe, parallel, "fp64")
    plan = Plan(recipe, images.sizes, parallel.world, parallel.rank)
    with Loader(images, plan, parallel, range(1), Loading(threads=1)) as loader:
        loss = parallel.mean(step.step(next(loader), 0.0).loss)
    return {"loss": loss, "gradient": torch.cat([each.grad.flatten() for each in step.encoder_q.parameters()])}


@pytest.mark.parametrize("name", ["end-to-end", "simclr"])
def test_a_gather_without_gradient_shows_in_the_gradients_length_alone(
    name: str, run_ranks: Callable, folder: Path
) -> None:
    """Control: the loss is the same to its last digit and the direction nearly so."""
    (alone,) = run_ranks(1, first_gradient, OTHERS[name], folder, False)
    right, wrong = (run_ranks(2, first_gradient, OTHERS[name], folder, broken)[0] for broken in (False, True))
    torch.testing.assert_close(right["gradient"], alone["gradient"], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(wrong["loss"], alone["loss"], rtol=FLOAT64_BOUND, atol=0)
    assert not 0.95 < wrong["gradient"].norm() / alone["gradient"].norm() < 1.05


@pytest.mark.parametrize("change", [{"shuffle_bn": False}, {"bn_group": 8}], ids=["no shuffle", "groups by rank"])
def test_other_statistics_are_another_run(change: dict, runs: dict, run_ranks: Callable, folder: Path) -> None:
    """Controls of the test above: keys not shuffled, and two ranks that take statistics over all they hold."""
    (alone,) = once(runs, run_ranks, 1, folder)
    ranks = run_ranks(2, train, replace(RECIPE, **change), folder, 6)
    assert (ranks[0]["losses"] - alone["losses"][:6]).abs().max() > 1e-3


def test_fp32_strays_by_its_own_rounding_and_repeats_bit_for_bit(runs: dict, run_ranks: Callable, folder: Path) -> None:
    """fp32 has 2^29 times the rounding of float64, amplified alike; the same ranks again give the same bits."""
    (alone,) = once(runs, run_ranks, 1, folder)
    first, again = (run_ranks(2, train, RECIPE, folder, 12, "fp32") for _ in range(2))
    torch.testing.assert_close(first[0]["losses"].double(), alone["losses"][:12], rtol=1e-3, atol=0)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a["losses"], b["losses"])
        assert [name for name, value in a["state"].items() if not torch.equal(value, b["state"][name])] == []


# The published algorithm, with collectives of its own


class PublishedMoCo(nn.Module):
    """One GPU of the published algorithm: idx_shuffle is broadcast, whole float images and keys are gathered."""

    def __init__(self, start: dict[str, Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self.encoder_q, self.encoder_k = (PlainResNet18(4, RECIPE.dim).to(dtype) for _ in range(2))
        for side in ("encoder_q.", "encoder_k."):
            values = {name.removeprefix(side): value for name, value in start.items() if name.startswith(side)}
            getattr(self, side[:-1]).load_state_dict(values)
        self.encoder_k.requires_grad_(False)
        self.register_buffer("queue", start["queue"].to(dtype).T.clone())
        self.register_buffer("queue_ptr", start["queue_pointer"].clone())

    @staticmethod
    def gather(rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @torch.no_grad()
    def keys_of(self, im_k: Tensor, order: Tensor) -> Tensor:
        """Keys of this GPU's images, encoded wherever the permutation `order` (known to rank 0) sends them."""
        rank, gpus = dist.get_rank(), dist.get_world_size()
        images, idx_shuffle = self.gather(im_k), order.clone()
        dist.broadcast(idx_shuffle, src=0)
        idx_unshuffle = torch.argsort(idx_shuffle)
        k = F.normalize(self.encoder_k(images[idx_shuffle.view(gpus, -1)[rank]]), dim=1)
        return self.gather(k)[idx_unshuffle.view(gpus, -1)[rank]]

    def forward(self, im_q: Tensor, im_k: Tensor, order: Tensor) -> Tensor:
        q = F.normalize(self.encoder_q(im_q), dim=1)
        momentum_update(self.encoder_k.parameters(), self.encoder_q.parameters(), RECIPE.ema_momentum)
        k = self.keys_of(im_k, order)
        loss = contrastive_loss(q, k, self.queue, RECIPE.temperature)
        self.queue_ptr.fill_(enqueue(self.queue, int(self.queue_ptr), self.gather(k)))
        return loss


class Wire:
    """Counts the bytes that this rank receives in each collective, as torch.distributed is asked for them."""

    def __init__(self) -> None:
        self.received: dict[str, int] = {}

    def note(self, name: str, count: int) -> None:
        self.received[name] = self.received.get(name, 0) + count

    @contextmanager
    def listen(self) -> Iterator[None]:
        gather, exchange, broadcast = dist.all_gather, dist.all_to_all_single, dist.broadcast
        whole, coalesced, rank = parallel_module._all_gather, dist._broadcast_coalesced, dist.get_rank()

        def all_gather(parts: list[Tensor], rows: Tensor) -> None:
            self.note("float images" if rows.dim() == 4 else "keys", (len(parts) - 1) * rows.nbytes)
            gather(parts, rows)

        def all_gather_whole(out: Tensor, rows: Tensor, **options: object) -> object:
            if rows.dim() == 2 and rows.shape[1] == RECIPE.dim:
                self.note("keys", out.nbytes - rows.nbytes)
            return whole(out, rows, **options)

        def all_to_all(out: Tensor, rows: Tensor, counts: list[int], send: list[int]) -> None:
            self.note("crops", sum(counts[:rank] + counts[rank + 1 :]) * out[0].nbytes)
            exchange(out, rows, counts, send)

        def broadcast_one(value: Tensor, src: int) -> None:
            self.note("permutation", value.nbytes)
            broadcast(value, src=src)

        def broadcast_many(group: object, values: list[Tensor], *rest: object) -> None:
            self.note("buffers", sum(value.nbytes for value in values))
            coalesced(group, values, *rest)

        dist.all_gather, dist.broadcast, dist._broadcast_coalesced = all_gather, broadcast_one, broadcast_many
        parallel_module._all_gather, dist.all_to_all_single = all_gather_whole, all_to_all
        yield
        dist.all_gather, dist.broadcast, dist._broadcast_coalesced = gather, broadcast, coalesced
        parallel_module._all_gather, dist.all_to_all_single = whole, exchange

    def gradients(self, _: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """DDP's hook for one bucket: the mean over ranks, counted."""
        self.note("gradients", bucket.buffer().nbytes)
        work = dist.all_reduce(bucket.buffer(), async_op=True)
        return work.get_future().then(lambda done: done.value()[0] / dist.get_world_size())


def train_published(parallel: Parallel, folder: Path, steps: int, dtype: torch.dtype, buffers: bool) -> dict:
    """Losses, keys and statistics of the published way and of ours, fed alike, and the bytes of both."""
    precision = "fp64" if dtype == torch.float64 else "fp32"
    images, wires = scan(folder, cache=False), (Wire(), Wire())
    plan, whole_plan = (Plan(RECIPE, images.sizes, world, rank) for world, rank in ((4, parallel.rank), (1, 0)))
    ours = Step(RECIPE, parallel, precision)
    start = {name: value.clone() for name, value in ours.state().items()}
    model = DistributedDataParallel(PublishedMoCo(start, dtype), **{BUFFERS: buffers})
    optimizer = torch.optim.SGD(
        model.module.encoder_q.parameters(), LR, RECIPE.sgd_momentum, weight_decay=RECIPE.weight_decay
    )
    ours._query.register_comm_hook(None, wires[0].gradients)
    model.register_comm_hook(None, wires[1].gradients)
    mine, losses = slice(parallel.rank * 4, parallel.rank * 4 + 4), []
    with Loader(images, whole_plan, Parallel(), range(steps), Loading(threads=1)) as loader:
        alone = list(loader)
    with Loader(images, plan, parallel, range(steps), Loading(threads=1)) as loader:
        for step in range(steps):
            with wires[0].listen():
                loss = ours.step(next(loader), LR).loss
            im_q, im_k = (float_views(alone[step], side, mine, dtype) for side in ("query", "key"))
            optimizer.zero_grad()
            with wires[1].listen():
                theirs = model(im_q, im_k, torch.from_numpy(whole_plan.shuffle(step, 1)))
                theirs.backward()
            optimizer.step()
            losses.append((float(loss), float(theirs)))
    statistics = {name: value for name, value in model.module.named_buffers() if "running" in name}
    return {
        "losses": losses,
        "queues": (ours.dictionary.queue.keys, model.module.queue.T.clone()),
        "ours": {name: value.clone() for name, value in ours.state().items() if "running" in name},
        "theirs": {name: parallel.mean(value) for name, value in statistics.items()},
        "bytes": [wire.received for wire in wires],
    }


def float_views(batch: Batch, side: str, rows: slice, dtype: torch.dtype) -> Tensor:
    colours = RECIPE.augmentation
    crops, parameters = (getattr(batch, f"{side}_{what}")[rows] for what in ("crops", "parameters"))
    return reference.photometric(crops, parameters, colours.mean, colours.std, dtype=dtype).contiguous()


def test_four_published_gpus_give_the_same_keys_and_statistics(run_ranks: Callable, folder: Path) -> None:
    """Their ranks keep statistics of their own, of which ours are the mean; DDP's copying of buffers is left out."""
    for result in run_ranks(4, train_published, folder, 6, torch.float64, False):
        ours, theirs = zip(*result["losses"], strict=True)
        np.testing.assert_allclose(ours, theirs, rtol=FLOAT64_BOUND)
        torch.testing.assert_close(*result["queues"], rtol=0, atol=FLOAT64_BOUND)
        assert result["theirs"].keys() == result["ours"].keys() and len(result["ours"]) > 70
        for name, value in result["ours"].items():
            torch.testing.assert_close(value, result["theirs"][name], rtol=1e-9, atol=1e-9, msg=name)


def test_bytes_on_the_wire_are_those_of_the_traffic_model(run_ranks: Callable, folder: Path) -> None:
    """Both ways over four ranks in fp32; which crops leave a rank is drawn, and twelve steps come near the mean."""
    steps, world = 12, 4
    results = run_ranks(world, train_published, folder, steps, torch.float32, True)
    ours, theirs = ([result["bytes"][way] for result in results] for way in (0, 1))
    model = {way: {flow.name: flow.total for flow in traffic(RECIPE, way, world, gradient_bytes=4)} for way in WAYS}
    others = 2 * (world - 1) / world  # what a ring makes of each byte that is to be summed
    for counted in theirs:
        assert counted["float images"] == steps * model["published"]["all-gather of float images"]
        assert counted["permutation"] == steps * model["published"]["broadcast of the permutation"]
        keys = [value for name, value in model["published"].items() if "keys" in name]
        assert counted["keys"] == steps * sum(keys)
        assert counted["buffers"] == steps * model["published"]["broadcast of buffers, queue among them"]
        assert counted["gradients"] * others == steps * model["published"]["all-reduce of gradients"]
    for counted in ours:
        assert counted["keys"] == steps * model["fastmoco"]["all-gather of keys, for both"]
        assert counted["gradients"] * others == steps * model["fastmoco"]["all-reduce of gradients"]
    crops, images = sum(counted["crops"] for counted in ours), sum(counted["float images"] for counted in theirs)
    assert crops == pytest.approx(world * steps * model["fastmoco"]["exchange of uint8 crops"], rel=0.1)
    assert crops <= 1.1 * images / 4 / world


def count_bytes(parallel: Parallel, recipe: Recipe, folder: Path, steps: int) -> dict:
    """Bytes that this rank receives in `steps` steps: all that is gathered, and crops."""
    wire, gathered, whole = Wire(), [], parallel_module._all_gather
    images = scan(folder, cache=False)
    step = Step(recipe, parallel, "fp32", images=len(images))
    plan = Plan(recipe, images.sizes, parallel.world, parallel.rank)

    def all_gather_whole(out: Tensor, rows: Tensor, **options: object) -> object:
        gathered.append(out.nbytes - rows.nbytes)
        return whole(out, rows, **options)

    with Loader(images, plan, parallel, range(steps), Loading(threads=1)) as loader, wire.listen():
        parallel_module._all_gather = all_gather_whole
        for batch in loader:
            step.step(batch, LR)
    return {"gathered": sum(gathered), "crops": wire.received.get("crops", 0)}


@pytest.mark.parametrize("name", OTHERS)
def test_gathers_of_the_other_dictionaries_are_those_of_the_traffic_model(
    name: str, run_ranks: Callable, folder: Path
) -> None:
    """Embeddings and normalisers, or queries and their numbers; statistics of batch norm; crops where keys move."""
    steps, world = 6, 2
    flows = {flow.name: flow.total for flow in traffic(OTHERS[name], "fastmoco", world, gradient_bytes=4)}
    gathers = sum(total for flow, total in flows.items() if flow.startswith(("all-gather", "statistics")))
    results = run_ranks(world, count_bytes, OTHERS[name], folder, steps)
    assert {result["gathered"] for result in results} == {steps * gathers}
    crops = flows.get("exchange of uint8 crops", 0)
    assert sum(result["crops"] for result in results) == pytest.approx(world * steps * crops, rel=0.2)
    assert bool(crops) == (name == "end-to-end")
