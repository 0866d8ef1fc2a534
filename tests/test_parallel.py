"""Collectives of a single process and of forked gloo ranks, and the choice of device."""

import os
import time
from contextlib import nullcontext
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from fastmoco.parallel import Parallel


@pytest.fixture
def lonely(monkeypatch: pytest.MonkeyPatch) -> Parallel:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return Parallel.start("cpu")


def test_a_single_process_needs_no_launcher(lonely: Parallel) -> None:
    assert (lonely.rank, lonely.local_rank, lonely.world, lonely.is_main) == (0, 0, 1, True)
    rows = torch.arange(6).view(3, 2)
    assert torch.equal(lonely.all_gather(rows), rows)
    assert torch.equal(lonely.exchange(rows, [3], [3]), rows)
    assert torch.equal(lonely.mean(torch.tensor(2.5)), torch.tensor(2.5))
    assert lonely.any(True) and not lonely.any(False)
    lonely.barrier()
    lonely.set_timeout(timedelta(seconds=1))
    lonely.close()
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("device", "failing", "end"),
    [
        ("cuda", True, "abort"),
        ("cuda", False, "destroy"),
        ("cpu", True, "destroy"),
        ("cpu", False, "destroy"),
    ],
)
def test_a_rank_that_failed_waits_for_nobody(
    device: str, failing: bool, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL's orderly end waits for collectives that the other ranks may never see done."""
    ends: list[str] = []
    monkeypatch.setattr(dist, "is_initialized", lambda: not ends)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: ends.append("destroy"))
    monkeypatch.setattr(dist.distributed_c10d, "_abort_process_group", lambda: ends.append("abort"))
    with pytest.raises(KeyError) if failing else nullcontext(), Parallel(0, 0, 2, torch.device(device, 0)) as parallel:
        if failing:
            raise KeyError
    parallel.close()
    assert ends == [end]


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "mps", ""])
def test_an_unknown_device_is_named(name: str) -> None:
    with pytest.raises(ValueError, match="use auto, cpu, cuda or cuda:N"):
        Parallel.start(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_gpu_is_said_and_auto_does_without() -> None:
    with pytest.raises(ValueError, match="this machine has 0 GPUs: use --device cpu"):
        Parallel.start("cuda")
    assert Parallel.start("auto").device == torch.device("cpu")


def every_collective(parallel: Parallel) -> dict:
    rank, world = parallel.rank, parallel.world
    mine = torch.arange(4).view(2, 2) + 10 * rank
    # Rank r sends r + 1 rows to rank 0 and one to each other.
    send = [rank + 1] + [1] * (world - 1)
    rows = torch.full((sum(send), 3), rank, dtype=torch.uint8)
    receive = [r + 1 for r in range(world)] if rank == 0 else [1] * world
    wait = parallel.start_all_gather(mine.T)  # not contiguous
    return {
        "later": wait(),
        "gathered": parallel.all_gather(mine),
        "half": parallel.all_gather(mine.to(torch.bfloat16)),
        "exchanged": parallel.exchange(rows, send, receive),
        "mean": parallel.mean(torch.tensor([float(rank), 1.0])),
        "any": [parallel.any(rank == 1), parallel.any(False)],
    }


@pytest.mark.parametrize("world", [2, 3])
def test_collectives_over_ranks(run_ranks, world: int) -> None:
    results = run_ranks(world, every_collective)
    each = [torch.arange(4).view(2, 2) + 10 * rank for rank in range(world)]
    for rank, result in enumerate(results):
        assert torch.equal(result["gathered"], torch.cat(each))
        assert torch.equal(result["half"], torch.cat(each).to(torch.bfloat16))
        assert torch.equal(result["later"], torch.cat([rows.T for rows in each]))
        sources = [r for r in range(world) for _ in range(r + 1 if rank == 0 else 1)]
        assert result["exchanged"][:, 0].tolist() == sources
        assert result["mean"].tolist() == [(world - 1) / 2, 1.0]
        assert result["any"] == [True, False]


def fail_on_rank_1(parallel: Parallel) -> None:
    if parallel.rank == 1:
        raise RuntimeError("as asked")


def test_a_failing_rank_fails_the_test(run_ranks) -> None:
    with pytest.raises(AssertionError, match="as asked"):
        run_ranks(2, fail_on_rank_1)


def meet(address: str, rank: int, attempt: int, queue: object) -> None:
    host, port = address.split(":")
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE="2",
        LOCAL_WORLD_SIZE="2",
        MASTER_ADDR=host,
        MASTER_PORT=port,
        TORCHELASTIC_RESTART_COUNT=str(attempt),
        TORCHELASTIC_USE_AGENT_STORE="True",
    )
    time.sleep(rank)  # rank 0 looks first, and finds what the attempt before it left
    parallel = Parallel.start("cpu", timedelta(seconds=10))
    queue.put(float(parallel.mean(torch.tensor(float(rank)))))
    os._exit(0)  # like a killed process, nothing is tidied up


def test_a_restart_meets_in_a_store_that_remembers_the_first_attempt() -> None:
    context = torch.multiprocessing.get_context("fork")
    server = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for attempt in (0, 1):
        queue = context.SimpleQueue()
        address = f"127.0.0.1:{server.port}"
        ranks = [context.Process(target=meet, args=(address, rank, attempt, queue)) for rank in (0, 1)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(30)
        assert [process.exitcode for process in ranks] == [0, 0], f"attempt {attempt}"
        assert [queue.get(), queue.get()] == [0.5, 0.5]
