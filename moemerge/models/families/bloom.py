"""BLOOM: MLP without gate, which adds the residual itself."""

from moemerge.models.families.base import Family

FAMILY = Family(
    "bloom",
    layers="h",
    matrices=(("up", "mlp.dense_h_to_4h"), ("down", "mlp.dense_4h_to_h")),
    fixed_activation="gelu_fast",
    dropout="hidden_dropout",
)
