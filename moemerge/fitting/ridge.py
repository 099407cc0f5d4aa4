"""Ridge regression in closed form, and what it says of each row without having seen it.

Shapes: Q rows, D features, N targets, R strengths.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moemerge.reports.statistics import Floats

# In units of the mean squared singular value: from hardly any pull towards 0 to hardly anything but that.
STRENGTHS = tuple(10.0**power for power in range(-4, 3))


@dataclass(frozen=True)
class Ridge:
    """weight_ND of the rows' targets on their features; left_out_QN, each row's by all the others."""

    weight_ND: Floats
    left_out_QN: Floats
    strength: float


def ridge(x_QD: Floats, y_QN: Floats, weight_Q: Floats, strengths: tuple[float, ...] = STRENGTHS) -> Ridge:
    """W = argmin sum_q weight_q |y_q - W x_q|^2 + strength |W|^2, with the strength that leaves out best.

    The strength has the least weighted squared error of rows that were left out; no row is left out twice:
    e_q / (1 - h_q) in closed form, h_q being the q-th diagonal element of the hat matrix (Allen 1974, PRESS).
    No intercept. Strengths are in units of the mean squared singular value of the weighted features.
    """
    root_Q1 = np.sqrt(weight_Q)[:, None]
    left_QK, size_K, right_KD = np.linalg.svd(root_Q1 * x_QD, full_matrices=False)
    unit = float((size_K**2).mean()) or 1.0
    found = [_at(left_QK, size_K, right_KD, y_QN, root_Q1, strength * unit) for strength in strengths]
    errors = [float((weight_Q[:, None] * (y_QN - one.left_out_QN) ** 2).sum()) for one in found]
    return found[int(np.argmin(errors))]


def _at(
    left_QK: Floats, size_K: Floats, right_KD: Floats, y_QN: Floats, root_Q1: Floats, strength: float
) -> Ridge:
    shrunk_K = size_K**2 / (size_K**2 + strength)
    seen_KN = left_QK.T @ (root_Q1 * y_QN)
    fitted_QN = left_QK @ (shrunk_K[:, None] * seen_KN) / root_Q1
    hat_Q1 = (left_QK**2 @ shrunk_K)[:, None]
    weight_ND = (seen_KN * (size_K / (size_K**2 + strength))[:, None]).T @ right_KD
    return Ridge(weight_ND, y_QN - (y_QN - fitted_QN) / (1 - hat_Q1), strength)
