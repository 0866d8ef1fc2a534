"""Where figures go beside the run's own log: TensorBoard, Weights & Biases, Trackio. All are optional installs."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from fastmoco.runs.facts import RECIPE, read_json

PROJECT = "fastmoco"


class Sink(Protocol):
    """Takes figures by name as a run goes on."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Figures that are known after `step`."""

    def close(self) -> None:
        """The run has ended."""


class TensorBoard:
    """RUN/tensorboard; figures beyond `start` that an interrupted run left there are purged."""

    def __init__(self, run: Path, start: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter  # seconds to import, so only where asked for
        except ImportError as error:
            raise ValueError(
                "--tensorboard needs a package: pip install -c constraints.txt -e '.[tensorboard]'"
            ) from error
        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=start)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One scalar a figure."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush the file."""
        self._writer.close()


class Tracker:
    """Weights & Biases or Trackio, whose calls are the same: a run named after RUN's folder, with its recipe."""

    def __init__(self, service: str, run: Path) -> None:
        try:
            self._service: Any = importlib.import_module(service)
        except ImportError as error:
            raise ValueError(f"--track {service} needs a package: pip install {service}") from error
        config = read_json(run / RECIPE)
        # Trackio finds the run to go on with by its name, Weights & Biases by an id of its own.
        more = {"id": run.name, "dir": str(run)} if service == "wandb" else {}
        self._service.init(project=PROJECT, name=run.name, config=config, resume="allow", **more)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """All figures of a step at once."""
        self._service.log(dict(values), step=step)

    def close(self) -> None:
        """Wait until everything has been sent."""
        self._service.finish()


def open_sinks(run: Path, start: int, tensorboard: bool, track: str) -> list[Sink]:
    """The sinks asked for; raises ValueError if one needs a package that is not installed."""
    sinks: list[Sink] = [TensorBoard(run, start)] if tensorboard else []
    return sinks + ([Tracker(track, run)] if track != "none" else [])
