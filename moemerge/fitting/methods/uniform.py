"""Equal coefficients: the plain mean of the routed experts, and the start of XFT (arXiv 2404.15247)."""

from __future__ import annotations

import torch
from torch import Tensor

from moemerge.fitting.initial import initial_shared_L
from moemerge.fitting.problem import FitOutcome, FitProblem


def uniform(problem: FitProblem) -> FitOutcome:
    """alpha = 1 / N in every block; needs no data. OptionError if the shared weight is to be learned."""
    alpha_LN = equal_alpha_LN(len(problem.blocks), problem.num_experts)
    verdict = "Every routed expert of a layer has the same weight; nothing was fitted."
    return FitOutcome(alpha_LN, initial_shared_L(problem), {"verdict": verdict})


def equal_alpha_LN(blocks: int, members: int) -> Tensor:
    """1 / N for each of N members in each block."""
    return torch.full((blocks, members), 1 / members, dtype=torch.float64)
