"""Python code for a model's users: it gives a text the score that evaluate gives it, with plain transformers.

A model card shows it, and what run and combine print at the end does.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path

from moemerge.artifacts.json_file import read_object
from moemerge.artifacts.manifest import Manifest, read_manifest
from moemerge.models.families.base import PREFIX
from moemerge.reports.table import visible

# Half-precision weights give other scores in float32, in which evaluate scores on a CPU. A token type that a
# tokenizer adds is no input of every model; evaluate gives none.
CODE = '''import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer{imports}

name, device = {name}, "cuda" if torch.cuda.is_available() else "cpu"
dtype = "auto" if device == "cuda" else torch.float32
tokenizer = AutoTokenizer.from_pretrained(name{trust})
model = AutoModelForSequenceClassification.from_pretrained(name, dtype=dtype{trust}).to(device)


def reward(prompt, answer):
    """Both plain text, or both lists of messages {{"role": ..., "content": ...}}, as it was trained."""
    if isinstance(answer, str):
        end = tokenizer.eos_token or ""
        text = prompt + answer + ("" if answer.endswith(end) else end)
        special = not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))
    else:
        text, special = tokenizer.apply_chat_template([*prompt, *answer], tokenize=False), False
    inputs = tokenizer(
        text, add_special_tokens=special, return_token_type_ids=False, return_tensors="pt"
    ){lengths}
    with torch.inference_mode():
        return model(**inputs.to(device)).logits[0, 0].item()


print(reward({example}))'''
TEXTS = '"Is the earth round? ", "Yes."'
MESSAGES = """
    [{"role": "user", "content": "Is the earth round?"}], [{"role": "assistant", "content": "Yes."}]
"""
# The gates of such a MoE read the prompt alone: the tokens that it and the whole text begin with.
LENGTHS = """
    plain = isinstance(prompt, str) or not prompt
    begin = (prompt or "") if plain else tokenizer.apply_chat_template(prompt, tokenize=False)
    begin = tokenizer(begin, add_special_tokens=special)["input_ids"]
    shared = commonprefix([begin, inputs["input_ids"][0].tolist()])
    inputs["prompt_lengths"] = torch.tensor([len(shared)])"""


def scoring_code(name: str, folder: Path) -> str:
    """The code for the reward model in `folder`, which its users know as `name`: a path or hub name.

    On the same machine it gives the score that evaluate gives, but for rounding: evaluate scores in batches.
    """
    config = read_object(folder / "config.json")
    mixture = str(config.get("model_type")).startswith(PREFIX)
    by_prompt = (config.get("moemerge") or {}).get("gate") == "prompt"
    own_code = "auto_map" in config and not mixture
    imports = ["import moemerge  # knows the model type"] * mixture
    imports += ["from os.path import commonprefix"] * by_prompt
    return CODE.format(
        name=visible(json.dumps(name, ensure_ascii=False)),
        imports="".join(f"\n{line}" for line in imports),
        trust=", trust_remote_code=True" * own_code,
        lengths=LENGTHS * by_prompt,
        example=MESSAGES if _has_template(folder) else TEXTS,
    )


def _has_template(folder: Path) -> bool:
    """Whether a chat template lies in the folder, in a file of its own or in the tokenizer's config."""
    settings = folder / "tokenizer_config.json"
    return any(folder.glob("chat_template*")) or (
        settings.is_file() and bool(read_object(settings).get("chat_template"))
    )


def scoring_words(chain: Sequence[Manifest]) -> str:
    """What a model's users must know to get the scores that were measured; chain: manifests up to its own."""
    lengths = [longest for step in chain if isinstance(longest := step["options"].get("max_length"), int)]
    made = f"; it was made from texts of at most {lengths[-1]} tokens" if lengths else ""
    return (
        "A score is the raw logit, not a probability. Plain text has the tokenizer's end token behind it, if "
        f"there is one; chats are rendered by the chat template. Nothing is cut off{made}."
    )


def how_to_score(folder: Path) -> str:
    """Words and code for the model that a stage wrote into `folder`, for a terminal."""
    manifest = read_manifest(folder)
    code = textwrap.indent(scoring_code(str(folder), folder), "  ")
    words = scoring_words([*manifest.get("chain", []), manifest])
    return f"Load the model, and score as evaluate does. {words}\n{code}"
