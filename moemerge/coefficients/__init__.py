"""Ways to find merge coefficients. To add one: one file and one line here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moemerge.registry import Registry

if TYPE_CHECKING:
    from moemerge.coefficients.base import Method

# Methods that can find the shared weight too.
FINDS_SHARED = ("learned", "grid", "least_squares")
METHODS: Registry[Method] = Registry(
    "coefficient method",
    {
        "uniform": "moemerge.coefficients.uniform:uniform",
        "usage": "moemerge.coefficients.usage:usage",
        "usage_chosen": "moemerge.coefficients.usage:usage_chosen",
        "one_hot": "moemerge.coefficients.one_hot:one_hot",
        "learned": "moemerge.coefficients.learned:learned",
        "grid": "moemerge.coefficients.grid:grid",
        "least_squares": "moemerge.coefficients.least_squares:least_squares",
    },
)
