"""Blocks: sets of tensors that share one row of merge coefficients, and what they are called.

`layers.3` is a transformer layer, `layers.3.mlp.up_proj` one of its modules (weight and bias), `head` the
reward head, `outside` the rest: embeddings, last norm.
"""

from __future__ import annotations

import re

HEAD, OUTSIDE = "head", "outside"
BLOCK_NAME = re.compile(r"head|outside|layers\.\d+(\.[\w.-]+)?")
_LAYER = re.compile(r"layers\.(\d+)")
_NUMBERED = re.compile(r"(?:^|\.)(\d+)\.(.+?)(?:\.(?:weight|bias))?$")


def blocks_of(name: str, in_head: bool = False) -> tuple[str, ...]:
    """The blocks that the dense tensor `name` may belong to, the finest first."""
    if in_head:
        return (HEAD,)
    found = _NUMBERED.search(name)
    if found is None:
        return (OUTSIDE,)
    layer, module = found.groups()
    return f"layers.{layer}.{module}", f"layers.{layer}"


def layer_of(block: str) -> int | None:
    """The number of the transformer layer that `block` is in; None for outside and head."""
    found = _LAYER.match(block)
    return int(found.group(1)) if found else None


def block_order(block: str) -> tuple[int, int, str]:
    """Sorts `outside` first, then layers by number, then the head."""
    layer = layer_of(block)
    return (2 * (block == HEAD), 0, block) if layer is None else (1, layer, block)
