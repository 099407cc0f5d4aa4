"""The models that a run compares, and what its `baselines` add: trainings, their average, ensembles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from moemerge.options.head import ONLY_WITH_HEAD, HeadOptions
from moemerge.options.recipe import Recipe
from moemerge.options.train import LOSS, TrainSettings

SAME_FLOPS, WARM, ENSEMBLE, TUNED = "control-flops", "warm", "ensemble", "tuned"
UNTREATED_BASE, UNTREATED, PLAIN = "untreated-base", "untreated", "plain"
# Kinds of heads, with noise or without.
HEADS = {"head-linear": ("linear", False), "head-mlp": ("mlp", False), "head-noise": ("mlp", True)}
SEEDS_APART = 1000  # so that a fine-tune's order is not that of the control of the run with the next seed


def trainings(
    recipe: Recipe, path: Callable[[str], str]
) -> Iterator[tuple[str, TrainSettings, dict[str, Any]]]:
    """Trainings of dense models by name, with settings and further options.

    `path` gives the folder of a step. All begin with the run's dense model unless the options name another.
    """
    control, wanted = recipe.control, recipe.baselines
    if control is None:
        return
    if wanted.same_flops:
        yield SAME_FLOPS, control, {"flops_of": [path("upcycle")]}
    if wanted.untreated:
        yield from _untreated(recipe, control, path)
    if wanted.plain:
        yield PLAIN, plainly(control), {"flops_of": [path("control")]}
    if wanted.heads:
        yield from ((name, settings, {}) for name, settings in other_heads(control).items())
    settings = control.scaled(1 / wanted.fine_tunes) if wanted.budget == "split" else control
    for number, name in enumerate(fine_tunes(recipe), 1):
        if name != "control":
            yield name, _with_one_head(settings, recipe.seed), {"seed": recipe.seed + SEEDS_APART * number}


def _untreated(
    recipe: Recipe, control: TrainSettings, path: Callable[[str], str]
) -> Iterator[tuple[str, TrainSettings, dict[str, Any]]]:
    """Base and control on labels as they came; the latter as long as vote and control together take."""
    pairs = {"pairs": path("data/train.jsonl.gz")}
    if recipe.base:
        yield UNTREATED_BASE, without_columns(recipe.base), pairs
    start = {"model": path(UNTREATED_BASE)} if recipe.base else {}
    cost = [path("strength"), path("control")]
    yield UNTREATED, without_columns(control), pairs | start | {"flops_of": cost}


def without_columns(settings: TrainSettings) -> TrainSettings:
    """The settings without what a vote writes."""
    smoothing = 0.0 if settings.label_smoothing == "column" else settings.label_smoothing
    return settings.model_copy(update={"margin": "none", "label_smoothing": smoothing})


def plainly(settings: TrainSettings) -> TrainSettings:
    """The settings of a training that minimises nothing but Bradley-Terry."""
    fields = TrainSettings.model_fields
    return settings.model_copy(
        update={name: fields[name].get_default(call_default_factory=True) for name in LOSS}
    )


def _with_one_head(settings: TrainSettings, seed: int) -> TrainSettings:
    """The settings with a new head, if they have one, that is the control's: others could not be averaged."""
    if settings.head is None or settings.head_seed is not None:
        return settings
    return settings.model_copy(update={"head_seed": seed})


def with_the_head_that_is_there(settings: TrainSettings) -> TrainSettings:
    """The settings of a training that goes on with a model which these made."""
    fields = HeadOptions.model_fields
    return settings.model_copy(update={name: fields[name].default for name in ("head", *ONLY_WITH_HEAD)})


def other_heads(settings: TrainSettings) -> dict[str, TrainSettings]:
    """The settings under each head of HEADS that is not their own, of the same width and dropout."""
    fields = HeadOptions.model_fields
    found = {}
    for name, (head, noise) in HEADS.items():
        if (head, noise) == (settings.head, settings.noisy_head):
            continue
        kept = {} if head == "linear" else {n: getattr(settings, n) for n in ("head_width", "head_dropout")}
        shape = {n: fields[n].default for n in ONLY_WITH_HEAD} | {"head_seed": settings.head_seed} | kept
        noisy = {"head_noise": True} if noise else {}
        found[name] = settings.model_copy(update={**shape, **noisy, "head": head})
    return found


def fine_tunes(recipe: Recipe) -> list[str]:
    """Names of the models that are averaged and combined; with full budgets the control is the first."""
    names = [f"fine-tune-{number + 1}" for number in range(recipe.baselines.fine_tunes)]
    return ["control", *names[1:]] if names and recipe.baselines.budget == "full" else names


def dense_rival(recipe: Recipe) -> str:
    """The dense model that the MoE and its merges are held against: the control, if there is one."""
    return "control" if recipe.control else "dense"


def optimised(recipe: Recipe) -> list[str]:
    """The reward models that a policy is optimised against, by name: the dense rival, and the merge."""
    return [dense_rival(recipe), f"merge-{recipe.fit.method}"]


def is_averaged(recipe: Recipe) -> bool:
    """Whether WARM is asked for."""
    return bool(recipe.baselines.fine_tunes and recipe.baselines.warm)


def models(recipe: Recipe) -> list[str]:
    """The models by name that baselines add to the evaluation, each a folder of the run."""
    trained = [name for name, _, _ in trainings(recipe, str) if name != UNTREATED_BASE]
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
