"""Training under the clock: captured or failed, and never far ahead of the device."""

import contextlib
import dataclasses
import types
from collections.abc import Callable
from functools import partial

import pytest
import torch

from fastmoco.bench import scaling, train
from fastmoco.bench.timing import Machine
from fastmoco.parallel import Parallel
from fastmoco.recipe import PRESETS

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
SMALL = dataclasses.replace(PRESETS["v2"][1], arch="resnet18", width=0.125, batch_size=32, crop_size=16, queue_size=96)


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """The graph modes that were asked for: there are no steps behind them."""
    modes: list[str] = []

    def runner(step: object, batch: Callable, mode: str = "auto") -> Callable:
        modes.append(mode)
        return lambda *_: None

    for module in (train, scaling):
        monkeypatch.setattr(module, "runner", runner)
        monkeypatch.setattr(module, "Step", lambda *_: None)
        monkeypatch.setattr(module, "noise_batch", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    return modes


@pytest.mark.parametrize(("device", "mode"), [(CPU, "off"), (GPU, "on")])
def test_a_step_that_must_be_captured_is_never_timed_eagerly(device, mode, asked, monkeypatch):
    monkeypatch.setattr(train, "machine_at", lambda *_: Machine("toy", 1e9, 1e9))
    monkeypatch.setattr(train, "_with_loader", lambda *_: ([1.0], 0.0))
    train.run(SMALL, device, rounds=1, precision="fp32")
    started = lambda _: contextlib.nullcontext(types.SimpleNamespace(device=device, barrier=lambda: None))  # noqa: E731
    monkeypatch.setattr(scaling, "Parallel", types.SimpleNamespace(start=started))
    scaling.work({"device": device.type, "recipe": SMALL.as_dict(), "precision": "fp32", "rounds": 1, "threads": 1})
    assert asked == [mode, mode]


def test_the_host_keeps_pace_with_the_device_after_every_step(monkeypatch):
    done: list[str] = []

    class Loader:
        wait_seconds = 0.0

        def __init__(self, *_: object, **__: object) -> None: ...

        def __enter__(self) -> "Loader":
            return self

        def __exit__(self, *_: object) -> None: ...

        def __next__(self) -> str:
            done.append("next")
            return "batch"

    class Pace:
        def __init__(self, device: torch.device) -> None:
            assert device == CPU

        def step(self) -> None:
            done.append("pace")

    monkeypatch.setattr("fastmoco.data.loader.Loader", Loader)
    monkeypatch.setattr(train, "Pace", Pace)
    advance = partial(lambda batch, lr: done.append(f"train {batch}"), lr=1e-3)
    rates, wait = train._with_loader(SMALL, Parallel(), None, advance, 2)
    assert len(rates) == 2 and wait == 0.0
    count = len(done) // 3
    assert done == ["next", "train batch", "pace"] * count and count > 2 * train.STEPS
