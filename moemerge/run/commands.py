"""The commands that do many steps, a row each: flags, help, recipes of one section and what runs them follow.

To add one: its options, its function, and a row. Importing this loads neither.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from moemerge.registry import Registry

if TYPE_CHECKING:
    from moemerge.options.base import Run
    from moemerge.run.steps import RunReport


class Row(NamedTuple):
    """name: on the command line; section: which a recipe of this command has; summary: the command's help."""

    name: str
    section: str
    function: str
    options: str
    summary: str


ROWS = (
    Row(
        "audit",
        "audit",
        "moemerge.run.audit:audit",
        "moemerge.options.audit:Audit",
        "Measure how far reward models can be trusted: on pairs, under edits, under attack.",
    ),
    Row(
        "combine",
        "merges",
        "moemerge.run.combine:combine",
        "moemerge.options.combine:Combine",
        "Find the one model to use, given several reward models and some pairs of your own.",
    ),
    Row(
        "patch",
        "patch",
        "moemerge.run.patch:patch",
        "moemerge.options.patch:Patch",
        "Attack a reward model, train it on with a few of the answers found, and attack it again.",
    ),
)
OPTIONS: Registry[type[Run]] = Registry("command", {row.name: row.options for row in ROWS})
FUNCTIONS: Registry[Callable[..., RunReport]] = Registry("command", {row.name: row.function for row in ROWS})


def row_of(options: Run) -> Row:
    """The command whose options these are."""
    return next(row for row in ROWS if isinstance(options, OPTIONS.get(row.name)))
