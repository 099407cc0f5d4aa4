"""Merge coefficients that learn a step at a time: the reward model is their merge, and nothing else changes.

Shapes: L blocks, N weighted members, V numbers that learn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moemerge.fitting.initial import START_SHARED
from moemerge.fitting.methods.uniform import equal_alpha_LN
from moemerge.fitting.space import SMALLEST_START, along
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
            linear = along(merge, *self._point())
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
    blocks, shared = source.blocks(), START_SHARED if source.has_shared else 0.0
    alpha_LN = equal_alpha_LN(len(blocks), source.num_members)
    shared_L = torch.full((len(blocks),), shared, dtype=torch.float64)
    return Coefficients(blocks, alpha_LN, shared_L, {"method": "uniform"})
