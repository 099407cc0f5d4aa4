"""One shared weight for all blocks, the best of a grid: the sweep of UMM-RM's and DogeRM's lambda, without
training.

Shapes: L blocks, P pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from tqdm.auto import tqdm

from moemerge.artifacts.progress import hidden
from moemerge.errors import OptionError
from moemerge.fitting.initial import initial_coefficients
from moemerge.fitting.problem import FitOutcome, FitProblem, Objective
from moemerge.fitting.significance import gain, measures


def grid(problem: FitProblem) -> FitOutcome:
    """The shared weight of settings.grid with the lowest Bradley-Terry loss on the pairs, alpha as at the
    start.

    Held-out pairs take no part in the choice: they judge the chosen weight against settings.shared_weight
    (0.5 if that is to be learned). Raises OptionError without pairs or without a shared member. Source: sweep
    of the merge weight on preference pairs, DogeRM (arXiv 2407.01470).
    """
    if not problem.has_shared:
        raise OptionError(
            "method grid has no weight to choose",
            given="no shared expert and no base",
            expected="a MoE with a shared expert, or models with a base",
            fix="choose method learned, or name a base",
        )
    first, objective = initial_coefficients(problem), problem.data()
    tried: dict[float, dict[str, float]] = {}
    for weight in tqdm(problem.settings.grid, desc="fit", leave=False, disable=hidden()):
        tried[weight] = measures(objective.measure(first.alpha_LN, _all(weight, first), "train").margins_P)
    best = min(tried, key=lambda weight: tried[weight]["loss"])
    return FitOutcome(first.alpha_LN, _all(best, first), _report(objective, first, best, tried))


def _all(weight: float, start: FitOutcome) -> Tensor:
    return torch.full_like(start.shared_L, weight)


def _report(
    objective: Objective, first: FitOutcome, best: float, tried: dict[float, dict[str, float]]
) -> dict[str, object]:
    points = {"before": first.shared_L, "after": _all(best, first)}
    held_P = {
        when: objective.measure(first.alpha_LN, at, "held_out").margins_P for when, at in points.items()
    }
    before_P = objective.measure(first.alpha_LN, first.shared_L, "train").margins_P
    held_out = {when: measures(margins_P) for when, margins_P in held_P.items()}
    better = gain(held_P["before"], held_P["after"])
    verdict = (
        f"Of {len(tried)} shared weights, {best:g} has the lowest loss on the pairs; on held-out pairs the "
        f"loss goes from {held_out['before']['loss']:.4f} to {held_out['after']['loss']:.4f}, down by "
        f"{better['mean']:.4f} (standard error {better['standard_error']:.4f})."
    )
    return {
        "verdict": verdict,
        "pairs": {"train": objective.num_train, "held_out": len(held_P["before"])},
        "train": {"before": measures(before_P), "after": tried[best]},
        "held_out": {**held_out, "gain": better},
        "grid": [{"shared_weight": weight, **numbers} for weight, numbers in tried.items()],
    }
