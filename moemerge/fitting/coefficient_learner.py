"""Merge coefficients that learn a step at a time: the reward model is their merge, and nothing else changes.

Shapes: L blocks, N weighted members, V numbers that learn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moemerge.fitting.space import SMALLEST_START
from moemerge.merging.coefficients import Coefficients
from moemerge.merging.merged_model import MergedModel
from moemerge.merging.sources.base import MergeSource


class CoefficientLearner:
    """Softmax logits of alpha in each block, and the logit of lambda where a member is shared, by Adam.

    A member without weight starts at 1e-4, so that it can come back. `model` is the merge, dense, in float32.
    """

    def __init__(
        self,
        source: MergeSource,
        tokenizer: PreTrainedTokenizerBase,
        start: Coefficients,
        rate: float,
        device: torch.device,
    ) -> None:
        self._source, self._start, self.tokenizer = source, start, tokenizer
        parts = [start.alpha_LN.clamp(min=SMALLEST_START).log().flatten()]
        if source.has_shared:
            parts.append(start.shared_L.clamp(SMALLEST_START, 1 - SMALLEST_START).logit())
        self._v_V = torch.cat(parts)
        self._v_V.requires_grad_()
        self._adam = torch.optim.Adam([self._v_V], lr=rate)
        dtype = torch.promote_types(source.dtype, torch.float32)
        self._merged = MergedModel(source, start.alpha_LN, start.shared_L, device, dtype, start.blocks)
        self.model = self._merged.model

    def step(self, parts: Sequence[Callable[[], Tensor]]) -> float:
        """One update against the sum of losses that `parts` compute, one after another; that sum."""
        merge = self._merged.gradient(parts)
        with torch.enable_grad():
            alpha_LN, shared_L = self._point()
            # The chain rule by autograd: <coefficients(v), their gradient held fixed> has the gradient dL/dv.
            linear = (alpha_LN * merge.alpha_LN).sum() + (shared_L * merge.shared_L).sum()
        (self._v_V.grad,) = torch.autograd.grad(linear, self._v_V)
        self._adam.step()
        self._merged.merge(*(values.detach() for values in self._point()))
        return merge.loss

    def coefficients(self) -> Coefficients:
        """The coefficients as they are now."""
        meta = {**self._start.meta, "method": "refreshed", **self._source.identity()}
        merged = self._merged
        return Coefficients(self._start.blocks, merged.alpha_LN, merged.shared_L, meta)

    def _point(self) -> tuple[Tensor, Tensor]:
        """alpha_LN and shared_L; gradients pass."""
        shape = self._start.alpha_LN.shape
        alpha_LN = self._v_V[: shape.numel()].view(shape).softmax(1)
        shared_L = self._v_V[shape.numel() :].sigmoid() if self._source.has_shared else self._start.shared_L
        return alpha_LN, shared_L


def equal_coefficients(source: MergeSource) -> Coefficients:
    """Equal weights in every layer, and half of it all for the shared member, if there is one."""
    blocks, count = source.blocks(), source.num_members
    alpha_LN = torch.full((len(blocks), count), 1 / count, dtype=torch.float64)
    shared_L = torch.full((len(blocks),), 0.5 if source.has_shared else 0.0, dtype=torch.float64)
    return Coefficients(blocks, alpha_LN, shared_L, {"method": "uniform"})
