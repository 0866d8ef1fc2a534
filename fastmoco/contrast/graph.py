"""The step as one CUDA graph: captured once, replayed with a single launch.

A step of ResNet-50 is about two thousand kernels; at 32 pairs a GPU the host cannot launch them as fast as they run.
The learning rate and every schedule live on the device, and batches are copied into the buffers that the graph reads.
Capture before DALI first runs: its threads allocate memory as they like, and an allocation may spoil a capture.
"""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fastmoco.contrast.backends import Backend
from fastmoco.contrast.step import Metrics, Step
from fastmoco.options import UsageError

if TYPE_CHECKING:
    from fastmoco.data.batch import Batch

GraphMode = Literal["auto", "on", "off"]
Runner = Callable[["Batch", float], Metrics]

_open: weakref.WeakSet[GraphStep] = weakref.WeakSet()

WARMUP = 3  # steps before the capture: kernels are compiled and cuDNN has chosen its algorithms
WARMUP_RANKS = 11  # with several ranks torch asks for so many, until DDP has settled its buckets


class CaptureError(UsageError):
    """A step that has run could not be captured as a CUDA graph; the message says why and what to do."""


class GraphStep:
    """`step.step` as a CUDA graph. `batch` gives the shapes; the state of `step` is afterwards what it was.

    On a CPU it does everything but the capture. Batches must have the shapes of the first one. `pool` is the memory
    of another graph that is never replayed at the same time (torch.cuda.graph_pool_handle). With several
    ranks, close it before the process group is destroyed (`closed_at_the_end` does): NCCL's shutdown waits for every
    graph that contains a collective.
    """

    def __init__(self, step: Step, batch: Batch, pool: tuple[int, int] | None = None) -> None:
        self._step, self._pool = step, pool
        copies: dict[str, Any] = {name: value.clone() for name, value in _tensors(batch).items()}
        self._batch = dataclasses.replace(batch, **copies)
        self._inputs = list(_tensors(self._batch).values())
        self._graph: torch.cuda.CUDAGraph | None = None
        self._metrics: Metrics | None = None
        _open.add(self)
        stream = step.capture_stream
        if stream is not None:
            with step.rehearsal():
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    for _ in range(WARMUP if step.parallel.world == 1 else WARMUP_RANKS):
                        step.advance(self._batch)
                torch.cuda.current_stream().wait_stream(stream)
                self._graph = captured(self._advance, stream, self._pool)

    def step(self, batch: Batch, lr: float) -> Metrics:
        """Train on `batch` with learning rate `lr`. On a GPU the next step overwrites the metrics: copy them before."""
        inputs = list(_tensors(batch).values())
        if [value.shape for value in inputs] != [value.shape for value in self._inputs]:
            raise ValueError("a captured step takes batches of one shape: the one it was captured with")
        torch._foreach_copy_(self._inputs, inputs)
        self._step.update.lr.fill_(lr)
        if self._graph is None:
            return self._step.advance(self._batch)
        self._graph.replay()
        assert self._metrics is not None, "the capture made them"
        return self._metrics

    def close(self) -> None:
        """Free the graph and its memory; no step after that. Harmless when called twice."""
        self._metrics = None
        if self._graph is not None:
            self._graph.reset()

    def _advance(self) -> None:
        self._metrics = self._step.advance(self._batch)


def runner(
    step: Step,
    make_batch: Callable[[], Batch],
    mode: GraphMode = "auto",
    update: Backend = "fused",
    pool: tuple[int, int] | None = None,
) -> Runner:
    """The call that trains one step: a CUDA graph's, captured with `make_batch()`, or `step.step` itself.

    "auto" captures on a GPU. "on" raises UsageError where that cannot be: on a CPU, and with apex's update, which takes
    its learning rate from the host. Raises CaptureError if a capture fails: torch then keeps the graph's memory
    for good, and other ranks may have captured. An error of a step itself is raised as it is.
    """
    on_gpu, fixed = step.capture_stream is not None, update == "apex"
    if mode == "on" and not on_gpu:
        raise UsageError("--graph on needs a GPU: use --graph auto")
    if mode == "on" and fixed:
        raise UsageError("--graph on does not go with --update apex, which takes its learning rate from the host")
    if mode == "off" or not on_gpu or fixed:
        return step.step
    return GraphStep(step, make_batch(), pool).step


@contextmanager
def closed_at_the_end() -> Iterator[None]:
    """Close every graph when the block ends, however it ends."""
    try:
        yield
    finally:
        for each in list(_open):
            each.close()


def captured(
    call: Callable[[], object], stream: torch.cuda.Stream, pool: tuple[int, int] | None = None
) -> torch.cuda.CUDAGraph:
    """The graph of `call` on `stream`, where it has run before; raises CaptureError if it cannot be captured.

    Graphs of one stream and one `pool` that never run at the same time share their memory.
    """
    graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        # Other threads (NCCL's watchdog, the progress bar) may call CUDA meanwhile.
        with (
            _no_collection(),
            torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),  # type: ignore[arg-type]
        ):
            call()
    except RuntimeError as error:
        torch.cuda.set_stream(current)  # torch leaves the capture's stream the current one where ending it fails
        if isinstance(error, torch.OutOfMemoryError):
            raise  # without a graph it would need as much
        raise CaptureError(f"the step could not be captured as a CUDA graph ({error}): use --graph off") from error
    return graph


@contextmanager
def _no_collection() -> Iterator[None]:
    # A graph that the garbage collector frees during a capture spoils it.
    gc.collect()
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _tensors(batch: Batch) -> dict[str, Tensor]:
    return {name: value for name, value in vars(batch).items() if isinstance(value, Tensor)}
