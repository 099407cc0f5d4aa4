"""Tiny policies and reward models that see only an answer's last word; prompts and answers of words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tiny_models import SIZES, TINY, tiny_dense, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

CHAT = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}w9 {% endif %}"
)


def save_policy(folder: Path, seed: int = 0, chat: bool = False, **changes: object) -> Path:
    """A random causal language model with its tokenizer; with `chat`, with a template."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model("llama", **{**SIZES, **TINY["llama"], "num_hidden_layers": 1, **changes})
    AutoModelForCausalLM.from_config(config).float().eval().save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT if chat else None
    tokenizer.save_pretrained(folder)
    return folder


def save_last_word_model(folder: Path, liked: str, seed: int = 0) -> Path:
    """A reward model whose score is 1 if a text's last word is `liked`, and nearer to 0 otherwise.

    Its tokenizer has no end token, unlike the policies'.
    """
    model: Any = tiny_dense("llama", seed, num_hidden_layers=1)
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        states_VD = model.model.norm(model.model.embed_tokens.weight)
        wanted_V = torch.zeros(len(states_VD))
        wanted_V[tokenizer.convert_tokens_to_ids(liked)] = 1.0
        head_D = torch.linalg.lstsq(states_VD, wanted_V[:, None]).solution[:, 0]
        model.score.weight.copy_(head_D / (states_VD @ head_D).max())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_prompts(path: Path, count: int, chat: bool = False) -> str:
    """`count` different prompts of two words, each as text that ends in a space, or as a chat."""
    texts = [f"w{i // 40} w{i % 40} " for i in range(count)]
    rows = [{"prompt": [{"role": "user", "content": text.strip()}] if chat else text} for text in texts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
