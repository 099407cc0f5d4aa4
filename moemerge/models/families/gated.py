"""Families with a gated MLP: down(act(gate(x)) * up(x))."""

from moemerge.models.families.base import Family

FUSED = (("gate_up", "mlp.gate_up_proj"), ("down", "mlp.down_proj"))
FUSED_W = (("gate_up", "mlp.Wi"), ("down", "mlp.Wo"))

GATED = (
    Family("diffllama"),
    Family("exaone4"),
    Family("gemma"),
    # Gemma 2 and 3: the MLP stands between its own pair of norms.
    Family("gemma2", activation="hidden_activation"),
    Family("gemma3_text", activation="hidden_activation"),
    Family("glm", matrices=FUSED),
    Family("glm4", matrices=FUSED),
    Family("helium"),
    Family("hunyuan_v1_dense"),
    Family("llama"),
    Family("minicpm3"),
    Family("ministral"),
    Family("ministral3"),
    Family("mistral"),
    Family("modernbert-decoder", matrices=FUSED_W, activation="hidden_activation"),
    Family("olmo"),
    Family("olmo2"),
    Family("olmo3"),
    Family("phi3", matrices=FUSED),  # Phi-3 and Phi-4
    Family("qwen2"),
    Family("qwen3"),
    Family("qwen3_5_text"),
    Family("seed_oss", dropout="residual_dropout"),
    Family("smollm3"),
    Family("stablelm"),
)
