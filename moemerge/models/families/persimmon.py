"""Persimmon: MLP without gate."""

from moemerge.models.families.base import Family

FAMILY = Family("persimmon", matrices=(("up", "mlp.dense_h_to_4h"), ("down", "mlp.dense_4h_to_h")))
