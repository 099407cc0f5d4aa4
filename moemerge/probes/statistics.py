"""Intervals and tests that the probes share. K clusters, R resamples, X measured values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from scipy import stats

from moemerge.probes.base import Floats, Integers, Interval

BLOCK = 4_000_000


def wilson(successes: int, trials: int, confidence: float) -> Interval:
    """Wilson's score interval of a proportion (Wilson 1927, doi 10.1080/01621459.1927.10502953)."""
    interval = stats.binomtest(successes, trials).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p of McNemar's test: are the two kinds of disagreement equally likely? 1 without any.

    Takes pairs as independent.
    """
    disagreements = only_first + only_second
    return float(stats.binomtest(only_first, disagreements).pvalue) if disagreements else 1.0


def cluster_sums(values_PX: Floats, clusters: Integers) -> Floats:
    """Sums over the rows of each cluster, with their count as a last column; [K, X + 1]."""
    _, numbers = np.unique(clusters, return_inverse=True)
    sums = np.zeros((numbers.max() + 1, values_PX.shape[1] + 1))
    np.add.at(sums, numbers, np.column_stack([values_PX, np.ones(len(values_PX))]))
    return sums


def bootstrap_means(sums_KX: Floats, resamples: int, seed: int) -> Floats:
    """Means of X values over resampled clusters, [R, X]; `sums_KX` has the row counts as its last column.

    Whole clusters are drawn with replacement, the same ones for every value, so differences are paired.
    """
    blocks = [counts_RK @ sums_KX for counts_RK in _draws(len(sums_KX), resamples, seed)]
    totals_RX = np.concatenate(blocks)
    return totals_RX[:, :-1] / totals_RX[:, -1:]


def _draws(clusters: int, resamples: int, seed: int) -> Iterator[Floats]:
    """How often each cluster is drawn in each resample, some resamples at a time."""
    random = np.random.default_rng(seed)
    size = max(1, BLOCK // clusters)
    for start in range(0, resamples, size):
        rows = min(size, resamples - start)
        drawn = random.integers(0, clusters, size=(rows, clusters)) + clusters * np.arange(rows)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=rows * clusters)
        yield counts.reshape(rows, clusters).astype(np.float64)


def percentile_interval(draws_RX: Floats, confidence: float) -> tuple[Floats, Floats]:
    """Percentile interval of each column: lower and upper ends, [X] each."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws_RX, [tail, 1 - tail], axis=0)
    return low, high


def banded(name: str, values_RX: Floats, confidence: float) -> dict[str, Any]:
    """`name`, `name_low`, `name_high`: the values, which come first, and their interval over what follows."""
    low, high = percentile_interval(values_RX[1:], confidence)
    return {name: values_RX[0].tolist(), f"{name}_low": low.tolist(), f"{name}_high": high.tolist()}
