"""Signs that training goes wrong, from figures that the loop reads anyway: faults, collapse, a dead queue."""

from __future__ import annotations

from collections.abc import Mapping

from fastmoco.recipe import Recipe

COLLAPSED = 0.02
"""Spread of the keys below which they are as good as one point; 1 is an even spread over the sphere."""
CHANCE_HITS = 10
"""Contrast accuracy is judged once so many hits in the five highest are expected from guessing alone."""
ABOVE_CHANCE = 2.0
"""Accuracy below this many times that of guessing is chance."""
BAD_IN_A_ROW = 100
"""Steps without a finite one between them after which `--on-nonfinite skip` gives up."""
ROLLBACKS = 10
"""Rollbacks after which `--on-nonfinite rollback` gives up."""


FULL = {"queue": "with the queue full", "batch": "in batches of this size", "bank": "with the bank full"}
"""When contrast accuracy should be above chance."""


class NonFiniteError(ValueError):
    """Loss or gradients became infinite or NaN; `step` is the first such step."""

    exit_code = 1

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class Health:
    """Watches the figures of one run and warns once of each thing."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.skipped = 0
        """Steps whose update was left out because something was not finite."""
        # A batch holds nothing random, but the first epoch and the warm-up prove nothing.
        self._early = max(1.0, recipe.warmup_epochs) if recipe.dictionary == "batch" else 0.0
        self._in_a_row = 0
        self._queries = self._hits = 0.0
        self._warned: set[str] = set()

    def warnings(self, line: Mapping[str, float], steps: int) -> list[str]:
        """Warnings due after an interval of `steps` finite steps, from its log line."""
        if not steps or line["queue_filled"] < 1 or line["epoch"] < self._early:
            return []
        queries = steps * self.recipe.queries
        self._queries += queries
        self._hits += queries * line["top5"] / 100
        messages = []
        if line["spread"] < COLLAPSED:
            messages += self._once(
                "collapse",
                (
                    f"warning: key features have collapsed at step {line['step']:.0f}: their spread is "
                    f"{line['spread']:.3g}, where 1 is even; a lower --lr, --shuffle-bn or smaller --bn-group may help"
                ),
            )
        expected = self._queries * 5 / self.recipe.candidates
        if expected >= CHANCE_HITS and self._hits < ABOVE_CHANCE * expected:
            messages += self._once(
                "chance",
                (
                    f"warning: contrast accuracy is at chance at step {line['step']:.0f}, "
                    f"{FULL[self.recipe.dictionary]}: if it stays there, nothing is learnt; look at --lr, "
                    f"--temperature and the images"
                ),
            )
        if expected >= CHANCE_HITS:
            self._queries = self._hits = 0.0
        return messages

    def skip(self, bad: int, finite: int) -> bool:
        """Count `bad` steps that were skipped in an interval with `finite` others; False where there are too many."""
        self.skipped += bad
        self._in_a_row = 0 if finite else self._in_a_row + bad
        return self._in_a_row < BAD_IN_A_ROW

    def _once(self, name: str, text: str) -> list[str]:
        if name in self._warned:
            return []
        self._warned.add(name)
        return [text]
