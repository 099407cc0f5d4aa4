"""What a reward model costs: its parameters, those that one token uses, FLOPs per token."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from moemerge.models.families import family_of
from moemerge.models.folder import ModelFolder
from moemerge.models.heads.base import head_of
from moemerge.models.loading import without_weights
from moemerge.models.moe import moe_layers


def parameters(model: PreTrainedModel) -> dict[str, int]:
    """Weights in `model`, and those that one token uses: without the routed experts it is not sent to."""
    total = sum(weight.numel() for weight in model.parameters())
    routed = sum(w.numel() for layer in moe_layers(model).values() for w in layer.experts.parameters())
    moe = getattr(model.config, "moemerge", None) or {}
    idle = routed - routed * moe["num_experts_per_tok"] // moe["num_routed_experts"] if routed else 0
    return {"parameters": total, "active_parameters": total - idle}


def cost(model: PreTrainedModel) -> dict[str, int]:
    """`parameters` and `flops_per_token`: 2 * (active parameters - embeddings), the forward pass.

    One multiplication and one addition per weight that a token meets; embeddings are looked up, not
    multiplied (arXiv 2001.08361, section 2.1). The products of attention, which grow with the text and are
    the same for models of one backbone, are left out; so is a head of ours, which runs once a text.
    Training takes three times as much.
    """
    counts = parameters(model)
    tables = sum(part.weight.numel() for part in model.modules() if isinstance(part, nn.Embedding))
    head = head_of(model)
    once_a_text = sum(weight.numel() for weight in head.parameters()) if head is not None else 0
    return {**counts, "flops_per_token": 2 * (counts["active_parameters"] - tables - once_a_text)}


@dataclass(frozen=True)
class Cost:
    """FLOPs of a token's forward pass, also through a language head on the model; its number of layers."""

    flops_per_token: int
    language_head_flops: int
    layers: int


def cost_of(folder: ModelFolder) -> Cost:
    """What the reward model in `folder` costs, by its config: 2 * width * vocabulary for a language head."""
    model = without_weights(folder.config, folder.trust_remote_code)
    text = model.config.get_text_config()
    _, layers = family_of(model.config).dense_layers(model)
    per_token = cost(model)["flops_per_token"]
    return Cost(per_token, 2 * text.hidden_size * text.vocab_size, len(layers))
