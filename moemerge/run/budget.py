"""Budgets of training compared: whether a recipe favours the MoE."""

from __future__ import annotations

import math
from collections.abc import Iterator

from moemerge.options.recipe import Recipe
from moemerge.options.train import TrainSettings


def shortfalls(recipe: Recipe) -> Iterator[str]:
    """Where the control, and the baselines that train like it, get less care than the MoE; a line each.

    And where models are chosen by held-out labels that are noisier than what they are trained on.
    """
    yield from _timid(recipe)
    if recipe.control is None:
        yield "no control: without a dense model of equal budget and care, a gain means nothing"
        return
    chosen = recipe.train.choose_by, recipe.control.choose_by
    if len(set(chosen)) > 1:
        yield f"train chooses by {chosen[0]}, control by {chosen[1]}: the comparison mixes two things"
    for name in ("margin", "label_smoothing"):
        of = [str(getattr(section, name)) for section in (recipe.train, recipe.control)]
        if "column" in of and len(set(of)) > 1:
            yield f"train has {name} {of[0]}, control {of[1]}: the comparison mixes two things"
    ours, theirs = _care(recipe.train), _care(recipe.control)
    for what, wanted in ours.items():
        if theirs.get(what, wanted) < wanted:
            yield f"control has {theirs[what]:g} {what}, train {wanted:g}: the comparison favours the MoE"


def _timid(recipe: Recipe) -> Iterator[str]:
    """Trainings on treated labels that are chosen by the loss on labels as they were."""
    if recipe.strength is None or recipe.strength.treat == "none":
        return
    sections = {"base": recipe.base, "control": recipe.control, "train": recipe.train}
    names = [name for name, section in sections.items() if section and section.choose_by == "loss"]
    if names:
        yield (
            f"{', '.join(names)}: choose_by loss prefers models that are less sure than treated labels make "
            "them, as held-out labels are not treated: choose_by accuracy does not"
        )


def _care(settings: TrainSettings) -> dict[str, float]:
    """What a training may spend: trials, data seen at most in one of them, and patience."""
    trials = math.prod(len(values) for values in settings.search.values())
    care = {"trials": trials, "evaluations of patience": settings.patience or math.inf}
    if settings.max_steps:
        return care | {"pairs": settings.max_steps * settings.batch_size * settings.gradient_accumulation}
    return care | {"epochs": max(settings.search.get("epochs", [settings.epochs]), default=0)}
