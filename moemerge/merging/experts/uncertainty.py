"""How far the members of a merge disagree on a text: what the merge itself does not say.

Shapes: L rows of coefficients, N members (routed experts, or models), T texts, M points: the merge, then N.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moemerge.data.tokenise import Encoded
from moemerge.errors import OptionError
from moemerge.merging.merged_model import MergedModel
from moemerge.models.scoring import score
from moemerge.options.base import Coordinates

Point = tuple[Tensor, Tensor]  # alpha_LN, shared_L


@dataclass(frozen=True)
class SpreadScores:
    """Scores of texts by a merge (`merged_T`) and by each of its members (`members_NT`), float32 on CPU.

    `coordinates` are the merge's: an average stands for its members, a sum for more than they say one by one.
    """

    merged_T: Tensor
    members_NT: Tensor
    coordinates: Coordinates = "average"

    @property
    def mean_T(self) -> Tensor:
        """Mean over members."""
        return self.members_NT.mean(0)

    @property
    def centre_T(self) -> Tensor:
        """What the spread lies around: the members' mean, of a sum the merge's own score."""
        # Members that know different things outvote one another: their mean may know nothing at all.
        return self.merged_T if self.coordinates == "sum" else self.mean_T

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
        return replace(self, members_NT=self.members_NT + (level_N.mean() - level_N)[:, None])

    def pessimistic_T(self, k: float) -> Tensor:
        """centre - k * spread: what members do not agree on counts for less.

        As uncertainty-weighted optimisation (Coste et al., arXiv 2310.02743), which takes off the variance.
        """
        return self.centre_T - k * self.spread_T


def score_with_spread(
    merged: MergedModel,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Sequence[Encoded],
    batch_tokens: int,
    coordinates: Coordinates = "average",
) -> SpreadScores:
    """Scores of `encoded` by the merge and by its N members, as `member_points` has them.

    `coordinates` are those of the coefficients. Where heads are on one scale (`scales` of the source), so are
    the scores: a member's are its own divided by its scale. Costs N + 1 forward passes of the dense model,
    one copy of it, and a re-merge before each. `merged` is left as it was. Raises OptionError for a sum's
    coefficients that are not said to be one.
    """
    alpha_LN, shared_L = merged.alpha_LN, merged.shared_L
    points = [(alpha_LN, shared_L), *member_points(alpha_LN, shared_L, coordinates)]
    scores_MT = score_points(merged, tokenizer, encoded, points, batch_tokens)
    return SpreadScores(scores_MT[0], scores_MT[1:], coordinates)


def member_points(alpha_LN: Tensor, shared_L: Tensor, coordinates: Coordinates = "average") -> list[Point]:
    """The point of each member i: the merge with all routed weight on it, in every row.

    Of an average lambda_l W_shared + (1 - lambda_l) W_i, lambda as given. Of a sum W_i itself, its change
    taken once whatever c_i is: (1 - lambda_l) W_i would be sum_j c_j times a change that was trained once,
    and W_shared + c_i (W_i - W_shared) would differ between members that agree, by their c alone.
    """
    if coordinates == "sum":
        shared_L = torch.zeros_like(shared_L)
    elif bool((alpha_LN < 0).any() or (shared_L < 0).any() or (shared_L > 1).any()):
        raise OptionError(
            "members of an average are asked for, and the coefficients are a sum's",
            given=f"alpha down to {float(alpha_LN.min()):.4g}, shared weights {float(shared_L.min()):.4g} to "
            f"{float(shared_L.max()):.4g}, coordinates average",
            expected="alpha >= 0 and shared weights in [0, 1] in an average",
            fix="give coordinates, as the coefficients have them: coordinates=coefficients.coordinates",
        )
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
