"""The captured step is the step: the same numbers, from its own buffers, with the state untouched by the capture."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import TINY
from torch import Tensor

from fastmoco.bench.proof import STRAY, differences
from fastmoco.contrast import build, graph
from fastmoco.contrast.algorithms import algorithms
from fastmoco.contrast.graph import CaptureError, GraphStep, closed_at_the_end, runner
from fastmoco.contrast.step import Step
from fastmoco.data.batch import Batch
from fastmoco.data.noise import noise_batch
from fastmoco.options import UsageError
from fastmoco.parallel import Parallel
from fastmoco.recipe import Recipe

RECIPE = Recipe(**TINY)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def switches_put_back(device: torch.device) -> Iterator[None]:
    """Steps set cuDNN's switches for the whole process."""
    with algorithms(device, False):
        yield


def rate(i: int) -> float:
    return 0.03 / (i + 1)


def place(make_batch: Callable, recipe: Recipe, i: int, device: torch.device) -> Batch:
    moved = {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in vars(make_batch(recipe, i)).items()
    }
    return Batch(**moved)


def copies(step: Step) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in step.state().items()}


def assert_runs_alike(make_batch: Callable, recipe: Recipe, precision: str, steps: int, **options: object) -> None:
    """`steps` steps through the wrapper and without it: metrics and final state, bit for bit.

    With `--deterministic on`: some of cuDNN's other algorithms add up the gradient of weights in any order.
    """
    options = {"deterministic": True, **options}
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    parallel = Parallel(device=device)
    plain, wrapped = (Step(recipe, parallel, precision, **options) for _ in range(2))
    captured = GraphStep(wrapped, noise_batch(recipe, parallel))
    for i in range(steps):
        batch = place(make_batch, recipe, i, device)
        expected = [value.clone() for value in plain.step(batch, rate(i))]
        ours = [value.clone() for value in captured.step(batch, rate(i))]
        assert all(torch.equal(a, b) for a, b in zip(expected, ours, strict=True)), f"step {i}"
    expected, ours = plain.state(), wrapped.state()
    assert [name for name in expected if not torch.equal(expected[name], ours[name])] == []


@pytest.mark.parametrize(
    "fields", [{}, {"symmetric": True, "head": "mlp"}, {"optimizer": "lars"}], ids=["plain", "symmetric", "lars"]
)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_wrapper_equals_the_step_bit_for_bit(precision: str, fields: dict, make_batch: Callable) -> None:
    assert_runs_alike(make_batch, dataclasses.replace(RECIPE, **fields), precision, 3)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
@pytest.mark.parametrize("options", [{}, {"key_stream": True}, {"update": "torch"}], ids=["plain", "stream", "torch"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_twenty_replays_equal_twenty_steps_bit_for_bit(
    precision: str, options: dict, optimizer: str, make_batch: Callable
) -> None:
    assert_runs_alike(make_batch, dataclasses.replace(RECIPE, optimizer=optimizer), precision, 20, **options)


@pytest.mark.gpu
@needs_gpu
def test_with_the_fastest_algorithms_replays_stray_no_further_than_steps_do(make_batch: Callable) -> None:
    """What training runs unless it is told to be deterministic: two runs may differ, a graph adds nothing to that.

    Two of each kind: in a step as small as this one, two eager runs are often alike by chance.
    """
    parallel = Parallel(device=torch.device("cuda", 0))
    eager, replayed = [], []
    for results, wrapped in ((eager, False), (replayed, True)) * 2:
        step = Step(RECIPE, parallel, "bf16")
        advance = GraphStep(step, noise_batch(RECIPE, parallel)).step if wrapped else step.step
        for i in range(20):
            advance(place(make_batch, RECIPE, i, parallel.device), rate(i))
        results.append(copies(step))
    (_, between_eager), (_, between_replayed), (_, apart) = (
        differences(*pair) for pair in (eager, replayed, (eager[0], replayed[0]))
    )
    assert apart <= STRAY * max(between_eager, between_replayed)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("mode", ["on", "off"])
def test_a_hundred_steps_wait_for_nothing(mode: str, make_batch: Callable) -> None:
    parallel = Parallel(device=torch.device("cuda", 0))
    step = Step(RECIPE, parallel, "bf16")
    advance = runner(step, lambda: noise_batch(RECIPE, parallel), mode)
    batch = place(make_batch, RECIPE, 0, parallel.device)
    advance(batch, 0.03)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for i in range(100):
            metrics = advance(batch, rate(i))
        with pytest.raises(RuntimeError):
            metrics.loss.item()  # the control: reading is noticed
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert metrics.loss.isfinite()


def test_a_rehearsal_leaves_no_trace(make_batch: Callable) -> None:
    for precision in ("fp32", "fp16"):
        step = Step(RECIPE, Parallel(), precision)
        step.step(make_batch(RECIPE, 0), 0.03)
        before, work = copies(step), [p.clone() for p in step.encoder_k.parameters()]
        with step.rehearsal():
            step.step(make_batch(RECIPE, 1), 0.03)
            changed = [name for name, value in step.state().items() if not torch.equal(value, before[name])]
            assert len(changed) > len(before) // 2
        assert all(torch.equal(value, before[name]) for name, value in step.state().items())
        assert all(torch.equal(a, b) for a, b in zip(work, step.encoder_k.parameters(), strict=True))


def test_the_caller_may_reuse_its_batch(make_batch: Callable) -> None:
    """The wrapper trains from buffers of its own: what was handed over may be overwritten while a replay runs."""
    batch = place(make_batch, RECIPE, 0, torch.device("cpu"))
    captured = GraphStep(Step(RECIPE, Parallel()), batch)
    taken = {name: value.data_ptr() for name, value in vars(captured._batch).items() if isinstance(value, Tensor)}
    captured.step(batch, 0.03)
    assert all(value.data_ptr() != taken[name] for name, value in vars(batch).items() if name in taken)
    assert taken == {name: getattr(captured._batch, name).data_ptr() for name in taken}


def test_another_shape_is_refused(make_batch: Callable) -> None:
    captured = GraphStep(Step(RECIPE, Parallel()), noise_batch(RECIPE, Parallel()))
    with pytest.raises(ValueError, match="one shape"):
        captured.step(noise_batch(dataclasses.replace(RECIPE, batch_size=12), Parallel()), 0.03)


def test_the_graph_is_refused_where_it_cannot_be() -> None:
    step, batch = Step(RECIPE, Parallel()), lambda: noise_batch(RECIPE, Parallel())
    assert runner(step, batch, "auto") == step.step == runner(step, batch, "off")
    with pytest.raises(UsageError, match="needs a GPU"):
        runner(step, batch, "on")
    step.capture_stream = object()
    with pytest.raises(UsageError, match="apex"):
        runner(step, batch, "on", "apex")
    assert runner(step, batch, "auto", "apex") == step.step


class FakeCuda:
    """Stands for torch.cuda while something is captured, whose end fails as cudaStreamEndCapture does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Exception | None) -> None:
        self.current, self.error = "the stream before", error
        monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
        for name in ("current_stream", "set_stream", "graph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    def current_stream(self) -> str:
        return self.current

    def set_stream(self, stream: str) -> None:
        self.current = stream

    @contextmanager
    def graph(self, graph: object, *, stream: str, **_: object) -> Iterator[None]:
        self.current = stream
        yield
        if self.error is not None:
            raise self.error  # before the stream is put back, as in torch
        self.current = "the stream before"


def test_a_failed_capture_ends_with_a_line_and_leaves_the_stream_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch, RuntimeError("operation not permitted"))
    with pytest.raises(CaptureError, match="not permitted.*use --graph off") as error:
        graph.captured(lambda: None, "the capture's")
    assert cuda.current == "the stream before" and error.value.exit_code == 2
    cuda.error = torch.OutOfMemoryError("no room")  # which a step without a graph would meet again
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        graph.captured(lambda: None, "the capture's")
    assert cuda.current == "the stream before"
    cuda.error = None  # the control
    graph.captured(lambda: None, "the capture's")
    assert cuda.current == "the stream before"


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("mode", ["auto", "on"])
def test_nothing_goes_on_without_the_graph_unasked(monkeypatch: pytest.MonkeyPatch, mode: str, world: int) -> None:
    """A graph that failed keeps its memory, and another rank may have captured. Errors of the step are the step's."""
    step, batch = SimpleNamespace(capture_stream=object(), parallel=Parallel(world=world)), SimpleNamespace
    for error in (CaptureError("not captured"), RuntimeError("no C compiler")):

        def fails(*_: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(graph, "GraphStep", fails)
        with pytest.raises(type(error), match=str(error)):
            runner(step, batch, mode)


class OneGraph:
    """Stands for a CUDA graph that was captured, and counts how often it is freed."""

    def __init__(self) -> None:
        self.freed = 0

    def reset(self) -> None:
        self.freed += 1


def test_every_graph_is_freed_when_the_block_ends(make_batch: Callable) -> None:
    """However it ends: NCCL would wait for ever for a graph that lives on, here in the frame that failed."""
    captured = OneGraph()
    with pytest.raises(KeyError), closed_at_the_end():
        graph = GraphStep(Step(RECIPE, Parallel()), noise_batch(RECIPE, Parallel()))
        graph._graph = captured
        assert captured.freed == 0
        raise KeyError
    assert captured.freed == 1 and graph._metrics is None


def test_all_steps_of_a_device_capture_on_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory freed on one stream is never used by another, so graphs of several streams share no pool."""
    monkeypatch.setattr("torch.cuda.Stream", lambda device: object())
    first, second, keys = (build.stream(torch.device("cuda", 7), use) for use in ("capture", "capture", "keys"))
    assert first is second and first is not keys


@pytest.mark.parametrize("fields", [{}, {"symmetric": True}], ids=["plain", "symmetric"])
def test_a_noise_batch_has_the_shapes_of_a_real_one(fields: dict, make_batch: Callable) -> None:
    recipe = dataclasses.replace(RECIPE, **fields)
    for world in (1, 2):
        real = vars(make_batch(recipe, 0, world, world - 1))
        for name, value in vars(noise_batch(recipe, Parallel(world - 1, 0, world))).items():
            if isinstance(value, Tensor):
                assert (value.shape, value.dtype) == (real[name].shape, real[name].dtype), name
    assert np.array_equal(np.sort(noise_batch(recipe, Parallel()).key_rows), np.arange(recipe.views * 16))
