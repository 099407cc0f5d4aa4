"""What learned coefficients minimise, pair by pair. To add one: one file and one line here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moemerge.registry import Registry

if TYPE_CHECKING:
    from moemerge.fitting.objectives.base import MakeTerm

OBJECTIVES: Registry[MakeTerm] = Registry(
    "objective",
    {
        "bradley_terry": "moemerge.fitting.objectives.bradley_terry:bradley_terry",
        "distillation": "moemerge.fitting.objectives.distillation:distillation",
        "alignment": "moemerge.fitting.objectives.alignment:alignment",
    },
    group="objectives",
)
