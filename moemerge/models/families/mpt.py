"""MPT: MLP without gate, which adds the residual itself."""

from moemerge.models.families.base import Family

FAMILY = Family(
    "mpt",
    layers="blocks",
    block="ffn",
    matrices=(("up", "ffn.up_proj"), ("down", "ffn.down_proj")),
    fixed_activation="gelu",
    dropout="attn_config.attn_pdrop",
)
