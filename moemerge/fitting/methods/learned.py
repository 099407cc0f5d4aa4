"""Coefficients learned on preference pairs, and kept only if held-out pairs say that they are better.

Shapes: L blocks, N weighted members, P pairs, J points of a trajectory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moemerge.data.pairs import numbered
from moemerge.fitting.initial import initial_coefficients
from moemerge.fitting.problem import FitOutcome, FitProblem, Objective, mean_of, movement
from moemerge.fitting.significance import chance, gain, mean_changes, measures, paired
from moemerge.fitting.trajectory import BACK, Point, Trajectory
from moemerge.merging.blocks import layer_of

JUDGED = {
    "calibrated": "The calibrated held-out loss",
    "preferences": "The held-out loss",
    "accuracy": "The share of wrong held-out pairs",
    "objective": "What is fitted, on held-out pairs,",
}
KEPT = "Nothing that was tried beat the initial coefficients on the held-out pairs"


def learned(problem: FitProblem) -> FitOutcome:
    """Fit alpha, and lambda if shared_weight is learned, to the objectives of the merged model.

    An optimiser (settings.optimizer) begins at the start; the outcome is the point on its trajectory with the
    lowest held-out loss (settings.judge; calibrated, only of points that lose no accuracy), unless that may
    be chance: with p >= settings.level, by a paired
    test that counts how many points were tried, the start is kept, exactly. With settings.folds each part of
    the pairs is held out from a run of its own; the outcome is the mean of the runs' coefficients after the
    number of points that is best over all parts together. Deterministic for a given seed.

    Raises OptionError without pairs, or without routing where the start needs it.
    Source: learned merge coefficients, XFT (arXiv 2404.15247, fourth step) and UMM-RM (arXiv 2512.00724).
    """
    objective, first = problem.data(), initial_coefficients(problem)
    folds = problem.settings.folds
    parts = objective.folds(folds, problem.seed) if folds else [objective]
    selection = _Selection(problem, [Trajectory(problem, part, first).run() for part in parts])
    last = selection.outcome if selection.moved else first
    return FitOutcome(last.alpha_LN, last.shared_L, _report(problem, objective, first, last, selection))


class _Selection:
    """The point that held-out pairs select from one trajectory, or from one per fold, and whether by chance.

    Points are numbered: those of the trajectories first, then the ones back towards the start.
    """

    def __init__(self, problem: FitProblem, trajectories: list[Trajectory]) -> None:
        self.settings, self.trajectories = problem.settings, trajectories
        parts = [trajectory.objective.prompts("held_out") for trajectory in trajectories]
        # Each fold counts its prompts from 0; no prompt is held out twice, so none may share a number.
        self.prompts = numbered((part, number) for part, numbers in enumerate(parts) for number in numbers)
        self.longest = max(len(trajectory.points) for trajectory in trajectories)
        # Folds together hold out every pair once: a row has the loss of all pairs after equally many points.
        losses_JP = torch.stack([self.judged(j) for j in range(self.longest + len(BACK))])
        loss_J = losses_JP.mean(1)
        if self.settings.judge == "calibrated":
            loss_J = loss_J.where(self._keeps_accuracy(len(loss_J)), torch.inf)
        self.best = int(loss_J.argmin())
        gains_JP = losses_JP[0] - losses_JP
        # Point 0 is the start. The test needs the gains of all: the best of many is high by chance alone.
        self.p = chance(gains_JP, self.best, self.prompts, problem.seed) if self.best else 1.0
        # p can be exactly 1, and level 1 is to let every best point pass.
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

    def _keeps_accuracy(self, count: int) -> Tensor:
        """Of each point whether it has as many held-out pairs right as the start, which no loss may cost."""
        right_J = torch.tensor([int((self.margins(number) > 0).sum()) for number in range(count)])
        return right_J >= right_J[0]

    def points(self, number: int) -> list[Point]:
        """Point `number` of each trajectory; a trajectory that ended before gives its last point."""
        if number >= self.longest:
            return [trajectory.back[number - self.longest] for trajectory in self.trajectories]
        return [
            trajectory.points[min(number, len(trajectory.points) - 1)] for trajectory in self.trajectories
        ]

    def margins(self, number: int) -> Tensor:
        """Held-out margins of all trajectories at point `number`."""
        return torch.cat([point.held_out.margins_P for point in self.points(number)])

    def judged(self, number: int) -> Tensor:
        """Held-out losses that decide, of all trajectories at point `number`."""
        return torch.cat([point.judged_P for point in self.points(number)])

    def change(self, seed: int) -> dict[str, float]:
        """From the start to the best point, taken or not: the mean loss that decides, and how it changed."""
        before_P, after_P = self.judged(0), self.judged(self.best)
        ends = {"before": float(before_P.mean()), "after": float(after_P.mean())}
        (change,) = mean_changes((after_P - before_P)[:, None], self.prompts, seed)
        return ends | change


def _report(
    problem: FitProblem, objective: Objective, first: FitOutcome, last: FitOutcome, selection: _Selection
) -> dict[str, Any]:
    before_P, after_P = (
        selection.margins(number) for number in (0, selection.best if selection.moved else 0)
    )
    train_P = [objective.measure(at.alpha_LN, at.shared_L, "train").margins_P for at in (first, last)]
    trajectories = selection.trajectories
    change = paired(before_P, after_P, selection.prompts, problem.seed)
    by_judge = selection.change(problem.seed)
    on_train = paired(train_P[0], train_P[1], objective.prompts("train"), problem.seed)
    return {
        "verdict": _verdict(selection, by_judge),
        "kept_initial": not selection.moved,
        "pairs": {"train": objective.num_train, "held_out": len(before_P)},
        "train": {"before": measures(train_P[0]), "after": measures(train_P[1]), "change": on_train},
        "held_out": {
            "before": measures(before_P),
            "after": measures(after_P),
            "gain": gain(before_P, after_P),
            "change": change,
            "judged": by_judge,
            "p": selection.p,
        },
        "optimizer": trajectories[0].optimizer,
        "passes": round(sum(trajectory.passes for trajectory in trajectories), 3),
        "best_point": selection.best,
        "moved": movement(problem, first, last),
        "sensitivity": _sensitivity(problem, objective, first, last) if selection.moved else [],
        "trajectory": trajectories[0].history,
    }


def _sensitivity(
    problem: FitProblem, objective: Objective, first: FitOutcome, last: FitOutcome
) -> list[dict[str, Any]]:
    """How much held-out loss and accuracy get worse when one layer alone goes back to its start."""
    if not problem.settings.sensitivity:
        return []
    with_all = measures(objective.measure(last.alpha_LN, last.shared_L, "held_out").margins_P)
    rows = []
    # A layer as a whole, also where each of its matrices has a row: their effects do not add up.
    for layer in dict.fromkeys(_layer_name(block) for block in problem.blocks):
        back_L = torch.tensor([_layer_name(block) == layer for block in problem.blocks])
        alpha_LN = torch.where(back_L[:, None], first.alpha_LN, last.alpha_LN)
        shared_L = torch.where(back_L, first.shared_L, last.shared_L)
        without = measures(objective.measure(alpha_LN, shared_L, "held_out").margins_P)
        worse = {"loss": without["loss"] - with_all["loss"]}
        rows.append({"layer": layer, **worse, "accuracy": with_all["accuracy"] - without["accuracy"]})
    return rows


def _layer_name(block: str) -> str:
    """`layers.3` for any block of that layer; outside and head stand for themselves."""
    number = layer_of(block)
    return block if number is None else f"layers.{number}"


def _verdict(selection: _Selection, change: dict[str, float]) -> str:
    """What came of the fit, in a sentence; `change` is that of the loss that decides, as p is."""
    if not selection.best:
        return f"{KEPT}: they are kept."
    loss = f"from {change['before']:.4f} to {change['after']:.4f}"
    if not selection.moved:
        return f"{KEPT} beyond chance (loss {loss} at best, p = {selection.p:.2g}): they are kept."
    shares = [measures(selection.margins(number))["accuracy"] for number in (0, selection.best)]
    accuracy = f"accuracy from {shares[0]:.4f} to {shares[1]:.4f}"
    loss = f"{loss} (change {_interval(change)}, p = {selection.p:.2g})"
    return f"{JUDGED[selection.settings.judge]} went {loss}, {accuracy}."


def _interval(change: dict[str, float]) -> str:
    return f"{change['change']:+.4f}, 95 % interval {change['low']:+.4f} to {change['high']:+.4f}"
