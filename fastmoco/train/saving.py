"""When a run saves, and how it goes back: the loop's view of its checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable

from fastmoco.contrast.step import Step
from fastmoco.options import UsageError
from fastmoco.process import crash_points
from fastmoco.recipe import HARMLESS_ON_RESUME, Recipe
from fastmoco.runs import checkpoint
from fastmoco.train.job import Job
from fastmoco.train.saver import SaveError, Saver


class SaveClock:
    """Says once, `minutes` after it was last restarted, that a save is due; 0 minutes is never."""

    def __init__(self, minutes: float) -> None:
        self.seconds = 60 * minutes
        self.restart()

    def due(self) -> bool:
        """Whether the time is up. The answer of the ranks may come a step later: a second wish would save twice."""
        due = self.seconds > 0 and time.perf_counter() >= self.at
        if due:
            self.restart()
        return due

    def restart(self) -> None:
        """Begin the interval anew."""
        self.at = time.perf_counter() + self.seconds


class Saving:
    """Checkpoints of one run: copies of `step` go to a saver on the main rank, and come back from the newest good one.

    `copy_step` is the newest step of which a copy was made, or that was restored.
    """

    def __init__(self, job: Job, step: Step) -> None:
        self.job, self.step = job, step
        self.copy_step = 0
        self.clock = SaveClock(job.options.save_minutes if job.parallel.is_main else 0)
        self.saver: Saver | None = None

    def open(self, report: Callable[[str], None]) -> None:
        """Start the saver, on the main rank; `report` gets one line if the disk refuses."""
        options = self.job.options
        self.saver = Saver(self.job.out, options.keep, options.keep_every, report, self.copy_step or None)

    def start(self, step: int) -> None:
        """Copy the state after `step` steps and begin to write it. All ranks call this: their statistics become one."""
        state = self.step.state()
        if self.saver is not None:
            meta = {"recipe": self.job.recipe.as_dict(), "precision": self.step.precision}
            self.saver.start(step, state, meta)
        self.copy_step = step

    def check(self) -> None:
        """Raise what went wrong in the thread that writes, if it did."""
        if self.saver is not None:
            self.saver.check()

    def wait(self) -> None:
        """Let the write in progress end."""
        if self.saver is not None:
            self.saver.wait()

    def finish(self) -> None:
        """Return when the newest state is on disk; SaveError on every rank if the disk refuses it."""
        failed = None
        if self.saver is not None:
            try:
                self.saver.finish()
            except SaveError as error:
                failed = error
        if self.job.parallel.any(failed is not None):
            raise failed or SaveError(f"{self.job.out}: the first rank could not write the last state")

    def close(self) -> None:
        """End the thread."""
        if self.saver is not None:
            self.saver.close()

    @property
    def good(self) -> int | None:
        """Step of the newest checkpoint known to be on disk, as far as this rank can tell."""
        return (self.copy_step or None) if self.saver is None else self.saver.good

    def restore(self) -> int:
        """Load the newest good checkpoint of the run and return its step; 0 if there is none yet."""
        crash_points.reach("before load")
        out, parallel = self.job.out, self.job.parallel
        # The first rank sets damaged ones aside before the others look.
        path = checkpoint.latest(out) if parallel.is_main else None
        parallel.barrier()
        if not parallel.is_main:
            path = checkpoint.latest(out)
        self.copy_step = 0
        if path is None:
            return 0
        crash_points.reach("verified")
        content = checkpoint.load(path, verified=True)
        before = Recipe.from_dict(content.meta["recipe"]).for_images(len(self.job.train_set))
        _require_same_recipe(before, self.job.recipe, path)
        self.step.load(content.state)
        if content.step > self.job.last:
            raise UsageError(f"{path} is already past step {self.job.last}: give a later --stop-after, or none")
        crash_points.reach("after load")
        self.copy_step = content.step
        return content.step


def _require_same_recipe(before: Recipe, now: Recipe, path: object) -> None:
    for name, (old, new) in before.differences(now).items():
        if name not in HARMLESS_ON_RESUME:
            raise UsageError(f"{path} was made with {name} {old}, not {new}: resume it with the same recipe")
