"""How much the experts of a MoE differ, in weights and in scores, and whether they can be merged.

Shapes: L layers with experts, N routed experts, M members (the N, after the shared expert if there is one),
P pairs, T texts, X elements of a tensor, or points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moemerge.data.tokenise import EncodedPair, texts_of
from moemerge.merging.average import as_average
from moemerge.merging.experts.uncertainty import Point, score_points
from moemerge.merging.merged_model import MergedModel
from moemerge.merging.sources.moe import MoeCheckpoint
from moemerge.models.scoring import bradley_terry

CHUNK = 2**20
STEPS = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Updates:
    """How the experts of each layer left their start, all matrices of the MLP taken together, float64.

    An update is expert minus shared expert; without one, minus the experts' mean, which alone makes the mean
    cosine -1 / (N - 1). cosine_LNN: between updates; NaN beside an expert that did not move. distance_LNN:
    between experts, as a share of the norm of what the updates start from. size_LN: of each update, likewise.
    """

    layers: list[int]
    cosine_LNN: Tensor
    distance_LNN: Tensor
    size_LN: Tensor


def measure_updates(source: MoeCheckpoint) -> Updates:
    """The updates of a MoE on disk. Holds the experts' copies of one tensor at a time."""
    settings = source.settings
    L, N = len(settings.layers), settings.num_routed_experts
    # Inner products add up over parts of a tensor and tensors of a layer: no layer is ever held whole.
    gram_LNN, start_L = torch.zeros(L, N, N, dtype=torch.float64), torch.zeros(L, dtype=torch.float64)
    for tensor in source.tensors:
        row = settings.layers.index(tensor.layer)
        copies_MX = torch.stack([matrix.flatten() for matrix in source.matrices(tensor)])
        for part_MX in copies_MX.split(CHUNK, dim=1):
            start_X, updates_NX = _from_start(part_MX.double(), settings.shared_expert)
            gram_LNN[row] += updates_NX @ updates_NX.T
            start_L[row] += start_X.square().sum()
    return _updates(settings.layers, gram_LNN, start_L.sqrt())


def _from_start(copies_MX: Tensor, has_shared: bool) -> tuple[Tensor, Tensor]:
    """What updates start from, and the updates."""
    if has_shared:
        return copies_MX[0], copies_MX[1:] - copies_MX[0]
    return copies_MX.mean(0), copies_MX - copies_MX.mean(0)


def _updates(layers: list[int], gram_LNN: Tensor, start_L: Tensor) -> Updates:
    """Cosines, distances and sizes from the inner products <u_i, u_j> of the updates."""
    square_LN = gram_LNN.diagonal(dim1=1, dim2=2)
    size_LN, cosine_LNN = sizes_and_cosines(gram_LNN)
    # |u_i - u_j|^2 = |u_i|^2 + |u_j|^2 - 2 <u_i, u_j>, which rounding may take just below 0. It is the
    # distance of the experts too: what they start from falls out of the difference.
    apart_LNN = (square_LN[:, :, None] + square_LN[:, None, :] - 2 * gram_LNN).clamp(min=0).sqrt()
    return Updates(layers, cosine_LNN, apart_LNN / start_L[:, None, None], size_LN / start_L[:, None])


def sizes_and_cosines(gram_LNN: Tensor) -> tuple[Tensor, Tensor]:
    """Norms, [L, N], and cosines, [L, N, N], of vectors from their inner products; NaN beside a zero one."""
    size_LN = gram_LNN.diagonal(dim1=1, dim2=2).sqrt()
    return size_LN, gram_LNN / (size_LN[:, :, None] * size_LN[:, None, :])


@dataclass(frozen=True)
class Disagreement:
    """How differently members judge the same texts.

    ratio: mean over texts of the standard deviation over members, divided by the standard deviation over
    texts of the members' mean score (both of these members and texts, no estimates for more). Each member's
    mean score is subtracted first: a constant means nothing in a reward. flips_NN: share of pairs on which
    two members prefer different answers.
    """

    ratio: float
    flips_NN: Tensor


def disagreement(scores_NP2: Tensor) -> Disagreement:
    """The disagreement of members that give these scores to chosen and rejected answers.

    A member that scores both alike counts as preferring the rejected one.
    """
    centred_NT = scores_NP2.double().flatten(1)
    centred_NT = centred_NT - centred_NT.mean(1, keepdim=True)
    spread, scale = centred_NT.std(0, correction=0).mean(), centred_NT.mean(0).std(correction=0)
    prefers_chosen_NP = scores_NP2[:, :, 0] > scores_NP2[:, :, 1]
    flips_NN = (prefers_chosen_NP[:, None] != prefers_chosen_NP[None]).double().mean(-1)
    return Disagreement(float(spread / scale), flips_NN)


def score_pairs_at(
    merged: MergedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[EncodedPair],
    points: Sequence[Point],
    batch_tokens: int,
) -> Tensor:
    """Scores of chosen and rejected answers by the merge at each point, [points, P, 2]."""
    texts = texts_of(pairs)
    return score_points(merged, tokenizer, texts, points, batch_tokens).unflatten(1, (len(pairs), 2))


def barriers(
    merged: MergedModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[EncodedPair], batch_tokens: int
) -> Tensor:
    """Loss barrier between any two members of a merge, [M, M], nats; the shared one, if any, comes first.

    Along the straight line from one member to the other, in all layers at once: the Bradley-Terry loss at a
    quarter, a half and three quarters of the way, minus the same mixture of the losses at the ends; the
    largest of the three, and at least 0, as at the ends (linear mode connectivity, arXiv 1912.05671).
    Costs M + 3 M (M - 1) / 2 passes of the dense model over `pairs`.
    """
    members = merged.alpha_LN.shape[1] + merged.source.has_shared
    lines = list(combinations(range(members), 2))
    points = [line_point(merged, end, end, 0.0) for end in range(members)]
    points += [line_point(merged, *ends, t) for ends in lines for t in STEPS]
    scores_XP2 = score_pairs_at(merged, tokenizer, pairs, points, batch_tokens)
    losses = [bradley_terry(scores_P2)[0] for scores_P2 in scores_XP2]
    barrier_MM = torch.zeros(members, members, dtype=torch.float64)
    inner = iter(losses[members:])  # behind the ends, the points of each line in turn
    for first, second in lines:
        above = [next(inner) - ((1 - t) * losses[first] + t * losses[second]) for t in STEPS]
        barrier_MM[first, second] = barrier_MM[second, first] = max(0.0, *above)
    return barrier_MM


def line_point(merged: MergedModel, start: int, end: int, t: float) -> Point:
    """The point at `t` in [0, 1] of the line from member `start` to member `end`, numbered as in barriers."""
    has_shared = merged.source.has_shared
    weight_M = torch.zeros(merged.alpha_LN.shape[1] + has_shared, dtype=torch.float64)
    weight_M[start] += 1 - t  # added, as both may be the same member
    weight_M[end] += t
    alpha_N, shared = as_average(weight_M, has_shared)
    return alpha_N.expand_as(merged.alpha_LN), torch.full_like(merged.shared_L, shared)
