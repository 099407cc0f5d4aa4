"""StarCoder2: MLP without gate."""

from moemerge.models.families.base import Family

FAMILY = Family(
    "starcoder2", matrices=(("up", "mlp.c_fc"), ("down", "mlp.c_proj")), dropout="residual_dropout"
)
