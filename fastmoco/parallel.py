"""Ranks, devices and every collective of a run.

A single process needs no launcher: without `WORLD_SIZE` there is one rank, and every collective is the identity. With
several ranks only RANK, LOCAL_RANK and WORLD_SIZE are read here; torch reads the address of the rendezvous, which
torchrun sets. All ranks must call each collective, in the same order.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastmoco import environment

# Renamed in torch 2.13; the older name warns there.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
START_TIMEOUT = timedelta(minutes=10)  # the first step compiles kernels and warms the file cache, unevenly over ranks


@dataclass(frozen=True)
class Parallel:
    """This process among the ranks of a run. `Parallel()` is a single process on the CPU."""

    rank: int = 0
    local_rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")

    @classmethod
    def start(cls, device: str = "auto", timeout: timedelta = START_TIMEOUT) -> Parallel:
        """Join the run that the environment describes, or stand alone; raises ValueError if the device cannot be had.

        `device` is "auto" (a GPU where there is one), "cpu", "cuda" or "cuda:N"; "cuda" takes GPU number LOCAL_RANK.
        """
        rank, local_rank, world = (
            int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
        )
        place = cls.alone(device, local_rank).device
        if world > 1:
            on_gpu = place.type == "cuda"
            dist.init_process_group(
                "nccl" if on_gpu else "gloo",
                store=_meeting_point(rank, world, timeout),
                rank=rank,
                world_size=world,
                timeout=timeout,
                device_id=place if on_gpu else None,
            )
        return cls(rank, local_rank, world, place)

    @classmethod
    def alone(cls, device: str = "auto", gpu: int | None = None) -> Parallel:
        """A single process, whatever launcher started it; "cuda" is GPU number `gpu`, or the current one.

        Raises ValueError if the device cannot be had.
        """
        place = _device(device, gpu)
        if place.type == "cuda":
            torch.cuda.set_device(place)
        else:
            environment.keep_memory()
        return cls(device=place)

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that prints and writes."""
        return self.rank == 0

    def start_all_gather(self, rows: Tensor) -> Callable[[], Tensor]:
        """Begin gathering `rows` [M, D] of every rank; the returned call waits and gives [G*M, D] in rank order.

        On a GPU the wait is a dependency between streams, so work queued between the two runs beside the transfer.
        """
        if self.world == 1:
            return lambda: rows
        gathered = rows.new_empty(self.world * rows.shape[0], *rows.shape[1:])
        work = _all_gather(gathered, rows.contiguous(), async_op=True)

        def wait() -> Tensor:
            work.wait()
            return gathered

        return wait

    def all_gather(self, rows: Tensor) -> Tensor:
        """Rows [M, D] of every rank, one after another in rank order: [G*M, D]."""
        return self.start_all_gather(rows)()

    def exchange(self, rows: Tensor, send_counts: Sequence[int], recv_counts: Sequence[int]) -> Tensor:
        """Send the first `send_counts[0]` rows to rank 0, the next to rank 1, and so on; return what arrives, by rank.

        Any dtype: the key crops travel as uint8, a quarter of the bytes of fp32 images.
        """
        if self.world == 1:
            return rows
        incoming = rows.new_empty(sum(recv_counts), *rows.shape[1:])
        dist.all_to_all_single(incoming, rows.contiguous(), list(recv_counts), list(send_counts))
        return incoming

    def mean(self, value: Tensor) -> Tensor:
        """Mean of `value` over the ranks, as a new tensor."""
        total = value.clone()
        if self.world > 1:
            dist.all_reduce(total)
        return total / self.world

    def any(self, flag: bool) -> bool:
        """Whether any rank says so. Reads back to the host: call it between steps, not inside one."""
        if self.world == 1:
            return bool(flag)
        votes = torch.tensor(int(flag), dtype=torch.int32, device=self.device)
        dist.all_reduce(votes, dist.ReduceOp.MAX)
        return bool(votes.item())

    def gather_objects(self, value: Any) -> list[Any]:
        """What each rank holds, in rank order: plain data or arrays of any size. Not for the inside of a step."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Return when every rank has come here."""
        if self.world > 1:
            dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def set_timeout(self, timeout: timedelta) -> None:
        """Let a collective fail after `timeout` from now on: short, once the slow first step is behind all ranks."""
        if self.world > 1:
            # A rank still in its first step must not be judged by the new limit.
            self.barrier()
            dist.distributed_c10d._set_pg_timeout(timeout, dist.group.WORLD)

    def close(self, failed: bool = False) -> None:
        """Leave the run; harmless when called twice or by a single process.

        `failed`: without waiting for what other ranks have not joined, which a rank that failed will never see done.
        """
        if self.world == 1 or not dist.is_initialized():
            return
        if failed and self.device.type == "cuda":
            dist.distributed_c10d._abort_process_group()
        else:
            dist.destroy_process_group()

    def __enter__(self) -> Parallel:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)


def _meeting_point(rank: int, world: int, timeout: timedelta) -> dist.Store:
    # torchrun's store outlives a restart: without a prefix a rank may read where another one listened before it died.
    # Over machines the count of restarts may differ; there launch.py asks for a new store each time.
    store, _, _ = next(dist.rendezvous("env://", rank, world, timeout=timeout))
    store.set_timeout(timeout)
    one_machine = os.environ.get("LOCAL_WORLD_SIZE") == str(world)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if one_machine else "any"
    return dist.PrefixStore(f"attempt {attempt}", store)


def _device(name: str, gpu: int | None) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device is {name!r}: use auto, cpu, cuda or cuda:N") from error
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise ValueError(f"device is {name!r}: use auto, cpu, cuda or cuda:N")
    index = device.index if device.index is not None else gpu
    if index is None:
        index = torch.cuda.current_device() if torch.cuda.is_available() else 0
    if index >= torch.cuda.device_count():
        raise ValueError(f"device is {name!r}, but this machine has {torch.cuda.device_count()} GPUs: use --device cpu")
    return torch.device("cuda", index)
