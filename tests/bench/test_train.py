"""Training under the clock: captured or failed, and never far ahead of the device."""

import contextlib
import dataclasses
import types
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch

from fastmoco.bench import lightly_example, scaling, train
from fastmoco.bench.journal import Journal
from fastmoco.bench.timing import Machine
from fastmoco.data.manifest import scan
from fastmoco.parallel import Parallel
from fastmoco.presets import PRESETS

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
SMALL = dataclasses.replace(PRESETS["v2"][1], arch="resnet18", width=0.125, batch_size=32, crop_size=16, queue_size=96)
IMAGES = types.SimpleNamespace(sizes=np.full((64, 2), 40, np.int32))


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The graph modes that were asked for: there are no steps behind them."""
    modes: list[str] = []

    def runner(step: object, batch: Callable, mode: str = "auto") -> Callable:
        modes.append(mode)
        return lambda *_: None

    for module in (train, scaling):
        monkeypatch.setattr(module, "runner", runner)
        monkeypatch.setattr(module, "Step", lambda *_, **__: None)
        monkeypatch.setattr(module, "noise_batch", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    return modes


@pytest.mark.parametrize(("device", "mode"), [(CPU, "off"), (GPU, "on")])
def test_a_step_that_must_be_captured_is_never_timed_eagerly(device, mode, calls, monkeypatch):
    monkeypatch.setattr(train, "machine_at", lambda *_: Machine("toy", 1e9, 1e9))
    monkeypatch.setattr(train, "_with_loader", lambda *_: ([1.0], 0.0))
    monkeypatch.setattr(train, "_images", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(lightly_example, "HAS_LIGHTLY", False)
    train.run(SMALL, device, rounds=1, precision="fp32")
    started = lambda _: contextlib.nullcontext(types.SimpleNamespace(device=device, barrier=lambda: None))  # noqa: E731
    monkeypatch.setattr(scaling, "Parallel", types.SimpleNamespace(start=started))
    scaling.work({"device": device.type, "recipe": SMALL.as_dict(), "precision": "fp32", "rounds": 1, "threads": 1})
    assert calls == [mode, mode]


def test_the_host_keeps_pace_with_the_device_after_every_step(monkeypatch):
    events: list[str] = []

    class Loader:
        wait_seconds = 0.0

        def __init__(self, *_: object, **__: object) -> None: ...

        def __enter__(self) -> "Loader":
            return self

        def __exit__(self, *_: object) -> None: ...

        def __next__(self) -> str:
            events.append("next")
            return "batch"

    class Pace:
        def __init__(self, device: torch.device) -> None:
            assert device == CPU

        def step(self) -> None:
            events.append("pace")

    monkeypatch.setattr("fastmoco.data.loader.Loader", Loader)
    monkeypatch.setattr(train, "Pace", Pace)
    advance = partial(lambda batch, lr: events.append(f"train {batch}"), lr=1e-3)
    rates, wait = train._with_loader(SMALL, Parallel(), IMAGES, advance, 2)
    assert len(rates) == 2 and wait == 0.0
    assert events == ["next", "train batch", "pace"] * 3 + ["next"] * 5 + ["next", "train batch", "pace"] * 9


class Clock:
    """Time of a loader that takes `batch` seconds for a batch and has up to five ready, and of steps of one second."""

    AHEAD = 5

    def __init__(self, batch: float) -> None:
        self.now, self.batch, self.made = 100.0, batch, 100.0 - self.AHEAD * batch
        self.wait_seconds = 0.0

    def __enter__(self) -> "Clock":
        return self

    def __exit__(self, *_: object) -> None: ...

    def __next__(self) -> str:
        self.made = max(self.made, self.now - self.AHEAD * self.batch) + self.batch
        self.now = max(self.now, self.made)
        return "batch"

    def step(self, _: object = None) -> None:
        self.now += 1.0


@pytest.mark.parametrize("device", [CPU, GPU])
@pytest.mark.parametrize("batch", [0.2, 0.9, 1.2])
def test_what_was_ready_ahead_does_not_count(monkeypatch, device, batch):
    """A loader that is a fifth too slow shows as one. The control, as many steps from the start, does not show it."""
    clock = Clock(batch)
    monkeypatch.setattr(train.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(train, "Pace", lambda _: types.SimpleNamespace(step=lambda: None))
    monkeypatch.setattr("fastmoco.data.loader.Loader", lambda *_: clock)
    rates, _ = train._with_loader(SMALL, Parallel(device=device), IMAGES, clock.step, 5)
    exact = SMALL.batch_size / max(1.0, batch)
    assert sum(rates) / len(rates) == pytest.approx(exact, rel=0.01)
    fresh = Clock(1.2)
    for _ in range(15):
        next(fresh)
        fresh.step()
    assert 15 / (fresh.now - 100) > 1.1 / 1.2


def test_a_gpu_tries_other_shares_of_its_engine(calls, monkeypatch):
    monkeypatch.setattr(train, "machine_at", lambda *_: Machine("toy", 1e9, 1e9))
    monkeypatch.setattr(train, "_images", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(lightly_example, "HAS_LIGHTLY", False)
    attempts, values = [], []

    def with_loader(*arguments: object) -> tuple[list[float], float]:
        attempts.append(arguments[-1])
        if arguments[-1] == 0.9:
            raise RuntimeError("no engine")
        return [1.0], 0.0

    monkeypatch.setattr(train, "_with_loader", with_loader)
    journal = Journal(lambda so_far: values.append(len(so_far.rows)))
    rows = train.run(SMALL, GPU, rounds=1, precision="fp32", journal=journal)
    assert attempts == [None, 0.65, 0.9, 1.0] and values == [1, 2, 3, 4] and len(journal.failures) == 1
    assert [row.provider for row in rows] == [
        train.LOADED,
        f"{train.LOADED}, engine's share 0.65",
        f"{train.LOADED}, engine's share 1",
        train.ALONE,
    ]
    attempts.clear()
    train.run(SMALL, CPU, rounds=1, precision="fp32")
    assert attempts == [None]


def test_lightlys_example_and_ours_train_in_turn_and_begin_with_nothing_ready(monkeypatch):
    """After a warm-up of each; whoever is timed has first thrown away the batches that its loader had ready."""
    done: list[str] = []

    class Loader:
        def __init__(self, *_: object) -> None: ...

        def __enter__(self):
            return self

        def __exit__(self, *_: object) -> None: ...

        def __next__(self) -> str:
            done.append("ours is drawn")
            return "batch"

    calls = partial(done.append, "theirs trains"), partial(done.append, "theirs is emptied")
    monkeypatch.setattr("fastmoco.data.loader.Loader", Loader)
    monkeypatch.setattr(lightly_example, "training", lambda *_: contextlib.nullcontext(calls))
    parallel = types.SimpleNamespace(device=CPU, rank=0, world=1)
    images = types.SimpleNamespace(sizes=np.full((64, 2), 40, np.int32))
    rates = train._in_turn(SMALL, parallel, images, lambda batch: done.append("ours trains"), 2, None)
    assert {name: len(each) for name, each in rates.items()} == {train.IN_TURN: 2, train.LIGHTLY: 2}
    turn = done[: len(done) // 3]
    assert done == 3 * turn and done.count("theirs trains") == done.count("ours trains") == 3 * train.STEPS["cpu"]
    first = turn.index("ours trains")
    assert turn[:first] == ["ours is drawn"] * first and turn[turn.index("theirs trains") - 1] == "theirs is emptied"


def test_lightlys_example_learns_a_batch(tmp_path):
    """With the library itself, where it is installed."""
    pytest.importorskip("lightly")
    pytest.importorskip("torchvision")
    from PIL import Image

    for number in range(8):
        Image.fromarray(np.full((40, 40, 3), 30 * number, np.uint8)).save(tmp_path / f"{number}.png")
    recipe = dataclasses.replace(SMALL, batch_size=8, bn_group=8)
    with lightly_example.training(recipe, scan(tmp_path, cache=False), CPU, torch.bfloat16) as (step, drain):
        step(), drain(), step()
