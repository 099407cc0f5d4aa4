"""Tiny models and a tiny tokenizer, built in code: CPU, offline, seeded."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)

from moemerge.models.modelling import moe_config, register
from moemerge.models.moe_settings import MoeSettings

VOCABULARY = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(61))]
SIZES = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "num_labels": 1,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}
DECODERS = {"num_key_value_heads": 2, "head_dim": 8}
PARTIAL = {"num_key_value_heads": 2}
TINY: dict[str, dict[str, object]] = {
    "arcee": DECODERS,
    "bert": {},
    "biogpt": {},
    "bloom": {},
    "camembert": {},
    "data2vec-text": {},
    "deberta": {},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "diffllama": DECODERS,
    "distilbert": {"hidden_dim": 48},
    "electra": {"embedding_size": 24},
    "ernie": {},
    "eurobert": DECODERS,
    "exaone4": DECODERS,
    "falcon": {"ffn_hidden_size": 48},
    "gemma": DECODERS,
    "gemma2": DECODERS,
    "gemma3_text": DECODERS,
    "glm": DECODERS,
    "glm4": DECODERS,
    "gpt2": {"n_inner": 48},
    "gpt_bigcode": {"n_inner": 48},
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]]},
    "gpt_neox": {},
    "gptj": {"n_inner": 48, "rotary_dim": 4},
    "helium": DECODERS,
    "hunyuan_v1_dense": DECODERS,
    "llama": DECODERS,
    "megatron-bert": {},
    "minicpm3": {
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_nope_head_dim": 4,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
    },
    "ministral": DECODERS,
    "ministral3": DECODERS,
    "mistral": DECODERS,
    "modernbert": {},
    "modernbert-decoder": {"bos_token_id": 1},
    "mpnet": {},
    "mpt": {},
    "nemotron": DECODERS,
    "olmo": PARTIAL,
    "olmo2": PARTIAL,
    "olmo3": PARTIAL,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16},
    "persimmon": {},
    "phi": PARTIAL,
    "phi3": PARTIAL,
    "qwen2": PARTIAL,
    "qwen3": DECODERS,
    "qwen3_5_text": {
        **DECODERS,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "rembert": {"input_embedding_size": 16},
    "roberta": {},
    "roformer": {},
    "seed_oss": DECODERS,
    "smollm3": DECODERS,
    "stablelm": PARTIAL,
    "starcoder2": PARTIAL,
    "xlm-roberta": {},
}
# What tests of anything but architectures run over.
CORE = ("bert", "gemma2", "llama", "mistral", "qwen2", "qwen3")
# One at least of every form that a family can have: what is true of these is mostly true of all.
QUICK = {
    *("bert", "bloom", "deberta-v2", "distilbert", "gemma2", "gpt2", "gpt_neox", "llama", "modernbert"),
    *("modernbert-decoder", "opt", "phi", "phi3", "qwen3"),
}
TINY_MOE: dict[str, Any] = {
    "num_routed_experts": 4,
    "num_experts_per_tok": 2,
    "shared_expert": True,
    "layers": [0, 1, 2],
    "gate": "xft",
    "gate_shared_weight": 0.5,
    "router": "linear",
    "router_init_std": 0.02,
    "balance_coefficient": 0.1,
    "balance_loss": "cv",
    "dense_dtype": "float32",
}
LENGTHS = (13, 7, 1, 10)  # of the sequences of `batch`


def families(names: Iterable[str] = TINY) -> list[Any]:
    """Parameters of a test of families: all of `names`, most of them in the slow tests only."""
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Words w0 ... w60 split at white space, with pad and eos, right padding."""
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(VOCABULARY)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="right"
    )


def tiny_qwen_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that a qwen2 model can have: its class takes vocabulary and merges, and splits in its way.

    Of words w0 ... w60 it makes letters, and drops what it does not know.
    """
    words = [*VOCABULARY[:3], "w", *"0123456789", "Ġ"]
    words += [f"<{number}>" for number in range(len(VOCABULARY) - len(words))]
    return Qwen2Tokenizer(
        vocab={word: number for number, word in enumerate(words)},
        merges=[],
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="right",
    )


def tokenizer_of(family: str) -> PreTrainedTokenizerFast:
    """A tiny tokenizer that transformers reads texts with, as it is, beside a model of `family`."""
    return tiny_qwen_tokenizer() if family == "qwen2" else tiny_tokenizer()


def tiny_dense(family: str = "llama", seed: int = 0, **changes: object) -> torch.nn.Module:
    """A random dense reward model of `family`, float32, eval mode."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**SIZES, **TINY[family], **changes})
    return AutoModelForSequenceClassification.from_config(config).float().eval()


def save_dense(folder: Path, family: str = "llama", seed: int = 0, **changes: object) -> Path:
    """A tiny dense reward model with its tokenizer, saved as an ordinary checkpoint."""
    tiny_dense(family, seed, **changes).save_pretrained(folder)
    tokenizer_of(family).save_pretrained(folder)
    return folder


def tiny_moe(family: str = "llama", **changes: Any) -> torch.nn.Module:
    """A random MoE whose experts all differ."""
    register()
    settings = MoeSettings.read({**TINY_MOE, **changes})
    torch.manual_seed(1)
    return AutoModelForSequenceClassification.from_config(moe_config(tiny_dense(family).config, settings))


def batch() -> dict[str, Tensor]:
    """Four sequences, padded on the right."""
    ids_BT = torch.randint(2, SIZES["vocab_size"], (4, 13), generator=torch.Generator().manual_seed(5))
    mask_BT = torch.ones_like(ids_BT)
    for row, length in enumerate(LENGTHS):
        ids_BT[row, length:], mask_BT[row, length:] = 0, 0
    return {"input_ids": ids_BT, "attention_mask": mask_BT}


@torch.no_grad()
def scores(model: nn.Module, **more: Tensor) -> Tensor:
    """What a reward model gives each sequence of `batch`."""
    return model.eval()(**batch(), **more).logits[:, 0]
