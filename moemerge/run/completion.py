"""What the shell offers behind a flag: names of an open set, or files. click itself offers fixed choices."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import click
from click.shell_completion import CompletionItem

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

Complete = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


class Names(NamedTuple):
    """home: MODULE:NAME of a set of names, or of a function that gives it. also: other names, in front."""

    home: str
    also: tuple[str, ...] = ()
    ending: str = ""

    def __call__(self) -> Iterator[str]:
        """All of them, with their ending."""
        module, attribute = self.home.split(":")
        known = getattr(importlib.import_module(module), attribute)
        for name in (*self.also, *(known() if callable(known) else known)):
            yield name + self.ending


# By command and option: what may be given there and is no fixed choice.
NAMES = {
    ("init", "goal"): Names("moemerge.run.own_recipe:GOALS"),
    ("init", "template"): Names("moemerge.run.templates:templates"),
    ("train", "objectives"): Names("moemerge.training.losses:LOSSES", ending="="),
    ("strength", "objectives"): Names("moemerge.training.losses:LOSSES", ending="="),
    ("fit", "method"): Names("moemerge.fitting.methods:METHODS"),
    ("fit", "objectives"): Names("moemerge.fitting.objectives:OBJECTIVES", ending="="),
    ("fit", "optimizer"): Names("moemerge.fitting.optimisers:OPTIMISERS", ("auto",)),
    ("evaluate", "probes"): Names("moemerge.evaluation.probes:PROBES", ("biases",)),
    ("attack", "edits"): Names("moemerge.evaluation.attack_edits:ALL"),
    ("patch", "unseen"): Names("moemerge.evaluation.attack_edits:KEEP_CONTENT"),
}


def names(command: str, option: str) -> Complete:
    """Offers the names that an option may be."""

    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(name) for name in NAMES[command, option]() if name.startswith(incomplete)]

    return complete


def files(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Has the shell offer files and folders."""
    return [CompletionItem(incomplete, type="file")]


def completion(command: str, option: str, field: FieldInfo) -> Complete | None:
    """What to offer for an option of a command; None for what click knows itself, and for free text."""
    from moemerge.options.base import is_input

    if (command, option) in NAMES:
        return names(command, option)
    return files if option == "output" or is_input(field) else None
