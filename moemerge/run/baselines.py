"""The models that a run compares, and what its `baselines` add: trainings, their average, ensembles."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moemerge.options.recipe import Recipe
from moemerge.options.train import TrainSettings

SAME_FLOPS, WARM, ENSEMBLE, TUNED = "control-flops", "warm", "ensemble", "tuned"
SEEDS_APART = 1000  # so that a fine-tune's order is not that of the control of the run with the next seed


def trainings(recipe: Recipe, moe: str) -> Iterator[tuple[str, TrainSettings, dict[str, Any]]]:
    """Trainings of the dense model by name, with settings and further options; `moe` is the MoE's folder."""
    control, wanted = recipe.control, recipe.baselines
    if control is None:
        return
    if wanted.same_flops:
        yield SAME_FLOPS, control, {"flops_of": moe}
    settings = control.scaled(1 / wanted.fine_tunes) if wanted.budget == "split" else control
    for number, name in enumerate(fine_tunes(recipe), 1):
        if name != "control":
            yield name, settings, {"seed": recipe.seed + SEEDS_APART * number}


def fine_tunes(recipe: Recipe) -> list[str]:
    """Names of the models that are averaged and combined; with full budgets the control is the first."""
    names = [f"fine-tune-{number + 1}" for number in range(recipe.baselines.fine_tunes)]
    return ["control", *names[1:]] if names and recipe.baselines.budget == "full" else names


def dense_rival(recipe: Recipe) -> str:
    """The dense model that the MoE and its merges are held against: the control, if there is one."""
    return "control" if recipe.control else "dense"


def is_averaged(recipe: Recipe) -> bool:
    """Whether WARM is asked for."""
    return bool(recipe.baselines.fine_tunes and recipe.baselines.warm)


def models(recipe: Recipe) -> list[str]:
    """The models by name that baselines add to the evaluation, each a folder of the run."""
    trained = [name for name, _, _ in trainings(recipe, "")]
    averaged, tuned = [WARM] if is_averaged(recipe) else [], [TUNED] if recipe.baselines.tuned else []
    return [*trained, *averaged, *tuned]


def ensembles(recipe: Recipe) -> dict[str, list[str]]:
    """The ensembles to evaluate: those that the recipe names, and that of the fine-tunes."""
    wanted = recipe.baselines
    own = {ENSEMBLE: fine_tunes(recipe)} if wanted.fine_tunes and wanted.ensemble else {}
    return {**own, **recipe.evaluate.ensembles}


def model_names(recipe: Recipe) -> list[str]:
    """The models that a run compares, by their names in the report."""
    merges = [f"merge-{method}" for method in [*recipe.also_merge, recipe.fit.method]]
    dense = ["dense", *(["control"] if recipe.control else []), *models(recipe)]
    return [*dense, "moe", *merges]


def scored_names(recipe: Recipe) -> list[str]:
    """The models that a run compares, and their ensembles."""
    evaluated = recipe.evaluate.model_copy(update={"ensembles": ensembles(recipe)})
    return [*model_names(recipe), *evaluated.combinations()]
