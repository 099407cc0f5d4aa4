"""What is wrong with the sections of a recipe that train, and with its baselines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from moemerge.errors import MoemergeError, OptionError, UnsupportedError, unknown
from moemerge.options.recipe import Recipe
from moemerge.options.train import TrainSettings
from moemerge.registry import Registry
from moemerge.run.baselines import plainly


def trainings(recipe: Recipe) -> dict[str, TrainSettings]:
    """The sections that train models, the voters' too, by name."""
    sections = {
        "strength": recipe.strength,
        "base": recipe.base,
        "train": recipe.train,
        "control": recipe.control,
    }
    return {name: section for name, section in sections.items() if section is not None}


def fault_of(what: str, given: object, expected: str, fix: str) -> OptionError:
    """A fault of a recipe."""
    return OptionError(what, given=str(given), expected=expected, fix=fix)


def unknown_name(key: str, name: str, known: Iterable[str]) -> Iterator[MoemergeError]:
    """The fault of a name that is not among the known ones, if it is not, or of a broken package's."""
    if name not in (names := list(known)):
        yield unknown(key, name, names)
    elif isinstance(known, Registry) and name in known.added:
        try:
            known.get(name)
        except UnsupportedError as fault:
            yield fault


def has_validation(recipe: Recipe) -> bool:
    """Whether there are held-out pairs, as far as a recipe without any data can be asked."""
    data = recipe.data
    return bool(recipe.synthetic or data is None or data.validation or data.validation_share)


def steering_faults(recipe: Recipe) -> Iterator[MoemergeError]:
    """Options of experts where there are none."""
    for name, section in trainings(recipe).items():
        if name != "train" and section.steered():
            yield fault_of(
                f"{name} trains a dense model, which has no experts to steer",
                ", ".join(f"{name}.{option}" for option in section.steered()),
                "these options in section train only",
                f"take them out of {name}",
            )
    if recipe.train.shared_dropout and not recipe.upcycle.shared_expert:
        yield fault_of(
            "train.shared_dropout needs a shared expert",
            "upcycle.shared_expert false",
            "a shared expert to leave out",
            "set upcycle.shared_expert to true, or train.shared_dropout to 0",
        )


def training_faults(recipe: Recipe) -> Iterator[MoemergeError]:
    """Objectives, heads and TRL's keys that are unknown, searches that nothing chooses, weights in parts."""
    from moemerge.models.heads import HEADS
    from moemerge.training.losses import LOSSES

    for name, section in trainings(recipe).items():
        for objective in section.objectives:
            yield from unknown_name(f"{name}.objectives", objective, LOSSES)
        if section.head is not None:
            yield from unknown_name(f"{name}.head", section.head, HEADS)
        if section.trainer:
            from moemerge.training.arguments import trainer_faults

            yield from trainer_faults(section.trainer, f"{name}.trainer")
        if section.sharded:
            yield fault_of(
                f"{name}.sharded needs several processes",
                "sharded: true in a recipe, which one process runs",
                "sharded: false",
                "leave it out; large trainings are done by torchrun -m moemerge train --sharded",
            )
        if section.search and not has_validation(recipe):
            yield fault_of(
                f"{name}.search needs validation pairs",
                "no data.validation, and data.validation_share 0",
                "held-out pairs, which choose among the values",
                "set data.validation or data.validation_share",
            )


def baseline_faults(recipe: Recipe) -> Iterator[MoemergeError]:
    """Baselines without what they need."""
    wanted = recipe.baselines
    if recipe.control is None and wanted.of_control():
        yield fault_of(
            "baselines need a control",
            "baselines, and no section control",
            "the section control, whose training they share",
            "add the section control",
        )
    if wanted.untreated and recipe.strength is None:
        yield fault_of(
            "baselines.untreated needs a vote on labels",
            "no section strength",
            "the section strength, whose labels it does without",
            "add the section strength, or set baselines.untreated to false",
        )
    if wanted.plain and recipe.control and recipe.control == plainly(recipe.control):
        yield fault_of(
            "baselines.plain would be the control again",
            "a control by Bradley-Terry alone",
            "a control with further objectives, label_smoothing, margin, center or lookahead",
            "set baselines.plain to false",
        )
    if wanted.heads and recipe.control and recipe.control.head in (None, "linear"):
        yield fault_of(
            "baselines.heads needs a head to be held against others",
            f"control.head {recipe.control.head or 'as the model has it'}",
            "control.head: nonnegative, or mlp",
            "set control.head, or baselines.heads to false",
        )
    if wanted.tuned and not (recipe.data and recipe.data.fit):
        yield fault_of(
            "baselines.tuned needs fitting pairs of their own",
            "no data.fit",
            "data.fit, so that validation pairs can choose its best step",
            "set data.fit, or baselines.tuned to false",
        )
