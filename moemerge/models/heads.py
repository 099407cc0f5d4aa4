"""Which tensors are a reward head."""

from __future__ import annotations

from transformers import PreTrainedModel

# Heads of language models: left over, rightly, when a base model becomes a reward model.
LANGUAGE_HEADS = (
    "lm_head",
    "cls.",
    "vocab_",
    "mlm_head",
    "embed_out",
    "decoder.weight",
    "decoder.bias",
    "output_projection",
    "discriminator_predictions",
    "generator_predictions",
    "generator_lm_head",
    "lm_predictions",
    "mask_predictions",
)


def spare_head(name: str) -> bool:
    """Whether a tensor that the reward model lacks is only a base model's head or pooler."""
    return name.startswith(LANGUAGE_HEADS) or ".pooler." in f".{name}"


def in_head(model: PreTrainedModel, name: str) -> bool:
    """Whether a tensor is the reward head's. A pooler is: checkpoints of masked language models lack it."""
    return not name.startswith(f"{model.base_model_prefix}.") or ".pooler." in name
