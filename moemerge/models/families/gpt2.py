"""GPT-2: MLP without gate; weights stored as [in, out]."""

from moemerge.models.families.base import Family

FAMILY = Family(
    "gpt2",
    layers="h",
    matrices=(("up", "mlp.c_fc"), ("down", "mlp.c_proj")),
    activation="activation_function",
    dropout="resid_pdrop",
    transposed=True,
)
