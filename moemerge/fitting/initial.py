"""The coefficients that a fit starts from, and the shared weight where it is not learned.

Shapes: L blocks, N weighted members.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from moemerge.errors import OptionError
from moemerge.fitting.methods import METHODS
from moemerge.fitting.problem import FitOutcome, FitProblem
from moemerge.merging.average import shared_of_sum

START_SHARED = 0.5


def initial_coefficients(problem: FitProblem) -> FitOutcome:
    """Where methods that learn begin: given coefficients, or settings.initial; shared weight as asked.

    `auto` is usage where there are routing statistics, else uniform. A shared weight that is to be learned
    begins at 0.5, the best fixed one of UMM-RM, or where the given coefficients have it; a fixed one holds.
    """
    settings, start = problem.settings, problem.start
    if start is not None:
        keeps = settings.learns_shared or settings.coordinates == "sum"
        shared_L = start.shared_L if keeps else initial_shared_L(problem)
        return FitOutcome(problem.pooled(start.alpha_LN), problem.pooled(shared_L))
    if settings.learns_shared:
        settings = settings.model_copy(update={"shared_weight": START_SHARED})
    auto = "uniform" if problem.statistics is None else "usage"
    method = METHODS.get(auto if settings.initial == "auto" else settings.initial)
    return method(replace(problem, settings=settings))


def initial_shared_L(problem: FitProblem) -> Tensor:
    """The shared member's weight per block without learning, float64.

    In a sum 1 - settings.scale, and 0 for the head. 0 without a shared member; a number is taken as it is;
    `match` is the mean shared weight seen in routing.
    Raises OptionError for `learned`, which only a method that learns can do.
    """
    setting = problem.settings.shared_weight
    if problem.settings.coordinates == "sum":
        return shared_of_sum(problem.blocks, problem.settings.scale)
    if not problem.has_shared:
        return torch.zeros(len(problem.blocks), dtype=torch.float64)
    if setting == "match":
        routing = problem.routing()
        return problem.pooled(routing.shared_mass_L()[problem.layer_rows(routing.layers)])
    if isinstance(setting, str):
        raise OptionError(
            f"shared_weight {setting} contradicts the method",
            given=f"method {problem.settings.method}, shared_weight {setting}",
            expected="a number in [0, 1] or match, unless the method learns",
            fix="choose method learned, or a number for shared_weight",
        )
    return torch.full((len(problem.blocks),), float(setting), dtype=torch.float64)
