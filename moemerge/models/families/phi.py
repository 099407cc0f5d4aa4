"""Phi-1 to Phi-2: MLP without gate, beside the attention."""

from moemerge.models.families.base import Family

FAMILY = Family("phi", matrices=(("up", "mlp.fc1"), ("down", "mlp.fc2")))
