"""What score differences say: loss, accuracy, paired intervals, and whether a gain may be chance.

Shapes: P pairs, K candidate points, G prompts, R random draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from moemerge.models.scoring import loss_and_accuracy
from moemerge.reports.statistics import (
    Floats,
    bootstrap_means,
    cluster_sums,
    likeliest_slope,
    percentile_interval,
)

DRAWS = 4000
CONFIDENCE = 0.95


def measures(margins_P: Tensor) -> dict[str, float]:
    """Mean Bradley-Terry loss in nats and accuracy (ties are errors) of score differences."""
    loss, accuracy = loss_and_accuracy(margins_P)
    return {"loss": loss, "accuracy": accuracy}


def calibrated_losses(margins_P: Tensor) -> Tensor:
    """Bradley-Terry loss of each pair after the factor on all margins that makes the mean lowest.

    A model that says the same louder is not better by that. No factor is below 0: a model that is wrong more
    often than right has log 2 throughout. Where no pair is wrong, right ones have 0.
    """
    slope = likeliest_slope(margins_P.numpy())
    if math.isinf(slope) and slope > 0:
        return torch.where(margins_P > 0, 0.0, math.log(2))
    return -logsigmoid(margins_P * (slope if slope > 0 and math.isfinite(slope) else 0.0))


def gain(before_P: Tensor, after_P: Tensor) -> dict[str, float]:
    """How much lower the loss got, per pair, with the standard error of that mean."""
    gain_P = logsigmoid(after_P) - logsigmoid(before_P)
    error = float(gain_P.std() / math.sqrt(len(gain_P))) if len(gain_P) > 1 else math.inf
    return {"mean": float(gain_P.mean()), "standard_error": error}


def paired(before_P: Tensor, after_P: Tensor, prompts: Sequence[int], seed: int) -> dict[str, Any]:
    """Change of mean loss and of accuracy from `before_P` to `after_P`, each with a 95 % interval.

    Bootstrap over prompts, the same ones before and after.
    """
    loss_P = logsigmoid(before_P) - logsigmoid(after_P)
    accuracy_P = (after_P > 0).double() - (before_P > 0).double()
    loss, accuracy = mean_changes(torch.stack([loss_P, accuracy_P], 1), prompts, seed)
    return {"loss": loss, "accuracy": accuracy}


def mean_changes(changes_PX: Tensor, prompts: Sequence[int], seed: int) -> list[dict[str, float]]:
    """Mean of each column of pairs' changes with its 95 % interval: bootstrap over prompts."""
    values_PX = changes_PX.double().numpy()
    draws_RX = bootstrap_means(cluster_sums(values_PX, np.asarray(prompts)), DRAWS, seed)
    ends = zip(values_PX.mean(0), *percentile_interval(draws_RX, CONFIDENCE), strict=True)
    return [{"change": float(mean), "low": float(low), "high": float(high)} for mean, low, high in ends]


def chance(gains_KP: Tensor, best: int, prompts: Sequence[int], seed: int) -> float:
    """One-sided p of point `best`: how often chance lets the best of all K points look as good.

    gains_KP: how much lower each point's loss is, pair by pair. Signs of whole prompts are flipped at random,
    the same for every point, and the largest studentised sum is compared with that of `best`: a paired test
    that knows that `best` was chosen among K. Exact if gains without an effect are symmetric.
    Source: max-T permutation, Westfall and Young, Resampling-Based Multiple Testing (1993).
    """
    sums_GK = cluster_sums(gains_KP.T.numpy(), np.asarray(prompts))[:, :-1]
    scale_K = np.sqrt((sums_GK**2).sum(0))
    if not scale_K[best]:
        return 1.0
    # With random signs a sum over prompts has mean 0 and variance scale^2: divided by the scale, points that
    # moved little and points that moved much can be compared. A point without gains, as the start, gives 0.
    unit_GK = sums_GK / np.where(scale_K > 0, scale_K, np.inf)
    drawn_R = _flipped_maxima(unit_GK, np.random.default_rng(seed))
    # Draws that equal the observed value up to rounding count as at least as large. The observed signs are
    # one draw more (the 1 + ...): without it p could be 0, and the test would not keep its level.
    return float((1 + (drawn_R >= unit_GK[:, best].sum() - 1e-9).sum()) / (1 + DRAWS))


def _flipped_maxima(unit_GK: Floats, random: np.random.Generator) -> Floats:
    """For each draw of the prompts' signs the largest sum over the points, [R]."""
    signs_RG = random.integers(0, 2, size=(DRAWS, len(unit_GK)), dtype=np.int8) * 2 - 1
    return (signs_RG.astype(np.float64) @ unit_GK).max(1)
