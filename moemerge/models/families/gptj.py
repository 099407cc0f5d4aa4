"""GPT-J: MLP without gate, beside the attention."""

from moemerge.models.families.base import Family

FAMILY = Family(
    "gptj",
    layers="h",
    matrices=(("up", "mlp.fc_in"), ("down", "mlp.fc_out")),
    activation="activation_function",
    dropout="resid_pdrop",
)
