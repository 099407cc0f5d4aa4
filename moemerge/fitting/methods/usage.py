"""Coefficients from routing: each expert counts as much as the gate used it."""

from __future__ import annotations

from moemerge.fitting.initial import initial_shared_L
from moemerge.fitting.problem import FitOutcome, FitProblem


def usage(problem: FitProblem, side: str | None = None) -> FitOutcome:
    """alpha = mean routed gate mass of each expert, normalised per layer; an unused expert gets 0.

    `side` chosen or rejected counts the tokens of these answers only. OptionError without routing
    statistics, or if the shared weight is to be learned.
    Source: merge weights from gating statistics, UMM-RM (arXiv 2512.00724).
    """
    routing = problem.routing()
    alpha_LN = routing.gate_mass_LN(side=side)[problem.layer_rows(routing.layers)]
    where = f" on {side} answers" if side else ""
    verdict = f"Experts are weighted by the gate mass seen in routing{where}; nothing was fitted."
    return FitOutcome(problem.pooled(alpha_LN), initial_shared_L(problem), {"verdict": verdict})


def usage_chosen(problem: FitProblem) -> FitOutcome:
    """`usage` on chosen answers: an expert that is used for rejected ones gains nothing by that."""
    return usage(problem, "chosen")
