"""The training loop: batches to steps, figures to the monitor, state to checkpoints.

The loop decides when things happen; what a step is stands in `contrast/step.py` and what it looks at in
`data/plan.py`. Nothing here is read back from the device while steps are in flight.
"""

from __future__ import annotations

import gc
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import torch

from fastmoco import atomic
from fastmoco.contrast import agreement
from fastmoco.contrast.graph import closed_at_the_end, runner
from fastmoco.contrast.step import Step
from fastmoco.data import manifest, quarantine
from fastmoco.data.errors import DataError
from fastmoco.data.loader import Loader
from fastmoco.data.noise import noise_batch
from fastmoco.data.quarantine import Quarantine
from fastmoco.evaluate import knn
from fastmoco.options import Options, Pretrain
from fastmoco.parallel import Parallel
from fastmoco.process import crash_points
from fastmoco.process.stop import STOPPED, Stopped, StopRequest, Vote, note_saved, stop_on_signal
from fastmoco.process.watchdog import Watchdog
from fastmoco.recipe import Recipe
from fastmoco.runs.facts import go_on
from fastmoco.runs.lines import KNN, read_lines
from fastmoco.runs.run_folder import Hold, hold
from fastmoco.train import record
from fastmoco.train.curves import draw_curves
from fastmoco.train.dry_run import estimate
from fastmoco.train.expectation import fill_level
from fastmoco.train.health import ROLLBACKS, Health, NonFiniteError
from fastmoco.train.job import places, prepare
from fastmoco.train.metrics import BadStep, Meter, Pace, Reading, Stopwatch, memory
from fastmoco.train.monitor import Monitor
from fastmoco.train.saving import Saving
from fastmoco.train.start import start_from

TURN_SECONDS = 0.0005  # that a thread may keep Python's lock when another waits for it
FIRST_MINUTE = (
    "compiling kernels and capturing the step: about a minute the first time on this machine, then some ten seconds"
)


def run(command: Pretrain) -> int:
    """`pretrain PRESET`: exit code 0, or 143 where the run was asked to stop."""
    summary = pretrain(command.recipe, command.options, command.preset)
    if summary["stopped"]:
        note_saved()
    return STOPPED if summary["stopped"] else 0


def pretrain(recipe: Recipe, options: Options, preset: str = "custom") -> dict[str, Any]:
    """Pretrain as `recipe` says and write RUN (`options.out`); returns what RUN/summary.json holds, and `out`.

    Raises UsageError or RecipeError before anything is written, DataError on bad images, CheckpointError if nothing can
    be resumed, NonFiniteError if training diverged, SaveError if the last state found no place. Where the process
    is asked to stop, it saves and returns with `stopped` true. With `options.dry_run` as `dry_run.estimate`.
    """
    if options.dry_run:
        return estimate(recipe, options, preset) | {"stopped": False}
    with Parallel.start(options.device) as parallel, closed_at_the_end():
        options = places(options, preset, parallel)
        with stop_on_signal() as request:
            return Run(recipe, options, preset, parallel).train(request) | {"out": str(options.out)}


class Run:
    """One run on this rank: where it stands, and what it does next."""

    def __init__(self, recipe: Recipe, options: Options, preset: str, parallel: Parallel) -> None:
        job = prepare(recipe, options, preset, parallel)
        self.job, self.options, self.parallel, self.recipe, self.plan = job, options, parallel, job.recipe, job.plan
        self.loading, self.val_loading = job.loading_with_memory()
        self.quarantine = None
        if options.quarantine:
            self.quarantine = Quarantine(job.train_set, job.out / quarantine.NAME, job.recipe.max_bad_share)
        with _first_minute(parallel):
            self.step = Step(
                job.recipe,
                parallel,
                record.precision_before(job),
                encoder=options.encoder,
                update=options.update,
                key_stream=options.key_stream,
                deterministic=options.deterministic == "on",
                images=len(job.train_set),
            )
            # Before any DALI pipeline runs, which a capture would not survive.
            graph = options.graph if options.photometric == "kernel" else "off"
            self.advance = runner(self.step, partial(noise_batch, job.recipe, parallel), graph, options.update)
        self.saving = Saving(job, self.step)
        self.position = self.start = self.saving.restore() if options.resume else 0
        if options.start_from is not None and not self.position:
            start_from(self.step, options.start_from)
        self.health, self.rollbacks = Health(job.recipe), 0
        self.meter, self.watch = Meter(parallel.device), Stopwatch()
        self._hold: Hold | None = None
        self._first_step_done = self._knn_failed = False
        self.request, self.watchdog = StopRequest(), Watchdog(0, StopRequest())
        self.monitor: Monitor | None = None
        self._agree_on_the_start()
        if parallel.is_main:
            new = not job.out.exists()
            try:
                self._open_folder()
            except BaseException:
                if new:  # a start that fails leaves no folder behind, which would refuse the next one
                    shutil.rmtree(job.out, ignore_errors=True)
                raise
        parallel.barrier()  # from here on RUN exists, and any rank may write to it

    def _open_folder(self) -> None:
        job, options = self.job, self.options
        if job.out.exists():
            self._hold = hold(job.out)
        record.write(job, self.step.precision, self.position)
        self._hold = self._hold or hold(job.out)
        if not (job.out / manifest.NAME).exists():
            job.train_set.save(job.out / manifest.NAME)
        self.saving.open(self._say)
        sinks: dict[str, Any] = {"tensorboard": options.tensorboard, "track": options.track}
        self.monitor = Monitor(job.out, job.last, self.position, dictionary=job.recipe.dictionary, **sinks)
        for line in record.announcement(job, self.step.precision, self.position):
            self._say(line)

    def train(self, request: StopRequest) -> dict[str, Any]:
        """Train to the end, or until asked to stop; save, evaluate, sum up."""
        self.request = request
        try:
            with _controlled_gc(), Watchdog(self._watchdog_seconds(), request) as self.watchdog:
                stopped = self._train() or self._evaluate_last()
                return self._finish(stopped)
        finally:
            self.saving.close()
            if self.monitor is not None:
                self.monitor.close()
            if self._hold is not None:
                self._hold.close()

    def _watchdog_seconds(self) -> float:
        # A stuck rank shows its stacks before those that wait for it are ended.
        own, others = self.options.watchdog_seconds, self.options.timeout_seconds
        return min(own, others - 20) if self.parallel.world > 1 and others > 40 else own

    def _train(self) -> bool:
        if self.options.on_nonfinite == "rollback" and self.position == 0:
            self.saving.copy_step = -1  # so that there is a state to go back to
            self._save()
        with _short_turns():
            while True:
                try:
                    stopped = self._to_the_end()
                    self.watchdog.beat()
                    self.watchdog.saving = True
                    self._save()
                    self.saving.finish()
                    return stopped
                except NonFiniteError as error:
                    self.watchdog.saving = False
                    self._roll_back(error)

    def _to_the_end(self) -> bool:
        try:
            if self._knn_due():
                self._knn()
            stopped = self._steps()
        except Stopped:
            stopped = True
        if stopped and self.position == 0:
            self.saving.copy_step = -1  # asked to stop before the first step: what is promised is a checkpoint
        self._drain()
        return stopped

    def _evaluate_last(self) -> bool:
        try:
            self._knn()
        except Stopped:
            return True
        return False

    def _steps(self) -> bool:
        vote, pace = Vote(self.parallel), Pace(self.parallel.device)
        job, steps = self.job, range(self.position, self.job.last)
        with Loader(job.train_set, job.plan, self.parallel, steps, self.loading, self.quarantine) as loader:
            self.watch.skip()
            for batch in self._time_batches(loader):
                self._tell_quarantine()
                crash_points.reach("before step")
                rate = self.recipe.learning_rate(self.position, self.plan.steps_per_epoch)
                self.meter.add(self.advance(batch, rate))
                pace.step()
                self.position += 1
                crash_points.reach("after step")
                self.watchdog.beat()
                self._after_the_first_step()
                if self.position % self.options.log_every == 0 or self.position == self.job.last:
                    self._interval(rate)
                if self.monitor is not None:
                    self.monitor.advance()
                self.saving.check()
                stop, save = vote.cast(bool(self.request), self.saving.clock.due())
                if self.position == self.job.last or stop:
                    return stop and self.position < self.job.last
                self._between_steps(save)
        return False

    def _tell_quarantine(self) -> None:
        while self.quarantine is not None and self.quarantine.news:
            bad = self.quarantine.news.popleft()
            line = f"quarantine: {bad.file}: {bad.reason}; from step {bad.step} on {bad.substitute} takes its place"
            print(line, file=sys.stderr, flush=True) if self.monitor is None else self.monitor.say(line)

    def _time_batches(self, batches: Any) -> Iterator[Any]:
        batches = iter(batches)
        while self.position < self.job.last:
            began = time.perf_counter()
            batch = next(batches)
            self.watch.add_wait(time.perf_counter() - began)
            yield batch

    def _agree_on_the_start(self) -> None:
        # Machines that see other files, or another newest checkpoint, would train on different things.
        files = agreement.bytes_digest(*self.job.train_set.content())
        agreement.compare(self.parallel, {"the list of images": files, "the step to go on from": self.position})
        agreement.check(self.step, self.plan, self.position)

    def _after_the_first_step(self) -> None:
        # By then kernels are compiled and caches warm on every rank; who is silent for long is dead.
        if self._first_step_done or not self.options.timeout_seconds:
            return
        self._first_step_done = True
        self.parallel.set_timeout(timedelta(seconds=self.options.timeout_seconds))

    def _between_steps(self, save: bool) -> None:
        evaluate = self._knn_due()
        save = save or bool(self.options.save_every) and self.position % self.options.save_every == 0
        if save:
            self._save()
        elif self.position % agreement.CHECK_EVERY == 0:
            agreement.check(self.step, self.plan, self.position)
        if evaluate:
            self._knn()
        if save or evaluate:
            self.watch.skip()

    def _interval(self, rate: float) -> None:
        facts = {
            "epoch": self.position / self.plan.steps_per_epoch,
            "lr": rate,
            **self.watch.lap(self.meter.steps * self.recipe.batch_size),
            "memory": memory(self.parallel.device),
            "queue_filled": fill_level(self.recipe, self.plan.steps_per_epoch, self.position),
        }
        self.meter.cut(self.position, self.parallel, facts)
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
            raise self._divergence(reading.faults)
        for fault in reading.faults:
            self._say(f"warning: {fault}: its update was left out")

    def _drain(self) -> None:
        if self.meter.steps:
            self._interval(self.recipe.learning_rate(self.position - 1, self.plan.steps_per_epoch))
        self._report(everything=True)

    def _divergence(self, bad: list[BadStep]) -> NonFiniteError:
        self.saving.wait()
        good = self.saving.good
        where = f"the last good checkpoint is of step {good}" if good is not None else "no checkpoint was written yet"
        return NonFiniteError(
            f"{self.job.out}: {bad[0]}, its update was left out; {where}: go on with {go_on(self.job.out)} "
            f"--on-nonfinite skip (or rollback), or start another run with a smaller --lr or another --precision",
            bad[-1].step,
        )

    def _roll_back(self, error: NonFiniteError) -> None:
        if self.options.on_nonfinite != "rollback" or self.rollbacks == ROLLBACKS:
            raise error
        self.rollbacks += 1
        self.saving.wait()
        step = self.saving.restore()
        self.position, self.meter = error.step, Meter(self.parallel.device)
        if self.monitor is not None:
            self.monitor.jump(self.position)
        self._say(f"warning: {error}. Went back to the state after step {step}, on with step {self.position + 1}")

    def _save(self) -> None:
        self.saving.clock.restart()
        if self.position == self.saving.copy_step:
            return
        # A wait for the device, once an interval of minutes, so that no bad state is kept.
        if self.options.on_nonfinite != "skip" and self.parallel.any(self.meter.nonfinite()):
            self._drain()
        agreement.check(self.step, self.plan, self.position)
        self.saving.start(self.position)

    def _say(self, text: str) -> None:
        if self.monitor is not None:
            self.monitor.say(text)

    def _knn_due(self) -> bool:
        every = self.options.knn_every * self.plan.steps_per_epoch
        return self.position == 0 or bool(every) and self.position % every == 0

    def _knn(self) -> None:
        if self.job.val_set is None or not self.options.knn or self._knn_failed:
            return
        exists = self.parallel.is_main and any(line["step"] == self.position for line in read_lines(self.job.out / KNN))
        if self.parallel.any(exists):
            return
        if self.parallel.world > 1:
            self.step.state()  # makes the ranks' running statistics one, so that they evaluate one encoder
        if self.monitor is not None:
            self.monitor.knn_begins(self.position, len(self.job.train_set) + len(self.job.val_set))
        figures = None
        try:
            figures = knn.evaluate(
                self.step.encoder_q,
                self.job.train_set,
                self.job.val_set,
                self.recipe,
                self.parallel,
                loading=self.loading,
                val_loading=self.val_loading,
                progress=self._stop_between,
            )
        except (DataError, torch.OutOfMemoryError) as error:  # it only watches
            print(f"warning: no kNN evaluation from here on: {error}", file=sys.stderr, flush=True)
        self._knn_failed = self.parallel.any(figures is None)
        if self.monitor is not None and figures is not None:
            self.monitor.knn({"step": self.position, "epoch": self.position / self.plan.steps_per_epoch, **figures})

    def _stop_between(self, _: int) -> None:
        self.watchdog.beat()
        if self.parallel.any(bool(self.request)):
            raise Stopped

    def _finish(self, stopped: bool) -> dict[str, Any]:
        if self.monitor is None:
            return {"stopped": stopped}
        out = self.job.out
        summary = record.summary(self.job, self.position, self.monitor.seconds, self.rollbacks) | {"stopped": stopped}
        if stopped:  # without curves: whoever asked waits, and drawing takes longer than all the rest
            self._say(f"asked to stop: saved after step {self.position}; go on with {go_on(out)}")
            return summary
        draw_curves(out, self.recipe)
        atomic.write_json(out / record.SUMMARY, summary)
        for line in record.closing(self.job, summary, self.start):
            self._say(line)
        return summary


@contextmanager
def _first_minute(parallel: Parallel) -> Iterator[None]:
    if not parallel.is_main or parallel.device.type != "cuda":
        yield
        return
    print(FIRST_MINUTE, file=sys.stderr, flush=True)
    started = time.perf_counter()
    yield
    print(f"ready after {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)


@contextmanager
def _short_turns() -> Iterator[None]:
    # The loader's thread prepares a batch in Python, while steps of a few milliseconds are launched: whoever waits for
    # Python's lock otherwise waits five.
    before = sys.getswitchinterval()
    sys.setswitchinterval(TURN_SECONDS)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


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
