"""GPT-NeoX and Pythia: MLP without gate, beside the attention."""

from moemerge.models.families.base import Family

FAMILY = Family("gpt_neox", matrices=(("up", "mlp.dense_h_to_4h"), ("down", "mlp.dense_4h_to_h")))
