"""DistilBERT: MLP without gate."""

from moemerge.models.families.base import Family

FAMILY = Family(
    "distilbert",
    layers="transformer.layer",
    block="ffn",
    matrices=(("up", "ffn.lin1"), ("down", "ffn.lin2")),
    activation="activation",
    dropout="dropout",
    causal=False,
)
