"""Speculative experts (UMM-RM, arXiv 2512.00724): those to which bad answers that score high are routed.

Shapes: L layers with experts, N routed experts, P pairs, T texts, R resamples, X columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moemerge.data.tokenise import EncodedPair, texts_of
from moemerge.errors import DataError
from moemerge.models.moe_settings import MoeSettings
from moemerge.models.routing import gate_mass
from moemerge.reports.statistics import Floats, bootstrap_means, cluster_sums, percentile_interval

LEAST_PAIRS = 8
HIGH_SHARE = 0.25


@dataclass(frozen=True)
class Ratio:
    """Ratios of gate mass, and both ends of their intervals, [L, N] each."""

    value: Floats
    low: Floats
    high: Floats


@dataclass(frozen=True)
class Speculation:
    """Gate mass per token on rejected answers that score high, relative to others.

    High are the top quarter of the rejected answers by the MoE's own score. over_rejected: relative to the
    other rejected answers; over_chosen: to the chosen ones. Intervals are by bootstrap over pairs, with the
    choice of the high ones held fixed.
    """

    layers: list[int]
    over_rejected: Ratio
    over_chosen: Ratio

    @property
    def suspects(self) -> list[tuple[int, int]]:
        """(layer, expert) of the experts both of whose intervals lie above 1."""
        suspects_X2 = np.argwhere((self.over_rejected.low > 1) & (self.over_chosen.low > 1))
        return [(self.layers[row], int(expert)) for row, expert in suspects_X2]


def measure_speculation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[EncodedPair],
    batch_tokens: int,
    seed: int,
    confidence: float = 0.95,
    resamples: int = 1000,
) -> Speculation:
    """Gate mass on rejected answers that score high, by expert.

    One pass of the MoE over both sides of `pairs`. Raises DataError for fewer than 8.
    """
    if len(pairs) < LEAST_PAIRS:
        raise DataError(
            "too few pairs to look for speculative experts",
            given=str(len(pairs)),
            expected=f"{LEAST_PAIRS} at least",
            fix="give more pairs, or set diversity to weights in route",
        )
    texts = texts_of(pairs)
    scores_T, mass_TLN = gate_mass(model, tokenizer, texts, batch_tokens)
    tokens_P2 = np.array([len(text.ids) for text in texts], dtype=float).reshape(-1, 2)
    mass_P2LN = mass_TLN.numpy().reshape(len(pairs), 2, *mass_TLN.shape[1:])
    # A ratio of sums over pairs, not a mean of ratios: so the bootstrap draws the sums, and divides after
    # that. It draws means; their common denominator, the number of pairs, falls out of a ratio.
    sums_PX = _columns(scores_T.numpy()[1::2], mass_P2LN, tokens_P2)
    draws_RX = bootstrap_means(cluster_sums(sums_PX, np.arange(len(pairs))), resamples, seed)
    draws_RX = draws_RX[(draws_RX[:, -3:] > 0).all(1)]  # a draw without any high answer has no ratio
    ratios = []
    for ratio in (_over_rejected, _over_chosen):
        with np.errstate(divide="ignore", invalid="ignore"):  # an expert that nobody uses has no ratio
            value_X = ratio(sums_PX.sum(0)[None])[0]
            low_X, high_X = percentile_interval(ratio(draws_RX), confidence)
        ratios.append(Ratio(*(x.reshape(mass_TLN.shape[1:]) for x in (value_X, low_X, high_X))))
    return Speculation(MoeSettings.read(model.config.moemerge).layers, *ratios)


def _columns(rejected_P: Floats, mass_P2LN: Floats, tokens_P2: Floats) -> Floats:
    """Per pair: masses on high, other rejected and chosen answers, [3 L N]; then the tokens of the three."""
    count = len(rejected_P)
    # 1 for the quarter of rejected answers that score highest. Fixed here, before anything is resampled.
    high_P1 = np.zeros((count, 1))
    high_P1[np.argsort(-rejected_P, kind="stable")[: math.ceil(HIGH_SHARE * count)]] = 1
    chosen_PX, rejected_PX = (mass_P2LN[:, side].reshape(count, -1) for side in (0, 1))
    chosen_P1, tokens_P1 = tokens_P2[:, :1], tokens_P2[:, 1:]
    masses = (rejected_PX * high_P1, rejected_PX * (1 - high_P1), chosen_PX)
    return np.hstack([*masses, tokens_P1 * high_P1, tokens_P1 * (1 - high_P1), chosen_P1])


def _over_rejected(sums_RX: Floats) -> Floats:
    """Mass per token on high rejected answers over that on other rejected ones; columns as of _columns."""
    high_RX, others_RX, _ = np.split(sums_RX[:, :-3], 3, axis=1)
    return (high_RX / sums_RX[:, -3:-2]) / (others_RX / sums_RX[:, -2:-1])


def _over_chosen(sums_RX: Floats) -> Floats:
    """Mass per token on high rejected answers over that on chosen ones."""
    high_RX, _, chosen_RX = np.split(sums_RX[:, :-3], 3, axis=1)
    return (high_RX / sums_RX[:, -3:-2]) / (chosen_RX / sums_RX[:, -1:])
