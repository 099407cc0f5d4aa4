"""The stock head: one matrix. It is only drawn here; models have that of their own class."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moemerge.models.heads.base import Head, WideLinear

if TYPE_CHECKING:
    from moemerge.models.heads.saved import SavedHead


class LinearHead(Head):
    """score = v . h (+ c where the architecture's head has a bias, which begins as 0)."""

    stock = True

    def __init__(self, in_features: int, settings: SavedHead) -> None:
        super().__init__(in_features, settings)
        self.output = WideLinear(in_features, 1, bias=False)

    def score(self, states: Tensor) -> Tensor:
        """[..., D] -> [...]."""
        scores: Tensor = self.output(states)[..., 0]
        return scores

    def draw(self, generator: torch.Generator, start: str) -> None:
        """As torch draws a fresh layer."""
        self.output.draw(generator)
