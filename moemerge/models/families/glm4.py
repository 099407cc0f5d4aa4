"""GLM-4: gated MLP, gate and up fused."""

from moemerge.models.families.base import Family

FAMILY = Family("glm4", matrices=(("gate_up", "mlp.gate_up_proj"), ("down", "mlp.down_proj")))
