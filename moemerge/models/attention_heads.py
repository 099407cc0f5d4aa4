"""The attention heads of a language model's trunk: what each gives at one token, read or replaced.

A head's activation is its part of the input of attention's output projection, so that grouped queries, fused
projections and heads of any size are all alike.

B texts, T tokens, L layers, H heads, E numbers of a head.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moemerge.errors import UnsupportedError
from moemerge.models.families import family_of

# What architectures call the output projection of attention, below a transformer layer.
PROJECTION = re.compile(r"(^|\.)\w*att(n|ention)\w*(\.\w+)*?\.(o_proj|out_proj|c_proj|dense|Wo)$")
# Of a layer's heads at the tokens looked at, [B, H, E]; None: they stay as they are.
Change: TypeAlias = Callable[[int, Tensor], Tensor | None]


class AttentionHeads:
    """The heads of all layers. Raises UnsupportedError where they cannot be told apart."""

    def __init__(self, trunk: PreTrainedModel) -> None:
        family = family_of(trunk.config)
        if not family.causal:
            raise _unsupported(trunk, "an encoder")
        layers = trunk.get_submodule(family.layers)
        self._projections = [_projection(trunk, layer) for layer in layers.children()]
        sizes = {_inputs(projection) for projection in self._projections}
        self.layers, self.heads = (
            len(self._projections),
            int(trunk.config.get_text_config().num_attention_heads),
        )
        if len(sizes) != 1 or min(sizes) % self.heads:
            raise _unsupported(trunk, f"{self.heads} heads, output projections of {sorted(sizes)} inputs")
        self.size = min(sizes) // self.heads

    @property
    def shape(self) -> tuple[int, int, int]:
        """L, H, E."""
        return self.layers, self.heads, self.size

    @contextmanager
    def reading(self, positions_B: Tensor) -> Iterator[list[Tensor]]:
        """While open, a pass adds each layer's activations at these tokens, [B, H, E] float32 on the CPU."""
        read: list[Tensor] = []

        def keep(_: int, x_BHE: Tensor) -> None:
            read.append(x_BHE.float().cpu())

        with self._hooked(positions_B, keep):
            yield read

    @contextmanager
    def replacing(self, positions_B: Tensor, values_LHE: Tensor, masks_BLH: Tensor) -> Iterator[None]:
        """While open, passes have `values_LHE` at these tokens for the heads in each text's mask."""

        def replace(layer: int, x_BHE: Tensor) -> Tensor:
            return torch.where(masks_BLH[:, layer, :, None], values_LHE[layer].to(x_BHE), x_BHE)

        with self._hooked(positions_B, replace):
            yield

    @contextmanager
    def _hooked(self, positions_B: Tensor, change: Change) -> Iterator[None]:
        with ExitStack() as stack:
            for layer, projection in enumerate(self._projections):
                hook = partial(self._at, layer, positions_B, change)
                stack.callback(projection.register_forward_pre_hook(hook).remove)
            yield

    def _at(
        self, layer: int, positions_B: Tensor, change: Change, _: nn.Module, inputs: tuple[Any, ...]
    ) -> tuple[Any, ...] | None:
        x_BTX, rows_B = inputs[0], torch.arange(len(positions_B), device=positions_B.device)
        now_BX = x_BTX[rows_B, positions_B]
        then_BHE = change(layer, now_BX.view(-1, self.heads, self.size))
        if then_BHE is None:
            return None
        changed_BTX = x_BTX.clone()
        changed_BTX[rows_B, positions_B] = then_BHE.reshape(now_BX.shape)
        return (changed_BTX, *inputs[1:])


def _projection(trunk: PreTrainedModel, layer: nn.Module) -> nn.Module:
    found = {name: part for name, part in layer.named_modules() if PROJECTION.search(name)}
    if len(found) != 1:
        raise _unsupported(
            trunk, f"layers with {', '.join(found) or 'no known output projection of attention'}"
        )
    return next(iter(found.values()))


def _inputs(projection: nn.Module) -> int:
    """How many numbers a projection takes; GPT-2's are stored the other way round."""
    weight: Any = projection.weight
    size: int = weight.shape[0] if type(projection).__name__ == "Conv1D" else weight.shape[1]
    return size


def _unsupported(trunk: PreTrainedModel, given: str) -> UnsupportedError:
    return UnsupportedError(
        f"the attention heads of {type(trunk).__name__} are not known",
        given=f"model_type {trunk.config.model_type}: {given}",
        expected="a decoder whose every layer has one output projection of attention, heads of one size",
        fix="take a language model of another architecture, or a judge in place of an activation scorer",
    )
