"""Ways to find merge coefficients. To add one: one file and one line here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moemerge.registry import Registry

if TYPE_CHECKING:
    from moemerge.fitting.problem import Method

# Methods that can find the shared weight too.
FINDS_SHARED = ("learned", "grid", "least_squares")
METHODS: Registry[Method] = Registry(
    "coefficient method",
    {
        "uniform": "moemerge.fitting.methods.uniform:uniform",
        "usage": "moemerge.fitting.methods.usage:usage",
        "usage_chosen": "moemerge.fitting.methods.usage:usage_chosen",
        "one_hot": "moemerge.fitting.methods.one_hot:one_hot",
        "learned": "moemerge.fitting.methods.learned:learned",
        "grid": "moemerge.fitting.methods.grid:grid",
        "least_squares": "moemerge.fitting.methods.least_squares:least_squares",
    },
    group="methods",
)
