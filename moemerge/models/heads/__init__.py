"""Reward heads, by kind: what turns the last state of a text into its score. To add one: a file and a line.

`linear` is the stock head of every architecture; a model with any other is no stock checkpoint.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moemerge.registry import Registry

if TYPE_CHECKING:
    from moemerge.models.heads.base import Head

LINEAR = "linear"
HEADS: Registry[type[Head]] = Registry(
    "head",
    {
        LINEAR: "moemerge.models.heads.linear:LinearHead",
        "mlp": "moemerge.models.heads.mlp:MlpHead",
        "nonnegative": "moemerge.models.heads.nonnegative:NonnegativeHead",
    },
    group="heads",
    needs=("stock", "outputs", "score", "draw"),
)
