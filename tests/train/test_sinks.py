"""Sinks get every figure of the monitor, once, at its step; a missing package is one line."""

import importlib
import io
import json
import sys
import types

import pytest

from fastmoco.train.monitor import Monitor
from fastmoco.train.sinks import Tracker, open_sinks

LINE = {
    "step": 10,
    "epoch": 0.5,
    "loss": 6.5,
    "top1": 3.0,
    "top5": 9.0,
    "lr": 0.03,
    "pairs_per_s": 100.0,
    "data_wait": 0.1,
    "memory": 1.0,
    "queue_filled": 0.2,
}


@pytest.fixture(params=["wandb", "trackio"])
def service(request, monkeypatch):
    """A package with the calls that both services share, noting what it is told."""
    fake = types.ModuleType(request.param)
    fake.calls = []
    fake.init = lambda **kwargs: fake.calls.append(("init", kwargs))
    fake.log = lambda values, step: fake.calls.append(("log", step, values))
    fake.finish = lambda: fake.calls.append(("finish",))
    monkeypatch.setitem(sys.modules, request.param, fake)
    return fake


def test_a_tracker_gets_every_figure_once(service, tmp_path):
    run = tmp_path / "flowers"
    run.mkdir()
    (run / "recipe.json").write_text(json.dumps({"recipe": {"temperature": 0.2}}))
    monitor = Monitor(run, total=20, track=service.__name__, stream=io.StringIO())
    monitor.interval(LINE)
    monitor.knn({"step": 10, "top1": 55.0, "top5": 90.0})
    monitor.close()
    (_, files), figures, neighbours, (last,) = service.calls
    assert (files["project"], files["name"], files["resume"]) == ("fastmoco", "flowers", "allow")
    assert files["config"]["recipe"]["temperature"] == 0.2
    assert files.get("id") == ("flowers" if service.__name__ == "wandb" else None)
    assert figures[1] == 10 and figures[2].items() >= {k: v for k, v in LINE.items() if k != "step"}.items()
    assert neighbours == ("log", 10, {"knn_top1": 55.0, "knn_top5": 90.0}) and last == "finish"


def test_without_the_package_one_line_says_so(tmp_path, monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ValueError, match="--track trackio needs a package: pip install trackio"):
        Tracker("trackio", tmp_path)


def test_by_default_there_is_none(tmp_path):
    assert open_sinks(tmp_path, 0, tensorboard=False, track="none") == []
