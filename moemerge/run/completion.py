"""What the shell offers behind a flag: names of an open set, or files. click itself offers fixed choices."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
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
        known = known() if callable(known) else known
        for name in (*self.also, *(sorted(known) if isinstance(known, set) else known)):
            yield name + self.ending


HEADS = Names("moemerge.models.heads:HEADS")
# By command and option: what may be given there and is no fixed choice.
NAMES = {
    ("init", "goal"): Names("moemerge.run.own_recipe:GOALS"),
    ("init", "template"): Names("moemerge.run.templates:templates"),
    ("train", "head"): HEADS,
    ("strength", "head"): HEADS,
    ("train", "objectives"): Names("moemerge.training.losses:LOSSES", ending="="),
    ("strength", "objectives"): Names("moemerge.training.losses:LOSSES", ending="="),
    ("train", "search"): Names("moemerge.options.train:SEARCHABLE", ending="="),
    ("strength", "search"): Names("moemerge.options.train:SEARCHABLE", ending="="),
    ("fit", "method"): Names("moemerge.fitting.methods:METHODS"),
    ("fit", "objectives"): Names("moemerge.fitting.objectives:OBJECTIVES", ending="="),
    ("fit", "optimizer"): Names("moemerge.fitting.optimisers:OPTIMISERS", ("auto",)),
    ("merge", "method"): Names("moemerge.merging.mergekit.methods:method_names"),
    ("evaluate", "probes"): Names("moemerge.evaluation.probes:PROBES", ("biases",)),
    ("attack", "edits"): Names("moemerge.evaluation.attack_edits:ALL"),
    ("patch", "unseen"): Names("moemerge.evaluation.attack_edits:KEEP_CONTENT"),
}
# By option, of whatever command.
LAYERS = ("all", "first:", "last:")
WORDS = {"device": ("auto", "cpu", "cuda"), "layers": LAYERS, "train_layers": LAYERS}


def names(command: str, option: str) -> Complete:
    """Offers the names that an option may be."""
    return offer(lambda: NAMES[command, option]())


def offer(known: Callable[[], Iterable[str]]) -> Complete:
    """Offers what `known` gives, when it is asked for."""

    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(name) for name in known() if name.startswith(incomplete)]

    return complete


def files(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Has the shell offer files and folders."""
    return [CompletionItem(incomplete, type="file")]


def completion(command: str, option: str, field: FieldInfo, words: Sequence[str]) -> Complete | None:
    """What to offer for an option of a command; None for what click knows itself, and for free text.

    words: those that its type allows.
    """
    from moemerge.options.base import COLUMNS, is_input

    if (command, option) in NAMES:
        return names(command, option)
    if option == "output" or is_input(field):
        return files
    if option == "fields":
        words = [f"{name}=" for name in COLUMNS]
    offered = words or WORDS.get(option)
    return None if offered is None else offer(lambda: offered)
