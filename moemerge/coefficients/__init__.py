"""Ways to find merge coefficients. To add one: one file and one line here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moemerge.registry import Registry

if TYPE_CHECKING:
    from moemerge.coefficients.base import Method

METHODS: Registry[Method] = Registry(
    "coefficient method",
    {
        "uniform": "moemerge.coefficients.uniform:uniform",
        "usage": "moemerge.coefficients.usage:usage",
        "learned": "moemerge.coefficients.learned:learned",
        "grid": "moemerge.coefficients.grid:grid",
    },
)
