"""Falcon: MLP without gate, beside the attention."""

from moemerge.models.families.base import Family

FAMILY = Family(
    "falcon",
    layers="h",
    matrices=(("up", "mlp.dense_h_to_4h"), ("down", "mlp.dense_4h_to_h")),
    activation="activation",
)
