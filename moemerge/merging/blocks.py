"""Blocks: sets of tensors that share one row of merge coefficients, and what they are called.

`layers.3` is a transformer layer, `layers.3.mlp.up_proj` one of its modules (weight and bias), `head` the
reward head, `outside` the rest: embeddings, last norm.
"""

from __future__ import annotations

import re

HEAD, OUTSIDE = "head", "outside"
MLP, ATTENTION = "mlp", "attention"  # the kinds of tensors in a layer: its MLP, and whatever else it has
BLOCK_NAME = re.compile(r"head|outside|layers\.\d+(\.[\w.-]+)?")
_LAYER = re.compile(r"layers\.(\d+)")
_NUMBERED = re.compile(r"(?:^|\.)(\d+)\.(.+?)(?:\.(?:weight|bias))?$")


def blocks_of(name: str, in_head: bool = False) -> tuple[str, ...]:
    """The blocks that the dense tensor `name` may belong to, the finest first."""
    if in_head:
        return (HEAD,)
    # The first number in a name is its layer's: model.layers.3.mlp.up_proj.weight, h.3.mlp.c_fc.bias. Without
    # its ending .weight or .bias, what follows is the module: both tensors of it share a row.
    numbered = _NUMBERED.search(name)
    if numbered is None:
        return (OUTSIDE,)
    layer, module = numbered.groups()
    return f"layers.{layer}.{module}", f"layers.{layer}"


def layer_of(block: str) -> int | None:
    """The number of the transformer layer that `block` is in; None for outside and head."""
    layer = _LAYER.match(block)
    return int(layer.group(1)) if layer else None


def block_order(block: str) -> tuple[int, int, str]:
    """Sorts `outside` first, then layers by number, then the head."""
    layer = layer_of(block)
    return (2 * (block == HEAD), 0, block) if layer is None else (1, layer, block)
