"""Equal coefficients: the plain mean of the routed experts, and the start of XFT (arXiv 2404.15247)."""

from __future__ import annotations

import torch

from moemerge.fitting.initial import initial_shared_L
from moemerge.fitting.problem import FitOutcome, FitProblem


def uniform(problem: FitProblem) -> FitOutcome:
    """alpha = 1 / N in every block; needs no data. OptionError if the shared weight is to be learned."""
    shape = (len(problem.blocks), problem.num_experts)
    alpha_LN = torch.full(shape, 1 / problem.num_experts, dtype=torch.float64)
    verdict = "Every routed expert of a layer has the same weight; nothing was fitted."
    return FitOutcome(alpha_LN, initial_shared_L(problem), {"verdict": verdict})
