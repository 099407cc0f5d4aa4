"""Numbers that tell over-optimisation from curves of gold and proxy score: peak, gap, regret, scaling fit.

S points of a curve, from no optimisation on; leading dimensions (resamples, models) are free everywhere.
"""

from __future__ import annotations

import numpy as np

from moemerge.reports.statistics import Floats, Integers


def area(kl_S: Floats, values_XS: Floats) -> Floats:
    """Integral of `values_XS` over KL by the trapezoid rule, in the values' unit times nats; [X]."""
    return np.asarray(np.trapezoid(values_XS, kl_S, axis=-1))


def implied(gold_XS: Floats, proxy_XS: Floats) -> Floats:
    """The gold score that the proxy promises: as if all its gains were worth what the first are; [X, S].

    g(1) + b (r(S) - r(1)), b = (g(2) - g(1)) / (r(2) - r(1)), g and r being gold and proxy at the first,
    second and further points. Where gold is linear in the proxy but for noise, as when both are normal, this
    is the gold score itself; where that falls behind, the proxy is over-optimised. A proxy that stands still
    promises nothing. The proxy's unit and zero do not matter.
    """
    gain_XS = proxy_XS - proxy_XS[..., :1]
    first_X = gain_XS[..., 1:2]
    moves_X = first_X != 0
    worth_X = np.where(moves_X, gold_XS[..., 1:2] - gold_XS[..., :1], 0.0) / np.where(moves_X, first_X, 1.0)
    return np.asarray(gold_XS[..., :1] + worth_X * gain_XS)


def gap_area(kl_S: Floats, gold_XS: Floats, proxy_XS: Floats) -> Floats:
    """Area between the implied and the real gold score over KL: what the proxy promised and did not keep."""
    return area(kl_S, implied(gold_XS, proxy_XS) - gold_XS)


def best_of_n_terms(kl_S: Floats) -> Floats:
    """d and -d^2, d = sqrt(KL): R(d) = d (alpha - beta d) of best-of-n, arXiv 2210.10760, eq. 1; [S, 2]."""
    d_S = np.sqrt(kl_S)
    return np.stack([d_S, -(d_S**2)], axis=-1)


def policy_gradient_terms(kl_S: Floats) -> Floats:
    """d and -d log d, d = sqrt(KL): R(d) = d (alpha - beta log d) of policy gradient, eq. 2 there; [S, 2]."""
    d_S = np.sqrt(kl_S)
    return np.stack([d_S, -d_S * np.log(np.where(d_S > 0, d_S, 1.0))], axis=-1)


def fit(terms_XS2: Floats, gain_XS: Floats) -> tuple[Floats, Floats]:
    """alpha and beta of `gain_XS` = terms (alpha, beta) by least squares, and what is left; [X, 2] and [X].

    Gains are gold scores less the first. What is left is the root mean square over points.
    """
    coefficients_X2 = (np.linalg.pinv(terms_XS2) @ gain_XS[..., None])[..., 0]
    error_XS = gain_XS - (terms_XS2 @ coefficients_X2[..., None])[..., 0]
    return coefficients_X2, np.sqrt((error_XS**2).mean(axis=-1))


def can_fit(terms_S2: Floats) -> bool:
    """Whether the points tell two coefficients."""
    return int(np.linalg.matrix_rank(terms_S2)) == 2


def peak(gold_XS: Floats) -> Integers:
    """The place of the highest gold score, the first of equal ones; [X]."""
    return np.asarray(gold_XS.argmax(axis=-1))
