"""Ways to minimise a loss over merge coefficients. To add one: one file and one line here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moemerge.registry import Registry

if TYPE_CHECKING:
    from moemerge.fitting.optimisers.base import Optimiser

OPTIMISERS: Registry[Optimiser] = Registry(
    "optimizer",
    {
        "lbfgs": "moemerge.fitting.optimisers.lbfgs:lbfgs",
        "adam": "moemerge.fitting.optimisers.adam:adam",
        "cma": "moemerge.fitting.optimisers.evolution:cma",
    },
    group="optimisers",
)
SMALL_SET = 2048


def choose(name: str, num_pairs: int) -> str:
    """The optimiser that `name` stands for: `auto` is lbfgs for sets of up to 2048 pairs, else adam."""
    return name if name != "auto" else "lbfgs" if num_pairs <= SMALL_SET else "adam"
