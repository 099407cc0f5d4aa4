"""All weight on one member, besides the shared one's: the merge as that expert or model would be."""

from __future__ import annotations

import torch

from moemerge.errors import OptionError
from moemerge.fitting.initial import initial_shared_L
from moemerge.fitting.problem import FitOutcome, FitProblem


def one_hot(problem: FitProblem) -> FitOutcome:
    """alpha = 1 for member settings.initial_member, 0 for the others; needs no data.

    OptionError if there is no such member, or if the shared weight is to be learned.
    """
    member, count = problem.settings.initial_member, problem.num_experts
    if member >= count:
        raise OptionError(
            "no member has this number",
            given=f"initial_member {member}",
            expected=f"0 to {count - 1}, the shared expert or base not counted",
            fix="choose one of these",
        )
    alpha_LN = torch.zeros(len(problem.blocks), count, dtype=torch.float64)
    alpha_LN[:, member] = 1
    verdict = f"Member {member} has all the weight besides the shared one; nothing was fitted."
    return FitOutcome(alpha_LN, initial_shared_L(problem), {"verdict": verdict})
