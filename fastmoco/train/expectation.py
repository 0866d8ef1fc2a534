"""What a healthy run looks like: chance, and what the loss does first. It depends on the dictionary.

Only the standard library is imported.
"""

from __future__ import annotations

import math

from fastmoco.recipe import Recipe


def chance_level(recipe: Recipe) -> float:
    """Loss of a guess among all candidates, the positive included; a symmetric loss is the sum of two."""
    return _terms(recipe) * math.log(recipe.candidates)


def _terms(recipe: Recipe) -> int:
    return 2 if recipe.dictionary == "queue" and recipe.symmetric else 1


def chance_formula(recipe: Recipe) -> str:
    """`chance_level` as a formula: ln(K+1), and of a batch B ln(2B-1), or ln(B) without negatives of the same view."""
    if recipe.dictionary != "batch":
        return "2 ln(K+1)" if _terms(recipe) == 2 else "ln(K+1)"
    return "ln(2B-1)" if recipe.same_view_negatives else "ln(B)"


def fill_steps(recipe: Recipe, steps_per_epoch: int) -> int:
    """Steps until the dictionary holds nothing random: a queue's turn, a bank's epoch; a batch never does."""
    if recipe.dictionary == "batch":
        return 0
    if recipe.dictionary == "bank":
        return steps_per_epoch
    return math.ceil(recipe.check_queue() / (recipe.batch_size * recipe.views))


def fill_level(recipe: Recipe, steps_per_epoch: int, step: int) -> float:
    """Share of the dictionary that is not random any more after `step` steps, 0 to 1."""
    fill = fill_steps(recipe, steps_per_epoch)
    return min(1.0, step / fill) if fill else 1.0


def expectation(recipe: Recipe, steps_per_epoch: int) -> str:
    """What a healthy loss looks like, for the first line of a run."""
    chance = f"chance level of the loss is {chance_formula(recipe)} = {chance_level(recipe):.3f}. A healthy loss "
    fill = fill_steps(recipe, steps_per_epoch)
    if recipe.dictionary == "batch":
        return chance + "starts near that or above and falls below it within the first epochs"
    if recipe.dictionary == "bank":
        return chance + (
            f"stays at that or above for the first epoch ({fill} steps), while the bank's entries are random vectors, "
            "then falls"
        )
    return chance + (
        f"starts low (the first negatives are random vectors), rises while the queue fills with real keys ({fill} "
        f"steps, {fill / steps_per_epoch:.2g} epochs) and somewhat beyond, then falls"
    )
