"""Coefficients from routing: each expert counts as much as the gate used it."""

from __future__ import annotations

from moemerge.coefficients.base import FitOutcome, FitProblem, start_shared_L


def usage(problem: FitProblem) -> FitOutcome:
    """alpha = mean routed gate mass of each expert, normalised per layer; an unused expert gets 0.

    OptionError without routing statistics, or if the shared weight is to be learned.
    Source: merge weights from gating statistics, UMM-RM (arXiv 2512.00724).
    """
    routing = problem.routing()
    alpha_LN = routing.gate_mass_LN()[problem.layer_rows(routing.layers)]
    verdict = "Experts are weighted by the gate mass seen in routing; nothing was fitted."
    return FitOutcome(alpha_LN, start_shared_L(problem), {"verdict": verdict})
