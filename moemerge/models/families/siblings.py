"""Native mixtures of experts of transformers, and the dense architecture that each becomes when merged."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sibling:
    """The dense architecture that differs from a native MoE in its MLPs only.

    dense: its model_type. width, experts: config fields of the MoE, a routed expert's hidden width and their
    number. shared: path in a layer of the shared expert, if there is one; shared_width: config field of its
    width. total: what the weights of a token's experts, the shared one included, sum to (if the routed ones'
    sum to one); None where that is no constant, because the shared expert has a gate.
    """

    dense: str
    width: str = "moe_intermediate_size"
    experts: str = "num_experts"
    shared: str = ""
    shared_width: str = ""
    total: float | None = 1.0


SIBLINGS = {
    "hunyuan_v1_moe": Sibling(
        "hunyuan_v1_dense",
        width="intermediate_size",
        shared="mlp.shared_mlp",
        shared_width="intermediate_size",
        total=2.0,
    ),
    "mixtral": Sibling("mistral", width="intermediate_size", experts="num_local_experts"),
    "qwen2_moe": Sibling(
        "qwen2", shared="mlp.shared_expert", shared_width="shared_expert_intermediate_size", total=None
    ),
    "qwen3_moe": Sibling("qwen3"),
}

LATENT = "MiniCPM3, the one dense architecture with latent attention, rotates and scales otherwise"
HYBRID = "part of its layers are recurrent, and no dense architecture has those under the same names"
NO_HEAD = "transformers has no reward model class for it"

# The reason, by model_type.
NO_SIBLING = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "mistral4"), LATENT),
    **dict.fromkeys(("jamba", "minimax", "qwen3_next"), HYBRID),
    **dict.fromkeys(
        (
            "dots1",
            "ernie4_5_moe",
            "exaone_moe",
            "flex_olmo",
            "glm4_moe",
            "granitemoe",
            "minimax_m2",
            "qwen3_5_moe",
        ),
        NO_HEAD,
    ),
    "gpt_oss": "its attention has sinks and its experts clamp, as in no dense architecture",
    "jetmoe": "its attention has experts too",
    "olmoe": f"{NO_HEAD}; its norms stand before attention and MLP, unlike OLMo2's, and normalise all heads' "
    "queries and keys as one, unlike Qwen3's",
    "phimoe": "its LayerNorms and biases stand in no dense architecture beside a gated MLP",
}
