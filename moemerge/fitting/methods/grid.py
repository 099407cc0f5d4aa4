"""One shared weight for all blocks, the best of a grid: the sweep of UMM-RM's and DogeRM's lambda, without
training.

Shapes: L blocks, P pairs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from tqdm.auto import tqdm

from moemerge.artifacts.progress import hidden
from moemerge.errors import OptionError
from moemerge.fitting.initial import initial_coefficients
from moemerge.fitting.problem import FitOutcome, FitProblem, Measured, Objective
from moemerge.fitting.significance import calibrated_losses, measures
from moemerge.fitting.trajectory import judged
from moemerge.options.fit import FitSettings

WORDS = {
    "calibrated": "loss after the best factor on scores",
    "preferences": "loss",
    "accuracy": "share of pairs ranked wrongly",
    "objective": "value of what is fitted",
}


def grid(problem: FitProblem) -> FitOutcome:
    """The shared weight of settings.grid that settings.judge puts first on the pairs, alpha as at the start.

    Calibrated loss and accuracy know no scale of scores, so neither does the choice; plain loss would punish
    an average with a language model for its smaller scores. Calibrated loss decides between equals. Held-out
    pairs take no part: they judge the chosen weight against settings.shared_weight (0.5 if that is to be
    learned). Raises OptionError without pairs or without a shared member. Source: sweep of the merge weight
    on preference pairs, DogeRM (arXiv 2407.01470).
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
        measured = objective.measure(first.alpha_LN, _all(weight, first), "train")
        tried[weight] = _numbers(measured, problem.settings)
    best = min(tried, key=lambda weight: (tried[weight]["judged"], tried[weight]["calibrated"]))
    report = _report(objective, problem.settings, first, best, tried)
    return FitOutcome(first.alpha_LN, _all(best, first), report)


def _all(weight: float, start: FitOutcome) -> Tensor:
    return torch.full_like(start.shared_L, weight)


def _numbers(measured: Measured, settings: FitSettings) -> dict[str, float]:
    """Loss, accuracy, calibrated loss, and what decides."""
    calibrated = float(calibrated_losses(measured.margins_P).mean())
    decides = float(judged(settings, measured).mean())
    return measures(measured.margins_P) | {"calibrated": calibrated, "judged": decides}


def _report(
    objective: Objective,
    settings: FitSettings,
    first: FitOutcome,
    best: float,
    tried: dict[float, dict[str, float]],
) -> dict[str, object]:
    points = {"before": first.shared_L, "after": _all(best, first)}
    held = {when: objective.measure(first.alpha_LN, at, "held_out") for when, at in points.items()}
    before = objective.measure(first.alpha_LN, first.shared_L, "train")
    gain_P = judged(settings, held["before"]) - judged(settings, held["after"])
    error = float(gain_P.std() / math.sqrt(len(gain_P))) if len(gain_P) > 1 else math.inf
    numbers = {when: _numbers(measured, settings) for when, measured in held.items()}
    was, now = (numbers[when]["judged"] for when in ("before", "after"))
    verdict = (
        f"Of {len(tried)} shared weights, {best:g} has the lowest {WORDS[settings.judge]} on the pairs; on "
        f"held-out pairs it goes from {was:.4f} to {now:.4f}, down by {gain_P.mean():.4f} (standard error "
        f"{error:.4f})."
    )
    return {
        "verdict": verdict,
        "pairs": {"train": objective.num_train, "held_out": len(gain_P)},
        "train": {"before": _numbers(before, settings), "after": tried[best]},
        "held_out": {**numbers, "gain": {"mean": float(gain_P.mean()), "standard_error": error}},
        "grid": [{"shared_weight": weight, **numbers} for weight, numbers in tried.items()],
    }
