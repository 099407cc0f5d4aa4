"""Targets of the fuzzer in a model's folder: configs, tokenizers, chat templates."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fuzz_library import FAMILIES, library
from fuzz_tools import VALUES, Dice, Make, linked, mutated, spoil_json

from moemerge.data.rows import BadRow
from moemerge.data.tokenise import encode, encode_all
from moemerge.errors import DataError, MoemergeError
from moemerge.merging.sources.open import open_source
from moemerge.models.folder import ModelFolder
from moemerge.models.guards import check_reward_model
from moemerge.models.language_model import load_language_model
from moemerge.models.loading import load_reward_model, load_tokenizer
from moemerge.models.modelling import layout_of, moe_config
from moemerge.models.scoring import score
from moemerge.options.base import Members
from moemerge.options.upcycle import Upcycle
from moemerge.run.check import check_recipe
from moemerge.stages.upcycle import _dense_config, _settings
from moemerge.training.policy import sample_answers

CPU = torch.device("cpu")
SIZES = [2, 3, 4, 7, 31, 32, 48, 64, 100, 1000, 2000, 10**6, 2**40]
KINDS = [
    "bert", "clip", "deepseek_v3", "gemma3", "gpt2", "llama", "llava", "mamba", "mixtral", "moemerge_bert",
    "moemerge_llama", "qwen2", "qwen2_moe", "qwen3_next", "t5", "vit", "whisper", "xlnet",
]  # fmt: skip
WORDS = [
    "float16", "float8_e4m3fn", "gelu", "relu", "linear", "yarn", "dynamic", "llama3", "sliding_attention",
    "full_attention", "eager", "flash_attention_2", "LlamaForCausalLM", "LlamaForSequenceClassification",
    "regression", "multi_label_classification", "<pad>", "w1",
]  # fmt: skip
CONFIG_VALUES = [*VALUES, *SIZES, *KINDS, *WORDS]
MESSAGES = [
    {"role": "system", "content": "w0"},
    {"role": "user", "content": "w1 <w2>"},
    {"role": "assistant", "content": "w3"},
]
MOST_TOKENS = 100_000  # that a short text may become

TEMPLATES = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}",
    "{{ bos_token }}{% for message in messages %}{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] | trim + ' [/INST]' }}{% else %}{{ message['content'] + eos_token }}"
    "{% endif %}{% endfor %}",
    "{%- set ns = namespace(first=true) %}{%- if messages[0]['role'] == 'system' %}{%- set system = "
    "messages[0]['content'] %}{%- set rest = messages[1:] %}{%- else %}{%- set rest = messages %}{%- endif %}"
    "{%- macro turn(m) %}<|im_start|>{{ m.role }}\n{{ m.content | string | length }}{{ m.content.strip() }}"
    "<|im_end|>\n{% endmacro %}{% for m in rest %}{{ turn(m) }}{% endfor %}"
    "{{ strftime_now('%Y') if strftime_now is defined else '' }}{% if add_generation_prompt %}x{% endif %}",
)  # fmt: skip
PIECES = [
    "{{ ''.__class__ }}", "{{ 'a' * 10**4 }}", "{{ 1 / 0 }}", "{{ [] | first }}", "{{ x.y.z }}",
    "{% for i in range(9) %}", "{{ '\\ud800' }}", "{{ messages | tojson }}", "{{ messages[9] }}",
    "{% break %}", "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "{% set x = 10 ** 10 ** 2 %}", "{{ '%d' % 'a' }}",
    "{{ none + 1 }}", "{{ {}[[]] }}", "{% if 1 %}" * 30 + "{% endif %}" * 30,
    "{% for i in [1] %}" * 25 + "{% endfor %}" * 25, "{{ " + "(" * 300 + ")" * 300 + " }}",
    "{% include 'x' %}", "{{ self }}", "{% raw %}", "{{ messages.append(1) }}", "{{ cycler() }}",
    "{{ lipsum(n=3) }}", "{{ '{}'.format(messages) }}", "{{ 'x'.encode('ascii') }}",
]  # fmt: skip


def all_of(*reads: Callable[[], object]) -> None:
    """Every one of `reads`, whatever MoemergeError others raise; the first of these in the end."""
    refused = []
    for read in reads:
        try:
            read()
        except MoemergeError as error:
            refused.append(error)
    if refused:
        raise refused[0]


def model_with(file: str, *names: str) -> Make:
    """One of the library's models by these `names`, its JSON `file` broken."""

    def make(folder: Path, draw: Dice) -> None:
        model = linked(library() / draw.choice(names), folder / "model")
        spoil_json(model / file, draw, CONFIG_VALUES, bytes_too=0.1)

    return make


DENSE = tuple(f"dense/{family}" for family in FAMILIES)


def read_dense(folder: Path) -> None:
    """What merging a list of models and upcycling do with a dense model before its weights are read."""
    model = ModelFolder(folder / "model")
    source = str(folder / "model")

    def upcycled() -> None:
        config = _dense_config(model)
        layout_of(moe_config(config, _settings(Upcycle(model=source, output=folder / "out"), config)))

    all_of(
        lambda: (model.head_files, model.is_base, model.trusts_own_class),
        lambda: model.missing_head,
        lambda: check_reward_model(model),
        lambda: open_source(Members(models=[source, source])),
        upcycled,
    )


def read_moe(folder: Path) -> None:
    """What route, fit and merge do with a MoE, ours or a native one, before its weights are read."""
    source = open_source(Members(model=str(folder / "model")))
    all_of(source.dense_config, source.names, lambda: source.dtype, lambda: source.dense_dtype)


def make_checked(folder: Path, draw: Dice) -> None:
    """A recipe, and the model that it names, with a broken config."""
    model_with("config.json", *DENSE, "moe", "native")(folder, draw)
    data = {"train": "owner/name:train", "test_share": 0.1}
    recipe = {"output": str(folder / "run"), "model": str(folder / "model"), "data": data}
    (folder / "recipe.yml").write_text(json.dumps(recipe))


def read_recipe(folder: Path) -> None:
    """What `moemerge check` says."""
    faults = check_recipe(folder / "recipe.yml")
    assert all(isinstance(fault, MoemergeError) for fault in faults)
    if faults:
        raise faults[0]


def read_whole(folder: Path) -> None:
    """A reward model and its score of a text."""
    model = ModelFolder(folder / "model")
    loaded, tokenizer = load_reward_model(model, CPU), load_tokenizer(model)
    score(loaded, tokenizer, [encode(tokenizer, "w1 w2 ", "w3"), encode(tokenizer, "w1", " w4 w5")], 100)


def read_policy(folder: Path) -> None:
    """A policy and an answer of it."""
    policy, tokenizer = load_language_model(ModelFolder(folder / "model"), CPU)
    sample_answers(policy, tokenizer, ["w1 w2 "], 0, 2)


def make_tokenizer(folder: Path, draw: Dice) -> None:
    """A tokenizer one of whose files is broken."""
    kinds = ["tokenizers/bpe", "tokenizers/unigram", "tokenizers/wordpiece"]
    linked(library() / draw.choice(kinds), folder / "model")
    files = ["tokenizer.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
    spoil_json(folder / "model" / draw.choice(files), draw, [*VALUES, "<bos>", "w", "{% for"], bytes_too=0.2)


def read_tokenizer(folder: Path) -> None:
    """Tokens of a short text and of a short chat."""
    tokenizer = load_tokenizer(folder / "model")
    all_of(
        lambda: _tokens(tokenizer, "w1 w2 ", "w3 Ärger\u0301 🙂"),
        lambda: _tokens(tokenizer, MESSAGES[1:2], MESSAGES[2:]),
    )


def _tokens(tokenizer: Any, *texts: Any) -> None:
    """Tokens of prompt and answer; DataError for a bad row."""
    (text,) = encode_all(tokenizer, [texts])
    if isinstance(text, BadRow):
        raise DataError(str(text), given="", expected="", fix="")
    assert len(text.ids) < MOST_TOKENS and all(type(token) is int for token in text.ids)


def make_template(folder: Path, draw: Dice) -> None:
    """A chat template with broken words, or with pieces of others in it."""
    model = linked(library() / "tokenizers" / "bpe", folder / "model")
    words = draw.choice(TEMPLATES)
    for _ in range(draw.randint(0, 2)):
        start = draw.choice([i for i, letter in enumerate(words) if letter == "{"] or [0])
        words = words[:start] + draw.choice(PIECES) + words[start:]
    data = mutated(words.encode(), draw) if draw.random() < 0.7 else words.encode()
    (model / "chat_template.jinja").unlink()
    (model / "chat_template.jinja").write_bytes(data)


def read_template(folder: Path) -> None:
    """Tokens of a chat, with and without a system message, and of one that waits for an answer."""
    tokenizer = load_tokenizer(folder / "model")
    chats = [(MESSAGES[:2], MESSAGES[2:]), (MESSAGES[1:2], MESSAGES[2:]), ([], deepcopy(MESSAGES))]
    all_of(*(partial(_tokens, tokenizer, *chat) for chat in chats))
