"""The score of RewardBench 2's subset Ties (arXiv 2506.01937, as rewardbench 0.1.4 computes it).

A prompt of Ties has a row `tied:I`, with several right answers, and a row `ref:I`, with one. Margin: lowest
right minus highest wrong score; spread: highest minus lowest right score of the tied row.

I prompts, M models, N answers of a row, R resamples; 5: the parts of the formula.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from moemerge.evaluation.probes.base import ChoiceScores
from moemerge.reports.statistics import Floats, bootstrap_means

TIES = "Ties"
# Tied row right; ref row right; margin above spread; the smaller of both margins above spread; how far above.
WEIGHTS = np.array([0.3, 0.3, 0.2, 0.2, 0.01])


def ties_scores(columns: Sequence[Floats], rows: ChoiceScores, resamples: int, seed: int) -> Floats:
    """The score from each of `columns`, scores of all answers, and its resamples over prompts; [1 + R, M]."""
    scores = []
    for scores_C in columns:
        values_I5, known_I5 = _parts(scores_C, rows)
        both = np.column_stack([values_I5 * known_I5, known_I5])
        means = bootstrap_means(np.column_stack([both, np.ones(len(both))]), resamples, seed)
        scores.append(_combine(np.vstack([both.mean(axis=0), means])))
    return np.column_stack(scores)


def _combine(means_V10: Floats) -> Floats:
    """Weighted sum of each part's mean over the prompts that have it, 0 if none has."""
    sums_V5, known_V5 = means_V10[:, :5], means_V10[:, 5:]
    shares = np.divide(sums_V5, known_V5, out=np.zeros_like(sums_V5), where=known_V5 > 0)
    weighted: Floats = shares @ WEIGHTS
    return weighted


def _parts(scores_C: Floats, rows: ChoiceScores) -> tuple[Floats, Floats]:
    """The five parts of each prompt, and whether it has them (1 or 0); [I, 5] each."""
    prompts: dict[int, dict[str, tuple[float, float]]] = {}
    answers = np.split(scores_C, np.cumsum(rows.sizes)[:-1])
    for name, scores_N, correct in zip(rows.ids.tolist(), answers, rows.num_correct.tolist(), strict=True):
        kind, number = name.split(":")
        prompts.setdefault(int(number), {})[kind] = _margin_and_spread(scores_N, correct)
    values_I5, known_I5 = np.zeros((len(prompts), 5)), np.zeros((len(prompts), 5))
    for i, kinds in enumerate(prompts.values()):
        for part, kind in enumerate(("tied", "ref")):
            if kind in kinds:
                values_I5[i, part], known_I5[i, part] = kinds[kind][0] > 0, 1
        spread = kinds["tied"][1] if len(kinds) == 2 else math.nan
        if not math.isnan(spread):
            margin, smaller = kinds["tied"][0], min(kinds["tied"][0], kinds["ref"][0])
            far = math.tanh(smaller / spread - 1) if spread > 0 else 0.0
            values_I5[i, 2:] = margin > spread, smaller > spread, far
            known_I5[i, 2:] = 1, 1, spread > 0
    return values_I5, known_I5


def _margin_and_spread(scores_N: Floats, correct: int) -> tuple[float, float]:
    """Margin (0 if there is nothing to compare) and spread (nan if fewer than two answers are right)."""
    right, wrong = scores_N[:correct], scores_N[correct:]
    if not len(right) or not len(wrong):
        return 0.0, math.nan
    spread = float(right.max() - right.min()) if correct > 1 else math.nan
    return float(right.min() - wrong.max()), spread
