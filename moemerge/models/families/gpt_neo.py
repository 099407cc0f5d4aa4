"""GPT-Neo: MLP without gate."""

from moemerge.models.families.base import Family

FAMILY = Family(
    "gpt_neo",
    layers="h",
    matrices=(("up", "mlp.c_fc"), ("down", "mlp.c_proj")),
    activation="activation_function",
    dropout="resid_dropout",
)
