"""Model folders that transformers 5 wrote, made such that version 4 reads them, and scores alike.

Imports nothing heavy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moemerge.artifacts.json_file import read_object, write_json
from moemerge.models.families.base import PREFIX

# The class that takes tokenizer.json as it is, as both versions call it.
TOKENIZERS = {"TokenizersBackend": "PreTrainedTokenizerFast"}


def make_portable(folder: Path) -> None:
    """Give config and tokenizer the names that transformers 4 (from 4.56 on) knows.

    Version 5 keeps all that it wrote itself. Without this, version 4 reads a config without rope_theta, and
    scores with the wrong positions without a word. The config of a class of ours, which version 4 cannot
    load, stays as it is: a MoE's layout, which is what merge reads, is kept beside this very config.
    """
    _change(folder / "config.json", _config)
    _change(folder / "tokenizer_config.json", _tokenizer)


def name_label(config: Any) -> None:
    """Call the one output of a model whose config has no name for it a reward."""
    if config.id2label == {0: "LABEL_0"}:
        config.id2label, config.label2id = {0: "reward"}, {"reward": 0}


def _change(path: Path, changed: Any) -> None:
    if path.exists() and (new := changed(old := read_object(path))) != old:
        write_json(path, new)


def _config(values: dict[str, Any]) -> dict[str, Any]:
    if str(values.get("model_type")).startswith(PREFIX):
        return values
    rope = values.get("rope_parameters")
    older: dict[str, Any] = {}
    if isinstance(rope, dict) and "rope_theta" in rope:  # else one for each kind of layer, or none
        older = {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
        if rope.get("rope_type", "default") != "default":
            older["rope_scaling"] = {name: value for name, value in rope.items() if name not in older}
    return {**older, **values}


def _tokenizer(values: dict[str, Any]) -> dict[str, Any]:
    kind = values.get("tokenizer_class")
    if kind not in TOKENIZERS:
        return values
    renamed = {name: value for name, value in values.items() if name != "backend"}
    more = renamed.get("extra_special_tokens")
    if isinstance(more, list):  # which version 4 has as a dictionary, and such a list under another name
        renamed["additional_special_tokens"] = renamed.pop("extra_special_tokens")
    inputs = {"model_input_names": ["input_ids", "attention_mask"]}
    return {**inputs, **renamed, "tokenizer_class": TOKENIZERS[kind]}
