"""Intervals and tests that the probes share. K clusters, P rows, R resamples, X measured values."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from scipy.optimize import brentq
from scipy.special import expit

from moemerge.reports.table import Interval

MOST_COUNTS = 4_000_000  # resamples times clusters that are in memory at once

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


def wilson(successes: float, trials: int, confidence: float) -> Interval:
    """Wilson's score interval of a proportion (Wilson 1927, doi 10.1080/01621459.1927.10502953)."""
    low, high = wilson_band(np.array([successes / trials]), np.array([trials]), confidence)
    return float(low[0]), float(high[0])


def wilson_band(share_X: Floats, trials_X: Integers, confidence: float) -> tuple[Floats, Floats]:
    """`wilson` for many proportions at once: lower and upper ends, [X] each."""
    z = float(stats.norm.ppf((1 + confidence) / 2))
    centre_X = (share_X + z**2 / (2 * trials_X)) / (1 + z**2 / trials_X)
    spread_X = np.sqrt(share_X * (1 - share_X) / trials_X + (z / (2 * trials_X)) ** 2)
    half_X = z * spread_X / (1 + z**2 / trials_X)
    return np.clip(centre_X - half_X, 0, share_X), np.clip(centre_X + half_X, share_X, 1)


def clustered_interval(right_P: NDArray[np.bool_], units_P: Integers, confidence: float) -> Interval:
    """Interval of a share where rows of a unit, such as a prompt, go together.

    Clopper and Pearson's, for as many independent rows as would have the variance that is seen between units;
    where all rows agree each unit counts once (Korn and Graubard 1998, Survey Methodology 24, 193-201). Of no
    rows at all it is (0, 1).
    """
    rows, units = len(right_P), len(np.unique(units_P))
    if not rows:
        return 0.0, 1.0
    share = float(right_P.mean())
    count = float(rows if units == rows else _effective_rows(right_P, units_P, confidence))
    tail, hits = (1 - confidence) / 2, share * count
    low = float(stats.beta.ppf(tail, hits, count - hits + 1)) if share > 0 else 0.0
    high = float(stats.beta.ppf(1 - tail, hits + 1, count - hits)) if share < 1 else 1.0
    return low, high


def _effective_rows(right_P: NDArray[np.bool_], units_P: Integers, confidence: float) -> float:
    """How many independent rows tell as much of the share as these do; one per unit where all agree."""
    sums_K2 = cluster_sums(right_P[:, None].astype(np.float64), units_P)
    rows, units, share = len(right_P), len(sums_K2), float(right_P.mean())
    squares = float(((sums_K2[:, 0] - share * sums_K2[:, 1]) ** 2).sum())
    if not 0 < share < 1 or units < 2 or not squares:
        return float(units)
    variance = units / (units - 1) * squares / rows**2
    # The variance is known from so many units only, which widens an interval as Student's t does.
    narrow, wide = (float(stats.t.ppf((1 + confidence) / 2, count - 1)) for count in (rows, units))
    return min(rows, share * (1 - share) / variance * (narrow / wide) ** 2)


def no_difference(units: int, confidence: float) -> Interval:
    """Interval of a difference of two shares where none of `units` observations differs.

    Resamples cannot differ there. Both ends are how large a share of differing observations may be of which
    so many show none (Clopper and Pearson's upper end).
    """
    end = 1 - ((1 - confidence) / 2) ** (1 / max(units, 1))
    return -end, end


def share_interval(right_P: Floats, draws_R: Floats, prompts: int, confidence: float) -> Interval:
    """Interval of the mean of `right_P`: Wilson's, or the bootstrap's (`draws_R`) if prompts repeat.

    Where all rows agree resamples cannot differ: then each of the `prompts` counts as one observation. The
    bootstrap also serves rows that are neither 0 nor 1.
    """
    share = float(right_P.mean())
    unanimous, whole = share in (0.0, 1.0), bool(np.isin(right_P, (0, 1)).all())
    if unanimous or (whole and prompts == len(right_P)):
        return wilson(share * prompts, prompts, confidence)
    low, high = percentile_interval(draws_R[:, None], confidence)
    return float(low[0]), float(high[0])


def lead_interval(draws_R: Floats, units: int, confidence: float) -> Interval:
    """Interval of a mean paired difference: the bootstrap's, or `no_difference` where no unit differs.

    No row does then, or the differences of each unit's rows cancel out: every resample is 0.
    """
    if not draws_R.any():
        return no_difference(units, confidence)
    low, high = percentile_interval(draws_R[:, None], confidence)
    return float(low[0]), float(high[0])


@lru_cache(maxsize=2**16)  # of many models on the same pairs, most tests are of numbers seen before
def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p of McNemar's test: are the two kinds of disagreement equally likely? 1 without any.

    Takes pairs as independent.
    """
    disagreements = only_first + only_second
    return float(stats.binomtest(only_first, disagreements).pvalue) if disagreements else 1.0


def clustered_mcnemar(differences_K: Integers) -> float:
    """McNemar's exact test where pairs share prompts: two-sided p, 1 without any disagreement.

    `differences_K`: per prompt, pairs that only the first model has right minus those that only the second
    has. Under the hypothesis their signs are fair coins; p is the chance of a sum as far from zero, over all
    signs. With one pair per prompt this is `mcnemar`.
    """
    sizes, counts = np.unique(np.abs(differences_K[differences_K != 0]), return_counts=True)
    return _sign_flip_p(tuple(sizes.tolist()), tuple(counts.tolist()), abs(int(differences_K.sum())))


@lru_cache(maxsize=2**16)
def _sign_flip_p(sizes: tuple[int, ...], counts: tuple[int, ...], total: int) -> float:
    """The chance that so many numbers (`counts`) of each size, of random signs, sum to +-`total` or more."""
    chances = np.ones(1)  # of the sums -(len - 1) / 2 ... (len - 1) / 2
    for size, count in zip(sizes, counts, strict=True):
        spaced = np.zeros(2 * size * count + 1)
        spaced[:: 2 * size] = stats.binom.pmf(np.arange(count + 1), count, 0.5)
        chances = np.convolve(chances, spaced)
    sums = np.abs(np.arange(len(chances)) - len(chances) // 2)
    return min(1.0, float(chances[sums >= total].sum()))


def resampled_p(difference: float, draws_R: Floats, units: int) -> float:
    """Two-sided p of a mean `difference` over `units` by Student's t; the error is that of its resamples.

    Never below 2^(1 - units), the sign test's p if all units agree; so 1 for a single unit.
    """
    floor = 2.0 ** (1 - units)
    error = float(draws_R.std(ddof=1)) * math.sqrt(units / max(units - 1, 1))
    if units < 2 or difference == 0 or error == 0:
        return 1.0 if difference == 0 else min(1.0, floor)
    return max(floor, 2 * float(stats.t.sf(abs(difference) / error, units - 1)))


def holm(p_X: Floats) -> Floats:
    """p-values adjusted for the number of tests (Holm 1979): reject where below the level, in their order."""
    order = np.argsort(p_X)
    steps_X = p_X[order] * np.arange(len(p_X), 0, -1)
    adjusted_X = np.empty(len(p_X))
    adjusted_X[order] = np.minimum(np.maximum.accumulate(steps_X), 1)
    return adjusted_X


def sampling_units(prompts_P: Integers) -> Integers:
    """What is resampled whole: rows with equal numbers. Prompts; if all rows have one prompt, single rows.

    With one prompt nothing can be said about others, and the rows stand for more rows like them.
    """
    single = len(np.unique(prompts_P)) == 1
    return np.arange(len(prompts_P), dtype=np.int64) if single else prompts_P


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


def resampled_curves(curves_XQMV: Floats, resamples: int, seed: int) -> Floats:
    """Means over prompts: of all first, then of each resample of them; [X, M, 1 + R, V].

    X kinds of curve of M models with V points each, one per prompt Q. All share the resamples, so that
    differences between models are paired.
    """
    kinds, prompts, models, points = curves_XQMV.shape
    values_QY = np.moveaxis(curves_XQMV, 1, 0).reshape(prompts, -1)
    draws_RY = bootstrap_means(np.column_stack([values_QY, np.ones(prompts)]), resamples, seed)
    means_RY = np.concatenate([values_QY.mean(axis=0, keepdims=True), draws_RY])
    return np.moveaxis(means_RY.reshape(-1, kinds, models, points), 0, 2)


def _draws(clusters: int, resamples: int, seed: int) -> Iterator[Floats]:
    """How often each cluster is drawn in each resample, some resamples at a time."""
    size = max(1, MOST_COUNTS // clusters)
    if resamples <= size:
        yield _drawn_at_once(clusters, resamples, seed).astype(np.float64)
        return
    random = np.random.default_rng(seed)
    for start in range(0, resamples, size):
        yield _drawn(random, clusters, min(size, resamples - start)).astype(np.float64)


@lru_cache(maxsize=4)
def _drawn_at_once(clusters: int, resamples: int, seed: int) -> NDArray[np.int32]:
    """All of `_draws`, which the parts and probes of one evaluation share."""
    return _drawn(np.random.default_rng(seed), clusters, resamples)


def _drawn(random: np.random.Generator, clusters: int, rows: int) -> NDArray[np.int32]:
    drawn = random.integers(0, clusters, size=(rows, clusters)) + clusters * np.arange(rows)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=rows * clusters)
    return counts.reshape(rows, clusters).astype(np.int32)


def percentile_interval(draws_RX: Floats, confidence: float) -> tuple[Floats, Floats]:
    """Percentile interval of each column: lower and upper ends, [X] each."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws_RX, [tail, 1 - tail], axis=0)
    return low, high


def banded(name: str, values_RX: Floats, confidence: float) -> dict[str, Any]:
    """`name`, `name_low`, `name_high`: the values, which come first, and their interval over what follows."""
    low, high = percentile_interval(values_RX[1:], confidence)
    return {name: values_RX[0].tolist(), f"{name}_low": low.tolist(), f"{name}_high": high.tolist()}


def t_test(values_S: Sequence[float], confidence: float) -> tuple[Interval, float] | None:
    """Student's t-interval of the mean of independent values, and two-sided p that it is 0.

    None where the values' spread is not known: of a single value, and of equal ones other than 0. Shares of
    few pairs are coarse, and three equal differences are no proof.
    """
    if len(values_S) < 2:
        return None
    if np.allclose(values_S, values_S[0], rtol=1e-9, atol=0):
        return ((0.0, 0.0), 1.0) if values_S[0] == 0 else None
    test = stats.ttest_1samp(values_S, 0.0)
    low, high = test.confidence_interval(confidence)
    return (float(low), float(high)), float(test.pvalue)


def likeliest_slope(differences_P: Floats) -> float:
    """The b for which sigmoid(b d) gives chosen answers the highest likelihood: a Bradley-Terry temperature.

    Infinite, with the sign of the differences, where all that are not 0 agree; not a number where all are 0.
    """
    if not differences_P.min() < 0 < differences_P.max():
        extreme = float(differences_P.min() + differences_P.max())
        return math.copysign(math.inf, extreme) if extreme else math.nan
    scale = float(np.abs(differences_P).max())
    scaled_P = differences_P / scale

    def rise(b: float) -> float:
        return float((scaled_P * expit(-b * scaled_P)).sum())

    reach = 1.0
    while rise(-reach) < 0 or rise(reach) > 0:
        reach *= 2
    return float(brentq(rise, -reach, reach, xtol=1e-12)) / scale
