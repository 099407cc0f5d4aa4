"""How far the members of a merge disagree on a text: what the merge itself does not say.

Shapes: L rows of coefficients, N members (routed experts, or models), T texts, M points: the merge, then N.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moemerge.data.tokenise import Encoded
from moemerge.merging.merged_model import MergedModel
from moemerge.models.scoring import score

Point = tuple[Tensor, Tensor]  # alpha_LN, shared_L


@dataclass(frozen=True)
class SpreadScores:
    """Scores of texts by a merge (`merged_T`) and by each of its members (`members_NT`), float32 on CPU."""

    merged_T: Tensor
    members_NT: Tensor

    @property
    def mean_T(self) -> Tensor:
        """Mean over members."""
        return self.members_NT.mean(0)

    @property
    def spread_T(self) -> Tensor:
        """Standard deviation over members, in units of the score; of these N, not an estimate for more."""
        return self.members_NT.std(0, correction=0)

    def calibrated(self, reference: SpreadScores) -> SpreadScores:
        """The same with each member shifted so that all have one mean over the texts of `reference`.

        Bradley-Terry training leaves a score's constant open; unlike ones would pass for disagreement.
        """
        # Shifted to the mean of all levels, so that the members' mean score stays what it was.
        level_N = reference.members_NT.mean(1)
        return SpreadScores(self.merged_T, self.members_NT + (level_N.mean() - level_N)[:, None])

    def pessimistic_T(self, k: float) -> Tensor:
        """mean - k * spread: what members do not agree on counts for less.

        As uncertainty-weighted optimisation (Coste et al., arXiv 2310.02743), which takes off the variance.
        """
        return self.mean_T - k * self.spread_T


def score_with_spread(
    merged: MergedModel, tokenizer: PreTrainedTokenizerBase, encoded: Sequence[Encoded], batch_tokens: int
) -> SpreadScores:
    """Scores of `encoded` by the merge and by its N members.

    A member is the merge with all routed weight on one expert: lambda_l W_shared + (1 - lambda_l) W_i in each
    row l, lambda as in `merged`. Costs N + 1 forward passes of the dense model, one copy of it, and a
    re-merge before each. `merged` is left as it was.
    """
    alpha_LN, shared_L = merged.alpha_LN, merged.shared_L
    points = [(alpha_LN, shared_L), *member_points(alpha_LN, shared_L)]
    scores_MT = score_points(merged, tokenizer, encoded, points, batch_tokens)
    return SpreadScores(scores_MT[0], scores_MT[1:])


def member_points(alpha_LN: Tensor, shared_L: Tensor) -> list[Point]:
    """The point of each member: in all rows its weight is one, and that of the shared expert as given."""
    return [(one_N.expand_as(alpha_LN), shared_L) for one_N in torch.eye(alpha_LN.shape[1]).double()]


def score_points(
    merged: MergedModel,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Sequence[Encoded],
    points: Sequence[Point],
    batch_tokens: int,
) -> Tensor:
    """Scores of `encoded` by the merge at each point, [points, T]; `merged` is left as it was."""
    start = merged.alpha_LN, merged.shared_L
    scores: list[Tensor] = []
    try:
        for number, point in enumerate(points, start=1):
            merged.merge(*point)
            bar = f"merge {number} of {len(points)}"
            scores.append(score(merged.model, tokenizer, encoded, batch_tokens, progress=bar))
    finally:
        merged.merge(*start)
    return torch.stack(scores)
