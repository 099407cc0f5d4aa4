"""Arcee: MLP without gate, squared ReLU."""

from moemerge.models.families.base import Family

FAMILY = Family("arcee", matrices=(("up", "mlp.up_proj"), ("down", "mlp.down_proj")))
