"""Coefficients in closed form, from what the members' matrices make of the members' own inputs.

Shapes: L blocks, N weighted members, M = N + 1 with the shared one first.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.optimize import LinearConstraint, minimize
from torch import Tensor

from moemerge.fitting.initial import initial_coefficients
from moemerge.fitting.problem import FitOutcome, FitProblem, movement
from moemerge.fitting.significance import gain, measures, paired
from moemerge.merging.average import as_changes, changes

# Of the largest eigenvalue: what float32 outputs say of directions below this is rounding.
SMALLEST = 1e-6


def least_squares(problem: FitProblem) -> FitOutcome:
    """Weights w on the simplex that minimise, per block, sum over its matrices and members i of
    |X_i (W(w) - W_i)'|^2, W(w) = sum_j w_j W_j; X_i is what member i itself gives it, on its own pairs.

    lambda = w_0 is fixed, or found too if shared_weight is to be learned. In a sum w_0 = 1 - sum_i c_i and
    w_i = c_i, of any sign (see `nearest_changes`). A block without matrices keeps its start. Labels are not
    used; held-out pairs only report. Raises OptionError without pairs. Source: the regression of RegMean
    (arXiv 2212.09849), its free matrix narrowed to what a merge can be.
    """
    first = initial_coefficients(problem)
    gram_LMM = problem.grams(first)
    shared_by = torch.tensor(problem.row_of_block)
    # A row that serves several blocks minimises their sum. Solved once, so that all have the same bits.
    solved = {
        row: _row(problem, gram_LMM[shared_by == row].sum(0), first, problem.row_of_block.index(row))
        for row in problem.row_of_block
    }
    rows = [solved[row] for row in problem.row_of_block]
    alpha_LN, shared_L = torch.stack([alpha_N for alpha_N, _ in rows]), torch.stack([s for _, s in rows])
    return FitOutcome(alpha_LN, shared_L, _report(problem, first, alpha_LN, shared_L))


def _row(problem: FitProblem, gram_MM: Tensor, first: FitOutcome, row: int) -> tuple[Tensor, Tensor]:
    """alpha_N and lambda of one row: those that minimise `gram_MM`, or of `first` where that says nothing."""
    kept = first.alpha_LN[row], first.shared_L[row]
    if not bool(gram_MM.any()):
        return kept
    if problem.settings.coordinates == "sum":
        start_N = changes(first.alpha_LN, first.shared_L)[row]
        alpha_N, total = as_changes(nearest_changes(gram_MM, start_N, problem.settings.l2))
        return alpha_N, 1 - total
    free = problem.settings.learns_shared and problem.has_shared
    shared = None if free else float(kept[1])
    if shared == 1:  # every alpha is as good
        return kept
    weights_M = on_simplex(gram_MM, shared if problem.has_shared else 0.0)
    # w_0 = lambda and w_i = (1 - lambda) alpha_i, so alpha is the rest of w, made to sum to one.
    routed = weights_M[1:].sum()
    alpha_N = weights_M[1:] / routed if routed > 0 else kept[0]
    return alpha_N, weights_M[0] if free else kept[1]


def on_simplex(gram_MM: Tensor, first_weight: float | None) -> Tensor:
    """w >= 0 with sum 1 that minimises w' S w, S symmetric and >= 0; w_0 = `first_weight` unless None."""
    # A factor does not move the minimum, but ftol is absolute: the largest number of S becomes 1. It is on
    # the diagonal, as S is a Gram matrix.
    S = (gram_MM / gram_MM.diagonal().abs().max()).numpy()
    count = len(S)
    fixed = first_weight is not None
    start = np.full(count, (1 - (first_weight or 0)) / (count - 1) if fixed else 1 / count)
    start[0] = first_weight if first_weight is not None else start[0]
    bounds = [(start[0], start[0]) if fixed else (0.0, 1.0), *[(0.0, 1.0)] * (count - 1)]
    constraint = LinearConstraint(np.ones((1, count)), 1, 1)
    solve: Any = minimize
    solution = solve(
        lambda w: (w @ S @ w, 2 * S @ w),
        start,
        jac=True,
        method="SLSQP",
        bounds=bounds,
        constraints=constraint,
        options={"ftol": 1e-14, "maxiter": 1000},
    )
    weights_M = torch.from_numpy(solution.x).clamp(min=0)
    # SLSQP keeps bounds and sum only up to its tolerance. w_0 stays, as it may be fixed; the others are
    # scaled to sum to what it leaves.
    weights_M[1:] *= (1 - weights_M[0]) / weights_M[1:].sum().clamp(min=1e-300)
    return weights_M


def nearest_changes(gram_MM: Tensor, start_N: Tensor, l2: float) -> Tensor:
    """c that minimises w' S w / u + l2 |c - start|^2 for w = (1 - sum_i c_i, c), S symmetric and >= 0.

    u is the mean over members of w' S w's growth by the square of their own c: what one member's change makes
    of the outputs. What S leaves open, such as how two equal members share their weight, stays as near as
    possible to the start, also with l2 = 0.
    """
    # w = e_0 + B c with B = (-1 ... -1; identity): a quadratic form in c, with A = B'SB and -b = B'S e_0.
    away_NM = gram_MM[1:] - gram_MM[0]
    A, b = away_NM[:, 1:] - away_NM[:, :1], -away_NM[:, 0]
    size_N, V = torch.linalg.eigh((A + A.T) / 2)
    pull = l2 * A.diagonal().mean()
    step_N = V.T @ (b - A @ start_N) / (size_N + pull)
    told_N = size_N > SMALLEST * size_N[-1]
    return start_N + V @ step_N.where(told_N, 0.0)


def _report(problem: FitProblem, first: FitOutcome, alpha_LN: Tensor, shared_L: Tensor) -> dict[str, Any]:
    objective = problem.data()
    after = FitOutcome(alpha_LN, shared_L)
    held_P, train_P = (
        [objective.measure(at.alpha_LN, at.shared_L, split).margins_P for at in (first, after)]
        for split in ("held_out", "train")
    )
    before, later = measures(held_P[0]), measures(held_P[1])
    verdict = (
        f"Least squares on the members' outputs; the held-out loss goes from {before['loss']:.4f} to "
        f"{later['loss']:.4f}, accuracy from {before['accuracy']:.4f} to {later['accuracy']:.4f}."
    )
    return {
        "verdict": verdict,
        "pairs": {"train": len(train_P[0]), "held_out": len(held_P[0])},
        "train": {
            "before": measures(train_P[0]),
            "after": measures(train_P[1]),
            "change": paired(train_P[0], train_P[1], objective.prompts("train"), problem.seed),
        },
        "held_out": {
            "before": before,
            "after": later,
            "gain": gain(held_P[0], held_P[1]),
            "change": paired(held_P[0], held_P[1], objective.prompts("held_out"), problem.seed),
        },
        "moved": movement(problem, first, after),
    }
