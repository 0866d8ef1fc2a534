"""The training loop: batches to steps, figures to the monitor, state to checkpoints.

The loop decides when things happen; what a step is stands in `contrast/step.py` and what it looks at in
`data/plan.py`. Nothing here is read back from the device while steps are in flight.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from fastmoco import environment
from fastmoco.contrast import agreement
from fastmoco.contrast.graph import runner
from fastmoco.contrast.step import Step
from fastmoco.data import manifest, quarantine, synthetic
from fastmoco.data.loader import Loader
from fastmoco.data.manifest import Manifest
from fastmoco.data.placeholder import noise_batch
from fastmoco.data.plan import Plan
from fastmoco.data.quarantine import Quarantine
from fastmoco.evaluate import knn
from fastmoco.options import Options, Pretrain, UsageError, check_places
from fastmoco.parallel import Parallel
from fastmoco.recipe import Recipe
from fastmoco.train import checkpoint
from fastmoco.train.monitor import KNN, LOG, Meter, Monitor, Stopwatch, chance_level, draw_curves, expectation
from fastmoco.train.monitor import fill_steps, memory, read_lines
from fastmoco.train.preempt import STOPPED, StopRequest, Vote, stop_on_signal

RUNS = Path("runs")
DEMO_IMAGES = RUNS / "images"


class NonFiniteError(ValueError):
    """Loss or gradients became infinite or NaN."""

    exit_code = 1


def run(command: Pretrain) -> int:
    """`pretrain PRESET`: exit code 0, or 143 where the run was asked to stop."""
    summary = pretrain(command.recipe, command.options, command.preset)
    return STOPPED if summary["stopped"] else 0


def pretrain(recipe: Recipe, options: Options, preset: str = "custom") -> dict[str, Any]:
    """Pretrain as `recipe` says and write RUN (`options.out`); returns what RUN/summary.json holds.

    UsageError or RecipeError before anything is written, DataError on bad images, CheckpointError where nothing can
    be resumed, NonFiniteError where training diverged. Where the process is asked to stop, it saves and returns with
    `stopped` true.
    """
    parallel = Parallel.start(options.device)
    try:
        options = _places(options, preset, parallel)
        with stop_on_signal() as asked:
            return Run(recipe, options, preset, parallel).train(asked)
    finally:
        parallel.close()


class Run:
    """One run on this rank: what it trains on, where it stands, where it writes."""

    def __init__(self, recipe: Recipe, options: Options, preset: str, parallel: Parallel) -> None:
        self.recipe, self.options, self.parallel = recipe, options, parallel
        self.out = Path(options.out)
        self.threads = options.threads or max(1, environment.cores() // _ranks_here())
        self.train_set, self.val_set, note = _images(options)
        self.quarantine = None
        if options.quarantine:
            self.quarantine = Quarantine(self.train_set, self.out / quarantine.NAME, recipe.max_bad_share)
        self.plan = Plan(recipe, self.train_set.sizes, parallel.world, parallel.rank)
        self.total = recipe.epochs * self.plan.steps_per_epoch
        self.last = min(self.total, options.stop_after or self.total)
        self.step = Step(
            recipe, parallel, encoder=options.encoder, update=options.update, key_stream=options.key_stream
        )
        # Before any DALI pipeline runs, which a capture would not survive.
        self.advance = runner(self.step, partial(noise_batch, recipe, parallel), options.graph, options.update)
        self.done = self.saved = self._restore() if options.resume else 0
        self._started = False
        self.meter = Meter(parallel.device)
        self.watch = Stopwatch()
        self.save_due = time.perf_counter() + 60 * options.save_minutes
        self.monitor = None
        if parallel.is_main:
            self._record(preset)
            self.monitor = Monitor(self.out, self.last, self.done, tensorboard=options.tensorboard)
            self._announce(preset, note)
        parallel.barrier()  # from here on RUN exists, and any rank may write to it

    def train(self, asked: StopRequest) -> dict[str, Any]:
        """Train to the end, or until asked to stop; save, evaluate, sum up."""
        self._agree_on_the_start()
        if self.done == 0:
            self._knn()
        try:
            with _controlled_gc():
                stopped = self._steps(asked)
            self._drain()
            self._save()
            if not stopped:
                self._knn()
            return self._finish(stopped)
        finally:
            if self.monitor is not None:
                self.monitor.close()

    def _steps(self, asked: StopRequest) -> bool:
        vote = Vote(self.parallel)
        loader = Loader(self.train_set, self.plan, self.recipe, self.parallel, start_step=self.done,
                        stop_step=self.last, threads=self.threads, prefetch=self.options.prefetch,
                        quarantine=self.quarantine)  # fmt: skip
        with loader:
            self.watch.skip()
            for batch in self._timed(loader):
                self._tell_quarantine()
                rate = self.recipe.learning_rate(self.done, self.plan.steps_per_epoch)
                self.meter.add(self.advance(batch, rate))
                self.done += 1
                self._after_the_first_step()
                if self.done % self.options.log_every == 0 or self.done == self.last:
                    self._interval(rate)
                if self.monitor is not None:
                    self.monitor.advance()
                stop, save = vote.cast(bool(asked), self._save_wanted())
                if self.done == self.last or stop:
                    return stop and self.done < self.last
                self._between_steps(save)
        return False

    def _tell_quarantine(self) -> None:
        while self.quarantine is not None and self.quarantine.news:
            bad = self.quarantine.news.popleft()
            line = f"quarantine: {bad.file}: {bad.reason}; from step {bad.step} on {bad.substitute} takes its place"
            print(line, file=sys.stderr, flush=True) if self.monitor is None else self.monitor.say(line)

    def _timed(self, batches: Any) -> Iterator[Any]:
        batches = iter(batches)
        while self.done < self.last:
            began = time.perf_counter()
            batch = next(batches)
            self.watch.waited(time.perf_counter() - began)
            yield batch

    def _agree_on_the_start(self) -> None:
        # Machines that see other files, or another newest checkpoint, would train on different things.
        files = agreement.bytes_digest("\n".join(self.train_set.paths).encode(), self.train_set.sizes.tobytes())
        agreement.compare(self.parallel, {"the list of images": files, "the step to go on from": self.done})
        agreement.check(self.step, self.plan, self.done)

    def _after_the_first_step(self) -> None:
        # By then kernels are compiled and caches warm on every rank; who is silent for long is dead.
        if self._started or not self.options.timeout_seconds:
            return
        self._started = True
        self.parallel.set_timeout(timedelta(seconds=self.options.timeout_seconds))

    def _between_steps(self, save: bool) -> None:
        epochs = self.options.knn_every
        evaluate = epochs and self.done % (epochs * self.plan.steps_per_epoch) == 0
        if save:
            self._save()
        elif self.done % agreement.CHECK_EVERY == 0:
            agreement.check(self.step, self.plan, self.done)
        if evaluate:
            self._knn()
        if save or evaluate:
            self.watch.skip()

    def _interval(self, rate: float) -> None:
        facts = {
            "epoch": self.done / self.plan.steps_per_epoch,
            "lr": rate,
            **self.watch.lap(self.meter.steps * self.recipe.batch_size),
            "memory": memory(self.parallel.device),
            "queue_filled": min(1.0, self.done / fill_steps(self.recipe)),
        }
        self.meter.cut(self.done, self.parallel, facts)
        self._report()
        gc.collect(1)  # automatic collection is off, so that all ranks pause together

    def _report(self, everything: bool = False) -> None:
        for line in self.meter.read(everything):
            if line.pop("nonfinite"):
                raise self._diverged(int(line["step"]))
            if self.monitor is not None:
                self.monitor.interval(line)

    def _drain(self) -> None:
        if self.meter.steps:
            self._interval(self.recipe.learning_rate(self.done - 1, self.plan.steps_per_epoch))
        self._report(everything=True)

    def _diverged(self, step: int) -> NonFiniteError:
        where = f"the last good checkpoint is of step {self.saved}" if self.saved else "no checkpoint was written yet"
        return NonFiniteError(
            f"{self.out}: loss or gradients became infinite or NaN before step {step}; {where}: resume it with a "
            f"smaller --lr in a new run, or another --precision"
        )

    def _save_wanted(self) -> bool:
        every, minutes = self.options.save_every, self.options.save_minutes
        by_step = bool(every) and self.done % every == 0
        by_time = bool(minutes) and self.parallel.is_main and time.perf_counter() >= self.save_due
        return by_step or by_time

    def _save(self) -> None:
        self.save_due = time.perf_counter() + 60 * self.options.save_minutes
        if self.done == self.saved:
            return
        # Saving reads everything back anyway: here a wait for the device is no loss, and no bad state is kept.
        if self.parallel.any(self.meter.nonfinite()):
            raise self._diverged(self.done)
        agreement.check(self.step, self.plan, self.done)
        state = self.step.state()
        if self.parallel.is_main:
            meta = {"recipe": self.recipe.as_dict(), "precision": self.step.precision}
            checkpoint.save(self.out, self.done, state, meta, self.options.keep)
        self.saved = self.done

    def _restore(self) -> int:
        if self.parallel.is_main:
            checkpoint.latest(self.out)  # sets damaged ones aside before the other ranks look
        self.parallel.barrier()
        path = checkpoint.latest(self.out)
        if path is None:
            return 0
        saved = checkpoint.load(path, verified=True)
        _same_recipe(Recipe.from_dict(saved.meta["recipe"]), self.recipe, path)
        self.step.load(saved.state)
        if saved.step > self.last:
            raise UsageError(f"{path} is already past step {self.last}: give a later --stop-after, or none")
        return saved.step

    def _knn(self) -> None:
        if self.val_set is None or not self.options.knn:
            return
        if self.options.resume and any(line["step"] == self.done for line in read_lines(self.out / KNN)):
            return
        if self.parallel.world > 1:
            self.step.state()  # makes the ranks' running statistics one, so that they evaluate one encoder
        figures = knn.evaluate(self.step.encoder_q, self.train_set, self.val_set, self.recipe, self.parallel,
                               threads=self.threads)  # fmt: skip
        if self.monitor is not None:
            self.monitor.knn({"step": self.done, "epoch": self.done / self.plan.steps_per_epoch, **figures})

    def _record(self, preset: str) -> None:
        facts = {
            "preset": preset,
            "recipe": self.recipe.as_dict(),
            "options": {name: str(value) if isinstance(value, Path) else value
                        for name, value in dataclasses.asdict(self.options).items()},
            "ranks": self.parallel.world,
            "images": len(self.train_set),
            "steps": self.total,
            "precision": self.step.precision,
            "versions": environment.versions(),
            "commit": environment.commit(),
            "command": environment.command(),
            "device": _device_name(self.parallel),
        }  # fmt: skip
        path = self.out / "recipe.json"
        if path.exists():
            first = json.loads(path.read_text())
            keys = ("commit", "command", "device", "versions", "ranks")
            first.setdefault("resumed", []).append({"step": self.done, **{key: facts[key] for key in keys}})
            facts = first
        else:
            _create(self.out, self.options.resume)
        _write_json(path, facts)

    def _announce(self, preset: str, note: str) -> None:
        say = self.monitor.say
        say(f"recipe ({preset}):")
        for name, value in _flat(self.recipe.as_dict()).items():
            say(f"  {name:<22}{value}")
        if self.recipe.lr == "auto":
            say(f"  {'lr (auto)':<22}{self.recipe.base_lr:g}")
        say("options:")
        for name, value in dataclasses.asdict(self.options).items():
            say(f"  {name:<22}{value}")
        per_rank = self.recipe.batch_size // self.parallel.world
        say(f"{len(self.train_set)} images, {self.plan.steps_per_epoch} steps an epoch, {self.total} steps; "
            f"{self.parallel.world} rank(s) of {per_rank} on {_device_name(self.parallel)}, {self.step.precision}; "
            f"writing {self.out}")  # fmt: skip
        say(expectation(self.recipe, self.plan.steps_per_epoch))
        for line in (note, f"resumed after step {self.done}" if self.options.resume else ""):
            if line:
                say(line)

    def _finish(self, stopped: bool) -> dict[str, Any]:
        if self.monitor is None:
            return {"stopped": stopped}
        summary = {**self._summary(), "stopped": stopped}
        draw_curves(self.out, self.recipe)
        if stopped:
            self.monitor.say(f"asked to stop: saved after step {self.done}; go on with --resume --out {self.out}")
            return summary
        _write_json(self.out / "summary.json", summary)
        self.monitor.say(_closing(summary, self.out))
        return summary

    def _summary(self) -> dict[str, Any]:
        log, neighbours = read_lines(self.out / LOG), read_lines(self.out / KNN)
        end = log[-1] if log else {}
        return {
            "steps": self.done,
            "epochs": self.done / self.plan.steps_per_epoch,
            "pairs_per_s": statistics.median(line["pairs_per_s"] for line in log) if log else None,
            "data_wait": statistics.median(line["data_wait"] for line in log) if log else None,
            **{name: end.get(name) for name in ("loss", "top1", "top5")},
            "chance_loss": chance_level(self.recipe),
            "knn_before": neighbours[0]["top1"] if neighbours and neighbours[0]["step"] == 0 else None,
            "knn_after": neighbours[-1]["top1"] if neighbours and neighbours[-1]["step"] == self.done else None,
            "seconds": self.monitor.seconds,
        }


def _places(options: Options, preset: str, parallel: Parallel) -> Options:
    check_places(preset, options, parallel.is_main)
    return dataclasses.replace(
        options,
        data=Path(options.data or synthetic.make(DEMO_IMAGES)),
        out=Path(options.out or fresh(RUNS / preset)),
    )


def fresh(path: Path) -> Path:
    """`path`, or path-2, path-3 ... where it exists."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free


def _images(options: Options) -> tuple[Manifest, Manifest | None, str]:
    train, val = manifest.split(options.data)
    found = manifest.scan(train)
    val = options.val or val
    note = f"{len(found.rejected)} files were left out: fastmoco data scan {options.data} lists them. "
    note = note if found.rejected else ""
    if not options.knn:
        return found, None, note
    if val is None or found.labels is None:
        why = "no val/ folder beside train/, nor --val" if val is None else f"no classes in {train}"
        return found, None, f"{note}no kNN evaluation: {why}"
    against = manifest.scan(val, classes=found.classes)
    if against.labels is None:
        return found, None, f"{note}no kNN evaluation: no classes in {val}"
    return found, against, note


def _same_recipe(saved: Recipe, now: Recipe, path: Path) -> None:
    for field in dataclasses.fields(Recipe):
        old, new = getattr(saved, field.name), getattr(now, field.name)
        if old != new and not field.name.startswith("knn_") and field.name != "max_bad_share":
            raise UsageError(f"{path} was made with {field.name} {old}, not {new}: resume it with the same recipe")


def _create(out: Path, resume: bool) -> None:
    try:
        out.mkdir(parents=True, exist_ok=resume)
    except FileExistsError as error:
        raise UsageError(f"{out} exists: continue it with --resume, or give --out another name") from error


def _ranks_here() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _device_name(parallel: Parallel) -> str:
    import torch

    if parallel.device.type == "cuda":
        return torch.cuda.get_device_name(parallel.device)
    return f"CPU, {environment.cores()} cores"


def _flat(data: dict[str, Any]) -> dict[str, Any]:
    inner = data.get("augmentation", {})
    return {name: value for name, value in {**data, **inner}.items() if name != "augmentation"}


def _write_json(path: Path, data: dict[str, Any]) -> None:
    draft = path.with_name(path.name + ".writing")
    draft.write_text(json.dumps(data, indent=2) + "\n")
    draft.replace(path)


def _closing(summary: dict[str, Any], out: Path) -> str:
    lines = [f"{summary['steps']} steps in {summary['seconds']:.0f} s"]
    if summary["loss"] is not None:
        lines.append(f"loss {summary['loss']:.3f} (chance {summary['chance_loss']:.3f})")
        lines.append(f"{summary['pairs_per_s']:.1f} pairs/s")
    if summary["knn_after"] is not None:
        before = f" (before: {summary['knn_before']:.1f}%)" if summary["knn_before"] is not None else ""
        lines.append(f"kNN top-1 {summary['knn_after']:.1f}%{before}")
    return f"done: {', '.join(lines)}; see {out}/summary.json and {out}/curves.png"


@contextmanager
def _controlled_gc() -> Iterator[None]:
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()
