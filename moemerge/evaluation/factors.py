"""What each factor of a head with factors (BNRM, arXiv 2602.10623) does for scores, and where it is largest.

A score is the sum over factors k of m_k(state) w_k, so a factor's part in the spread of scores is exact: the
covariance of m_k w_k with the score, over the score's variance, sums to one over the factors.

N answers (chosen and rejected one after the other), P pairs, K factors, D width of a state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import spearmanr

from moemerge.data.pairs import Pair
from moemerge.evaluation.probes.edit_effects import excerpt
from moemerge.evaluation.probes.edits import last_message
from moemerge.models.heads.mlp import LEAST, MlpHead
from moemerge.reports.statistics import Floats
from moemerge.reports.table import Table

TOLD = 15


@dataclass(frozen=True)
class Factor:
    """number: its place in the head. weight: w_k.

    share: its part in the variance of the answers' scores; below 0 where it works against the others. adds:
    standard deviation of m_k w_k, in standard deviations of scores. lit: answers in which m_k is not at its
    floor. right: pairs whose chosen answer gets more of it, among those in which both differ. length: rank
    correlation of m_k w_k with the answer's length in tokens. None where there is nothing to compare.
    brightest: the numbers of the answers that get most of it by size.
    """

    number: int
    weight: float
    share: float
    adds: float
    lit: float
    right: float | None
    length: float | None
    brightest: list[int]


def parts_of(head: MlpHead, states_ND: Floats) -> tuple[Floats, Floats]:
    """What each factor adds to each score, [N, K], and the weights [K]; float64, without noise."""
    with torch.inference_mode():
        states = torch.from_numpy(states_ND).to(head.weights.device)
        weights_K = head.weight_means(states.dtype)
        parts_NK = (head.means(states) * weights_K).cpu().numpy()
    return parts_NK, weights_K.cpu().numpy()


def factors(parts_NK: Floats, weights_K: Floats, lengths_N: Sequence[int]) -> list[Factor]:
    """Every factor that moves scores, the largest share (by size) first."""
    scores_N = parts_NK.sum(1)
    spread = float(scores_N.std()) or 1.0
    shares_K = (parts_NK - parts_NK.mean(0)).T @ (scores_N - scores_N.mean()) / len(scores_N) / spread**2
    order = np.argsort(-np.abs(shares_K), kind="stable")
    moving = [int(k) for k in order if np.ptp(parts_NK[:, k]) > 0]
    return [_factor(k, parts_NK[:, k], weights_K[k], shares_K[k], spread, lengths_N) for k in moving]


def _factor(
    number: int, parts_N: Floats, weight: float, share: float, spread: float, lengths_N: Sequence[int]
) -> Factor:
    differences_P = parts_N[::2] - parts_N[1::2]
    unlike_P = differences_P[differences_P != 0]
    correlation = spearmanr(parts_N, lengths_N).statistic if np.ptp(lengths_N) else None
    sizes_N = np.abs(parts_N)
    return Factor(
        number,
        float(weight),
        float(share),
        float(parts_N.std()) / spread,
        float((sizes_N > 2 * LEAST * abs(weight)).mean()),
        float((unlike_P > 0).mean()) if len(unlike_P) else None,
        None if correlation is None else float(correlation),
        [int(n) for n in np.argsort(-sizes_N, kind="stable")[:3]],
    )


def factor_table(found: Sequence[Factor], pairs: Sequence[Pair]) -> Table:
    """The factors that move scores most, each with the answer that gets most of it."""
    answers = [answer for pair in pairs for answer in (pair.chosen, pair.rejected)]
    rows = [
        [
            str(factor.number),
            f"{factor.share:+.1%}",
            f"{factor.adds:.3f}",
            f"{factor.lit:.0%}",
            "" if factor.right is None else f"{factor.right:.0%}",
            "" if factor.length is None else f"{factor.length:+.2f}",
            excerpt(last_message(answers[factor.brightest[0]])),
        ]
        for factor in found[:TOLD]
    ]
    note = (
        f"{len(found)} factors move scores. Share: of the variance of the answers' scores; all sum to 100 %. "
        "Adds: standard deviation of what the factor adds, in standard deviations of scores. Lit: answers in "
        "which it is above 0. Right: pairs whose chosen answer gets more of it. Length: rank correlation "
        "with the answer's number of tokens; a factor near 1 pays for length."
    )
    header = ["factor", "share", "adds", "lit", "right", "length", "answer that gets most of it"]
    return Table("Factors of the reward head", header, rows, note)
