"""What training minimises, pair by pair; fitting.objectives is the twin. To add one: a file and a line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moemerge.registry import Registry

if TYPE_CHECKING:
    from moemerge.training.losses.base import MakeLoss

LOSSES: Registry[MakeLoss] = Registry(
    "objective",
    {
        "bradley_terry": "moemerge.training.losses.bradley_terry:bradley_terry",
        "policy": "moemerge.training.losses.policy:policy",
        "language": "moemerge.training.losses.language:language",
        "contrast": "moemerge.training.losses.contrast:contrast",
    },
    group="losses",
)
CENTER = "center"  # a term as well, which options.center weighs
PRIOR = "prior"  # and what a head's own prior asks for, which options.head_kl weighs
TERMS = (*LOSSES, CENTER, PRIOR)


@dataclass(frozen=True)
class Reads:
    """What an objective sends through a language head: chosen answers only; once more before training."""

    chosen_only: bool = False
    before: bool = False


# What makes an objective dear; the others cost next to nothing beside the model.
THROUGH_LANGUAGE_HEAD = {"policy": Reads(before=True), "language": Reads(chosen_only=True)}
