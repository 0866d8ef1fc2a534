"""The training loop: batches to steps, figures to the monitor, state to checkpoints.

The loop decides when things happen; what a step is stands in `contrast/step.py` and what it looks at in
`data/plan.py`. Nothing here is read back from the device while steps are in flight.
"""

from __future__ import annotations

import atexit
import dataclasses
import gc
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from fastmoco.contrast import agreement
from fastmoco.contrast.graph import closed_at_the_end, runner
from fastmoco.contrast.step import Step
from fastmoco.data import manifest, quarantine, synthetic
from fastmoco.data.loader import Loader, Loading
from fastmoco.data.manifest import Manifest
from fastmoco.data.noise import noise_batch
from fastmoco.data.plan import Plan
from fastmoco.data.quarantine import Quarantine
from fastmoco.environment import share_of_cores
from fastmoco.evaluate import knn
from fastmoco.options import Options, Pretrain, UsageError, check_places, restarted
from fastmoco.parallel import Parallel
from fastmoco.process import crash_points
from fastmoco.process.stop import STOPPED, Stopped, StopRequest, Vote, stop_on_signal
from fastmoco.process.watchdog import Watchdog
from fastmoco.recipe import Recipe
from fastmoco.runs import checkpoint
from fastmoco.train import record
from fastmoco.train.health import ROLLBACKS, Health, NonFiniteError
from fastmoco.train.monitor import (
    KNN,
    Fault,
    Meter,
    Monitor,
    Pace,
    Reading,
    Stopwatch,
    draw_curves,
    fill_steps,
    memory,
    read_lines,
)
from fastmoco.train.saver import SaveError, Saver

RUNS = Path("runs")
DEMO_IMAGES = RUNS / "images"


def run(command: Pretrain) -> int:
    """`pretrain PRESET`: exit code 0, or 143 where the run was asked to stop."""
    atexit.register(gc.freeze)  # or the interpreter, as it ends, searches all that torch has made: a second or two
    summary = pretrain(command.recipe, command.options, command.preset)
    return STOPPED if summary["stopped"] else 0


def pretrain(recipe: Recipe, options: Options, preset: str = "custom") -> dict[str, Any]:
    """Pretrain as `recipe` says and write RUN (`options.out`); returns what RUN/summary.json holds.

    UsageError or RecipeError before anything is written, DataError on bad images, CheckpointError where nothing can
    be resumed, NonFiniteError where training diverged, SaveError where the last state found no place. Where the process
    is asked to stop, it saves and returns with `stopped` true.
    """
    with Parallel.start(options.device) as parallel, closed_at_the_end():
        options = _places(options, preset, parallel)
        with stop_on_signal() as asked:
            return Run(recipe, options, preset, parallel).train(asked)


class Run:
    """One run on this rank: what it trains on, where it stands, where it writes."""

    def __init__(self, recipe: Recipe, options: Options, preset: str, parallel: Parallel) -> None:
        self.options, self.parallel = options, parallel
        self.out = Path(options.out)
        self.loading = Loading(
            threads=options.threads or share_of_cores(),
            prefetch=options.prefetch,
            hw_decoder_load=options.hw_decoder_load,
            photometric=options.photometric,
            decoded_bytes=int(options.decoded_cache * 1e9),
        )
        self.train_set, self.val_set, note = _images(options, recipe.max_pixels)
        asked, recipe = recipe, recipe.for_images(len(self.train_set))
        self.recipe = recipe
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
        graph = options.graph if options.photometric == "kernel" else "off"
        self.advance = runner(self.step, partial(noise_batch, recipe, parallel), graph, options.update)
        self.done = self._restore() if options.resume else 0
        self.copied = self.done  # newest step of which a copy went to the saver
        self.health, self.rollbacks = Health(recipe), 0
        self._started = False
        self.meter = Meter(parallel.device)
        self.watch = Stopwatch()
        self.save_due = time.perf_counter() + 60 * options.save_minutes
        self.monitor = self.saver = None
        if parallel.is_main:
            record.write(self, preset)
            if not (self.out / manifest.NAME).exists():
                self.train_set.save(self.out / manifest.NAME)
            self.saver = Saver(self.out, options.keep, options.keep_every, self._say, self.done or None)
            self.monitor = Monitor(self.out, self.last, self.done, tensorboard=options.tensorboard, track=options.track)
            record.announce(self, preset, f"{record.queue_note(asked, recipe, len(self.train_set))}{note}")
        parallel.barrier()  # from here on RUN exists, and any rank may write to it

    def train(self, asked: StopRequest) -> dict[str, Any]:
        """Train to the end, or until asked to stop; save, evaluate, sum up."""
        self.asked = asked
        self._agree_on_the_start()
        try:
            with Watchdog(self.options.watchdog_seconds, asked) as self.watchdog:
                stopped = self._train() or self._evaluated_last()
                return self._finish(stopped)
        finally:
            for each in (self.saver, self.monitor):
                if each is not None:
                    each.close()

    def _train(self) -> bool:
        if self.options.on_nonfinite == "rollback" and self.done == 0:
            self.copied = -1  # so that there is a state to go back to
            self._save()
        with _controlled_gc():
            while True:
                try:
                    stopped = self._to_the_end()
                    self._save()
                    self._finish_saving()
                    return stopped
                except NonFiniteError as error:
                    self._roll_back(error)

    def _to_the_end(self) -> bool:
        try:
            if self._knn_due():
                self._knn()
            stopped = self._steps()
        except Stopped:
            stopped = True
        self._drain()
        return stopped

    def _evaluated_last(self) -> bool:
        try:
            self._knn()
        except Stopped:
            return True
        return False

    def _steps(self) -> bool:
        vote, pace = Vote(self.parallel), Pace(self.parallel.device)
        steps = range(self.done, self.last)
        loader = Loader(self.train_set, self.plan, self.parallel, steps, self.loading, self.quarantine)
        with loader:
            self.watch.skip()
            for batch in self._timed(loader):
                self._tell_quarantine()
                crash_points.reach("before step")
                rate = self.recipe.learning_rate(self.done, self.plan.steps_per_epoch)
                self.meter.add(self.advance(batch, rate))
                pace.step()
                self.done += 1
                crash_points.reach("after step")
                self.watchdog.beat()
                self._after_the_first_step()
                if self.done % self.options.log_every == 0 or self.done == self.last:
                    self._interval(rate)
                if self.monitor is not None:
                    self.monitor.advance()
                    self.saver.check()
                stop, save = vote.cast(bool(self.asked), self._time_to_save())
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
        evaluate = self._knn_due()
        save = save or bool(self.options.save_every) and self.done % self.options.save_every == 0
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
        for reading in self.meter.read(everything):
            self._judge(reading)
            if self.monitor is not None and reading.finite:
                self.monitor.interval(reading.line)
                for warning in self.health.warnings(reading.line, reading.finite):
                    self._say(warning)

    def _judge(self, reading: Reading) -> None:
        bearable = self.health.skip(len(reading.faults), reading.finite)
        if reading.faults and (self.options.on_nonfinite != "skip" or not bearable):
            raise self._diverged(reading.faults)
        for fault in reading.faults:
            self._say(f"warning: {fault}: its update was left out")

    def _drain(self) -> None:
        if self.meter.steps:
            self._interval(self.recipe.learning_rate(self.done - 1, self.plan.steps_per_epoch))
        self._report(everything=True)

    def _diverged(self, found: list[Fault]) -> NonFiniteError:
        if self.saver is not None:
            self.saver.wait()
        good = self.copied or None if self.saver is None else self.saver.good
        where = f"the last good checkpoint is of step {good}" if good is not None else "no checkpoint was written yet"
        return NonFiniteError(
            f"{self.out}: {found[0]}, its update was left out; {where}: resume it with --on-nonfinite skip or "
            f"rollback, or start another run with a smaller --lr or another --precision",
            found[-1].step,
        )

    def _roll_back(self, error: NonFiniteError) -> None:
        if self.options.on_nonfinite != "rollback" or self.rollbacks == ROLLBACKS:
            raise error
        self.rollbacks += 1
        if self.saver is not None:
            self.saver.wait()
        self.copied = self._restore()
        self.done, self.meter = error.step, Meter(self.parallel.device)
        if self.monitor is not None:
            self.monitor.jump(self.done)
        self._say(f"warning: {error}. Went back to the state after step {self.copied}, on with step {self.done + 1}")

    def _time_to_save(self) -> bool:
        due = bool(self.options.save_minutes) and self.parallel.is_main and time.perf_counter() >= self.save_due
        if due:  # said once: the answer of the ranks may come a step later, and a second wish would be a second save
            self._start_interval()
        return due

    def _start_interval(self) -> None:
        self.save_due = time.perf_counter() + 60 * self.options.save_minutes

    def _save(self) -> None:
        self._start_interval()
        if self.done == self.copied:
            return
        # A wait for the device, once an interval of minutes, so that no bad state is kept.
        if self.options.on_nonfinite != "skip" and self.parallel.any(self.meter.nonfinite()):
            self._drain()
        agreement.check(self.step, self.plan, self.done)
        state = self.step.state()
        if self.saver is not None:
            meta = {"recipe": self.recipe.as_dict(), "precision": self.step.precision}
            self.saver.start(self.done, state, meta)
        self.copied = self.done

    def _finish_saving(self) -> None:
        failed = None
        if self.saver is not None:
            try:
                self.saver.finish()
            except SaveError as error:
                failed = error
        if self.parallel.any(failed is not None):
            raise failed or SaveError(f"{self.out}: the first rank could not write the last state")

    def _say(self, text: str) -> None:
        if self.monitor is not None:
            self.monitor.say(text)

    def _restore(self) -> int:
        crash_points.reach("before load")
        # The first rank sets damaged ones aside before the others look.
        path = checkpoint.latest(self.out) if self.parallel.is_main else None
        self.parallel.barrier()
        if not self.parallel.is_main:
            path = checkpoint.latest(self.out)
        if path is None:
            return 0
        crash_points.reach("verified")
        saved = checkpoint.load(path, verified=True)
        _same_recipe(Recipe.from_dict(saved.meta["recipe"]), self.recipe, path)
        self.step.load(saved.state)
        if saved.step > self.last:
            raise UsageError(f"{path} is already past step {self.last}: give a later --stop-after, or none")
        crash_points.reach("after load")
        return saved.step

    def _knn_due(self) -> bool:
        every = self.options.knn_every * self.plan.steps_per_epoch
        return self.done == 0 or bool(every) and self.done % every == 0

    def _knn(self) -> None:
        if self.val_set is None or not self.options.knn:
            return
        done = self.parallel.is_main and any(line["step"] == self.done for line in read_lines(self.out / KNN))
        if self.parallel.any(done):
            return
        if self.parallel.world > 1:
            self.step.state()  # makes the ranks' running statistics one, so that they evaluate one encoder
        figures = knn.evaluate(
            self.step.encoder_q,
            self.train_set,
            self.val_set,
            self.recipe,
            self.parallel,
            loading=self.loading,
            progress=self._stop_between,
        )
        if self.monitor is not None:
            self.monitor.knn({"step": self.done, "epoch": self.done / self.plan.steps_per_epoch, **figures})

    def _stop_between(self, _: int) -> None:
        self.watchdog.beat()
        if self.parallel.any(bool(self.asked)):
            raise Stopped

    def _finish(self, stopped: bool) -> dict[str, Any]:
        if self.monitor is None:
            return {"stopped": stopped}
        summary = {**record.summary(self), "stopped": stopped}
        if stopped:  # without curves: whoever asked waits, and drawing takes longer than all the rest
            self.monitor.say(f"asked to stop: saved after step {self.done}; go on with --resume --out {self.out}")
            return summary
        draw_curves(self.out, self.recipe)
        record.write_json(self.out / "summary.json", summary)
        self.monitor.say(record.closing(summary, self.out))
        return summary


def _places(options: Options, preset: str, parallel: Parallel) -> Options:
    check_places(preset, options, parallel.is_main and not restarted())
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


def _images(options: Options, max_pixels: int) -> tuple[Manifest, Manifest | None, str]:
    train, val = manifest.split(options.data)
    kept = Path(options.out) / manifest.NAME
    # A run keeps its samples, and so its plan, when files are lost or added between two of its parts.
    found = Manifest.load(kept, train) if kept.exists() else manifest.scan(train, max_pixels=max_pixels)
    val = options.val or val
    note = f"{len(found.rejected)} files were left out: fastmoco data scan {options.data} lists them. "
    note = note if found.rejected else ""
    if not options.knn:
        return found, None, note
    if val is None or found.labels is None:
        why = "no val/ folder beside train/, nor --val" if val is None else f"no classes in {train}"
        return found, None, f"{note}no kNN evaluation: {why}"
    against = manifest.scan(val, classes=found.classes, max_pixels=max_pixels)
    if against.labels is None:
        return found, None, f"{note}no kNN evaluation: no classes in {val}"
    return found, against, note


def _same_recipe(saved: Recipe, now: Recipe, path: Path) -> None:
    for field in dataclasses.fields(Recipe):
        old, new = getattr(saved, field.name), getattr(now, field.name)
        if old != new and not field.name.startswith("knn_") and field.name != "max_bad_share":
            raise UsageError(f"{path} was made with {field.name} {old}, not {new}: resume it with the same recipe")


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
