"""What is wrong with a recipe's section strength and those that train on what it writes."""

from __future__ import annotations

from collections.abc import Iterator

from moemerge.errors import MoemergeError, OptionError
from moemerge.options.recipe import Recipe
from moemerge.run.training_check import trainings


def label_faults(recipe: Recipe) -> Iterator[MoemergeError]:
    """Doubts that no training takes, and trainings that want doubts which nothing writes."""
    if recipe.strength is None:
        return
    taking = [
        name
        for name, section in trainings(recipe).items()
        if name != "strength" and section.label_smoothing == "column"
    ]
    treat = recipe.strength.treat
    if treat == "soft" and not taking:
        yield OptionError(
            "strength.treat soft has no effect",
            given="no section with label_smoothing column",
            expected="trainings that take the doubts which it writes",
            fix="set label_smoothing to column in base, control and train",
        )
    elif treat != "soft" and taking:
        yield OptionError(
            f"{taking[0]}.label_smoothing column needs doubts",
            given=f"strength.treat {treat}, which writes none",
            expected="strength.treat soft",
            fix=f"set strength.treat to soft, or {taking[0]}.label_smoothing to a number",
        )
