"""ModernBERT decoder: gated MLP, gate and up fused."""

from moemerge.models.families.base import Family

FAMILY = Family(
    "modernbert-decoder", matrices=(("gate_up", "mlp.Wi"), ("down", "mlp.Wo")), activation="hidden_activation"
)
