"""config.json of a model as it lies on disk: bounded, and what may stand in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moemerge.artifacts.json_file import read_object
from moemerge.models.config_values import MAX_LAYERS, check_values, entries

MAX_CONFIG_BYTES = 10_000_000
# By these, transformers would fetch a kernel from the hub, or read other weights than the folder's own.
ELSEWHERE = ("attn_implementation", "_attn_implementation", "experts_implementation", "transformers_weights")
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a model folder, where what every model has is of its type. Raises as read_object."""
    config = read_object(folder / "config.json", MAX_CONFIG_BYTES)
    for name, value in entries(config):
        if name in ELSEWHERE and ("/" in str(value) or (name == "transformers_weights" and value)):
            raise ValueError(f"{name} {value!r} names code or weights that are not in the folder")
    heads = config.get("architectures")
    kind = config.get("model_type", "")
    if not isinstance(kind, str):
        raise ValueError(f"model_type {kind!r} is no text")
    if heads is not None and not (isinstance(heads, list) and all(isinstance(head, str) for head in heads)):
        raise ValueError(f"architectures {heads!r} is no list of texts")
    for name in (name for name in LAYERS if config.get(name) is not None):
        number = config[name]
        if isinstance(number, bool) or not isinstance(number, int) or not 0 < number <= MAX_LAYERS:
            raise ValueError(f"{name} {number!r} is no number from 1 to {MAX_LAYERS}")
    check_values(config)
    return config
