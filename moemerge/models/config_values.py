"""Values in a config.json that no model can have, or by which transformers would make things without end.

It makes a label, a layer or an entry of a list for each of a number, before any weight is asked for. What its
classes refuse by themselves does not stand here. Imports nothing heavy.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

MAX_LAYERS, MAX_LABELS = 1000, 10_000
# Layers, and other parts that are made one by one. Only the window's number of layers makes none.
PARTS = (
    r"(?<!window_)layers?$|^depth$|^block_(sizes|repeats)$|^num_blocks$|_per_block$|^attention_types$|"
    r"_group_num$|_groups$|_networks$|_functions$|_dense_replace$"
)
# Names, with the least and the most that a number under one may be, alone or in a list.
RANGES = [
    (re.compile(names), least, most)
    for names, least, most in (
        (r"^_?num_labels$", 0, MAX_LABELS),
        (PARTS, -MAX_LAYERS, MAX_LAYERS),
        (r"^(hidden|vocab|intermediate)_size$|^num_(attention|key_value)_heads$", 1, math.inf),
        (r"^(n_embd|n_head|d_model)$", 1, math.inf),
        (r"^(head_dim|sliding_window)$", 0, math.inf),
        (r"^(rope_theta|factor)$", 1e-9, math.inf),
        (r"(?<!layer)drop(out)?(_prob|_rate)?$|pdrop$", 0, 1),
    )
]
ANSWERS = {"return_dict": True, "output_attentions": False}
DTYPES = ("bfloat16", "float16", "float32", "float64")


def check_values(config: dict[str, Any]) -> None:
    """Raise ValueError for a value that makes no sense, in the config or in one within it."""
    for name, value in entries(config):
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} {value} is not finite")
        for names, least, most in RANGES:
            if names.search(name):
                _check_range(name, value, least, most)
    for part in (config, config.get("text_config")):
        for name in ("dtype", "torch_dtype"):
            dtype = part.get(name) if isinstance(part, dict) else None
            if dtype is not None and str(dtype).removeprefix("torch.") not in DTYPES:
                raise ValueError(f"{name} {str(dtype)[:100]!r} is none of {', '.join(DTYPES)}")
    for name in ("id2label", "label2id"):
        if isinstance(config.get(name), dict) and len(config[name]) > MAX_LABELS:
            raise ValueError(f"{name} names {len(config[name])} labels, more than {MAX_LABELS}")
    for name, value in ANSWERS.items():
        if config.get(name, value) is not value:
            raise ValueError(f"{name} {str(config[name])[:100]} makes a model answer with more than scores")


def entries(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Names and values in a config and in the configs and lists within it."""
    queue: list[Any] = [config]
    while queue:
        value = queue.pop()
        if isinstance(value, dict):
            yield from value.items()
            queue += value.values()
        elif isinstance(value, list):
            queue += value


def _check_range(name: str, value: Any, least: float, most: float) -> None:
    queue = [value]
    if isinstance(value, str):
        raise ValueError(f"{name} {value[:100]!r} is no number")
    while queue:
        inner = queue.pop()
        if isinstance(inner, list):
            queue += inner
        elif isinstance(inner, int | float) and not least <= inner <= most:
            wanted = f"from {least} to {most}" if most < math.inf else f"of {least} or more"
            raise ValueError(f"{name} {str(inner)[:100]} is no number {wanted}")
    if name == "attention_types" and isinstance(value, list):
        if sum(len(kinds) * times for kinds, times in value) > MAX_LAYERS:
            raise ValueError(f"{name} stands for more than {MAX_LAYERS} layers")
