"""Coefficients learned on preference pairs, and kept only if held-out pairs say that they are better.

Shapes: L blocks, N weighted members, P pairs, J points of a walk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moemerge.fitting.problem import FitOutcome, FitProblem, Objective, mean_of
from moemerge.fitting.significance import chance, gain, measures, paired
from moemerge.fitting.starts import start
from moemerge.fitting.walk import BACK, Point, Walk
from moemerge.merging.blocks import layer_of

KEPT = "Nothing that was tried beat the initial coefficients on the held-out pairs"


def learned(problem: FitProblem) -> FitOutcome:
    """Fit alpha, and lambda if shared_weight is learned, to the objectives of the merged model.

    An optimiser (settings.optimizer) walks from the start; the outcome is the point on its way with the
    lowest held-out loss (settings.judge), unless it could be chance: with p >= settings.level, by a paired
    test that counts how many points were tried, the start is kept, exactly. With settings.folds each part of
    the pairs is held out from a walk of its own; the outcome is the mean of the walks' coefficients after the
    number of points that is best over all parts together. Deterministic for a given seed.

    Raises OptionError without pairs, or without routing where the start needs it.
    Source: learned merge coefficients, XFT (arXiv 2404.15247, fourth step) and UMM-RM (arXiv 2512.00724).
    """
    objective, first = problem.data(), start(problem)
    folds = problem.settings.folds
    parts = objective.folds(folds, problem.seed) if folds else [objective]
    trial = _Trial(problem, [Walk(problem, part, first).run() for part in parts])
    found = trial.outcome if trial.moved else first
    return FitOutcome(found.alpha_LN, found.shared_L, _report(problem, objective, first, found, trial))


class _Trial:
    """One walk, or one per fold, and the verdict of the pairs that each of them held out."""

    def __init__(self, problem: FitProblem, walks: list[Walk]) -> None:
        self.settings, self.walks = problem.settings, walks
        self.prompts = _numbered([walk.objective.prompts("held_out") for walk in walks])
        self.longest = max(len(walk.points) for walk in walks)
        losses_JP = torch.stack([self.judged(j) for j in range(self.longest + len(BACK))])
        self.best = int(losses_JP.mean(1).argmin())
        gains_JP = losses_JP[0] - losses_JP
        self.p = chance(gains_JP, self.best, self.prompts, problem.seed) if self.best else 1.0
        self.moved = self.best > 0 and (self.p < self.settings.level or self.settings.level == 1)

    @property
    def outcome(self) -> FitOutcome:
        """The best point; over folds the mean of theirs."""
        points = self.points(self.best)
        # Each row of alpha sums to one, so their mean does: to normalise it would only change last digits.
        return FitOutcome(
            mean_of(torch.stack([point.alpha_LN for point in points])),
            mean_of(torch.stack([point.shared_L for point in points])),
        )

    def points(self, number: int) -> list[Point]:
        """The point of this number of each walk, the last one of one that ended before; then those back."""
        if number >= self.longest:
            return [walk.back[number - self.longest] for walk in self.walks]
        return [walk.points[min(number, len(walk.points) - 1)] for walk in self.walks]

    def margins(self, number: int) -> Tensor:
        """Held-out margins of all walks at this number."""
        return torch.cat([point.held_out.margins_P for point in self.points(number)])

    def judged(self, number: int) -> Tensor:
        """Held-out losses that decide, of all walks at this number."""
        return torch.cat([point.judged_P for point in self.points(number)])


def _numbered(parts: list[list[int]]) -> list[int]:
    """Prompt numbers of several parts, no number in two of them."""
    pairs = [(part, number) for part, numbers in enumerate(parts) for number in numbers]
    places = {pair: place for place, pair in enumerate(dict.fromkeys(pairs))}
    return [places[pair] for pair in pairs]


def _report(
    problem: FitProblem, objective: Objective, first: FitOutcome, found: FitOutcome, trial: _Trial
) -> dict[str, Any]:
    before_P, after_P = (trial.margins(number) for number in (0, trial.best if trial.moved else 0))
    train_P = [objective.measure(at.alpha_LN, at.shared_L, "train").margins_P for at in (first, found)]
    walk = trial.walks[0]
    change = paired(before_P, after_P, trial.prompts, problem.seed)
    on_train = paired(train_P[0], train_P[1], objective.prompts("train"), problem.seed)
    return {
        "verdict": _verdict(trial, change),
        "kept_initial": not trial.moved,
        "pairs": {"train": objective.num_train, "held_out": len(before_P)},
        "train": {"before": measures(train_P[0]), "after": measures(train_P[1]), "change": on_train},
        "held_out": {
            "before": measures(before_P),
            "after": measures(after_P),
            "gain": gain(before_P, after_P),
            "change": change,
            "p": trial.p,
        },
        "optimizer": walk.optimizer,
        "passes": round(sum(one.passes for one in trial.walks), 3),
        "best_point": trial.best,
        "moved": movement(problem.blocks, first, found),
        "sensitivity": _sensitivity(problem, objective, first, found) if trial.moved else [],
        "trajectory": walk.trajectory,
    }


def movement(blocks: list[str], first: FitOutcome, found: FitOutcome) -> list[dict[str, Any]]:
    """How far each block's coefficients went: L1, half of it, and the shared weight's change."""
    l1_L = (found.alpha_LN - first.alpha_LN).abs().sum(1)
    shared_L = found.shared_L - first.shared_L
    return [
        {"block": name, "l1": float(l1), "total_variation": float(l1) / 2, "shared": float(shared)}
        for name, l1, shared in zip(blocks, l1_L, shared_L, strict=True)
    ]


def _sensitivity(
    problem: FitProblem, objective: Objective, first: FitOutcome, found: FitOutcome
) -> list[dict[str, Any]]:
    """What held-out loss and accuracy lose when one layer goes back to its start."""
    if not problem.settings.sensitivity:
        return []
    with_all = measures(objective.measure(found.alpha_LN, found.shared_L, "held_out").margins_P)
    rows = []
    for layer in dict.fromkeys(_home(block) for block in problem.blocks):
        back_L = torch.tensor([_home(block) == layer for block in problem.blocks])
        alpha_LN = torch.where(back_L[:, None], first.alpha_LN, found.alpha_LN)
        shared_L = torch.where(back_L, first.shared_L, found.shared_L)
        without = measures(objective.measure(alpha_LN, shared_L, "held_out").margins_P)
        worse = {"loss": without["loss"] - with_all["loss"]}
        rows.append({"layer": layer, **worse, "accuracy": with_all["accuracy"] - without["accuracy"]})
    return rows


def _home(block: str) -> str:
    number = layer_of(block)
    return block if number is None else f"layers.{number}"


def _verdict(trial: _Trial, change: dict[str, Any]) -> str:
    if not trial.best:
        return f"{KEPT}: they are kept."
    before, after = (float(trial.judged(number).mean()) for number in (0, trial.best))
    loss = f"from {before:.4f} to {after:.4f}"
    if not trial.moved:
        return f"{KEPT} beyond chance (loss {loss} at best, p = {trial.p:.2g}): they are kept."
    found = [measures(trial.margins(number))["accuracy"] for number in (0, trial.best)]
    accuracy = f"accuracy from {found[0]:.4f} to {found[1]:.4f}"
    if trial.settings.judge == "objective":
        return f"What is fitted went {loss} on held-out pairs (p = {trial.p:.2g}), {accuracy}."
    loss = f"{loss} (change {_interval(change['loss'])}, p = {trial.p:.2g})"
    return f"The held-out loss went {loss}, {accuracy}."


def _interval(change: dict[str, float]) -> str:
    return f"{change['change']:+.4f}, 95 % interval {change['low']:+.4f} to {change['high']:+.4f}"
