"""The points that an optimiser passes through, each measured on held-out pairs.

Shapes: L blocks, N weighted members, P pairs, V free numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from tqdm.auto import tqdm

from moemerge.artifacts.progress import hidden
from moemerge.fitting.optimisers import OPTIMISERS, choose
from moemerge.fitting.problem import FitOutcome, FitProblem, Measured, Objective
from moemerge.fitting.significance import calibrated_losses, measures
from moemerge.fitting.space import space_of
from moemerge.options.fit import FitSettings

# Where on the line from the start to the end the points `back` lie, as shares of it.
BACK = (0.5, 0.25, 0.125, 0.0625)


@dataclass(frozen=True)
class Point:
    """Coefficients on the way, and what they give on held-out pairs; `judged_P` is the loss that decides."""

    alpha_LN: Tensor
    shared_L: Tensor
    held_out: Measured
    judged_P: Tensor

    @property
    def loss(self) -> float:
        """Mean of the held-out loss that decides."""
        return float(self.judged_P.mean())


def judged(settings: FitSettings, measured: Measured) -> Tensor:
    """What compares points, per pair: Bradley-Terry (calibrated or plain), errors, or what is fitted."""
    if settings.judge == "calibrated":
        return calibrated_losses(measured.margins_P)
    if settings.judge == "accuracy":
        return (measured.margins_P <= 0).double()
    return -logsigmoid(measured.margins_P) if settings.judge == "preferences" else measured.losses_P


class Trajectory:
    """One run of an optimiser, whose task it is (see optimisers.base); points[0] is the start, exactly.

    `back` are points on the straight line back from the end to the start: an optimiser of second order takes
    few and long steps, between which the best place to stop may lie. The run ends when `patience` points in
    a row bring no lower held-out loss. With robust_rounds it begins again from where it ended, each time with
    pairs weighted by exp(loss / temperature), the most overrated answers of candidate sets among them. Source
    of the weights: KL-constrained distributionally robust optimisation, Hu and Hong (2013).
    """

    def __init__(self, problem: FitProblem, objective: Objective, start: FitOutcome) -> None:
        self.settings, self.seed, self.objective = problem.settings, problem.seed, objective
        self.space, self.start = space_of(problem, start), start
        self.v_V, self.low_V, self.high_V = self.space.start_V, self.space.low_V, self.space.high_V
        self.weights_P: Tensor | None = None
        self.points: list[Point] = []
        self.back: list[Point] = []
        self.history: list[dict[str, Any]] = []
        self.passes, self._losses, self._round_began = 0.0, [0.0], 0
        self.optimizer = choose(self.settings.optimizer, objective.num_train)

    @property
    def num_pairs(self) -> int:
        """Number of pairs that are fitted."""
        return self.objective.num_train

    def run(self) -> Trajectory:
        """Run the optimiser to its end."""
        with tqdm(desc="fit", unit="point", leave=False, disable=hidden()) as self.bar:
            self._losses = []
            self.points.append(self._look(self.start.alpha_LN, self.start.shared_L))
            for number in range(1 + self.settings.robust_rounds):
                if number:
                    self._weigh()
                # Patience begins anew: the last point counts as the first of this round.
                self._round_began = len(self.points) - 1
                OPTIMISERS.get(self.optimizer)(self)
            end_V = self.v_V
            for share in BACK:
                self.back.append(self._look(*self._coefficients(self.space.start_V.lerp(end_V, share))))
        return self

    def loss(self, v_V: Tensor) -> float:
        """Mean loss over all pairs with regularisers, forward only."""
        self.passes += 1
        losses_P = self.objective.measure(*self._coefficients(v_V), "train").losses_P
        weighted_P = losses_P if self.weights_P is None else losses_P * self.weights_P
        self._losses.append(float(weighted_P.mean()))
        return self._losses[-1] + float(self.space.pull(v_V))

    def gradient(self, v_V: Tensor, rows: Sequence[int] | None = None) -> tuple[float, Tensor]:
        """Mean loss over the pairs number `rows` (None: all) with regularisers, and its gradient."""
        rows = range(self.num_pairs) if rows is None else rows
        self.passes += len(rows) / self.num_pairs
        weights = None if self.weights_P is None else self.weights_P[list(rows)]
        merge_gradient = self.objective.gradient(*self._coefficients(v_V), rows, weights)
        self._losses.append(merge_gradient.loss)
        return self.space.gradient(v_V, merge_gradient)

    def visit(self, v_V: Tensor) -> bool:
        """Look at a point; True once `patience` points in a row brought nothing."""
        self.v_V = v_V
        self.points.append(self._look(*self._coefficients(v_V)))
        losses = [point.loss for point in self.points[self._round_began :]]
        return len(losses) - 1 - losses.index(min(losses)) >= self.settings.patience

    def _coefficients(self, v_V: Tensor) -> tuple[Tensor, Tensor]:
        """Those of a vector, as tensors of their own: the space gives views of one row where all share it."""
        alpha_LN, shared_L = self.space.point(v_V)
        return alpha_LN.clone(), shared_L.clone()

    def _look(self, alpha_LN: Tensor, shared_L: Tensor) -> Point:
        """The point with these coefficients, measured on held-out pairs and added to the history."""
        held_out = self.objective.measure(alpha_LN, shared_L, "held_out")
        train = {"train_loss": sum(self._losses) / len(self._losses)} if self._losses else {}
        held = {f"held_out_{name}": value for name, value in measures(held_out.margins_P).items()}
        moved = float((alpha_LN - self.start.alpha_LN).abs().sum(1).mean())
        self.history.append({"passes": round(self.passes, 3), **train, **held, "moved_l1": moved})
        self._losses = []
        self.bar.update()
        return Point(alpha_LN, shared_L, held_out, judged(self.settings, held_out))

    def _weigh(self) -> None:
        """Give the training pairs weights for the next round, mean one: the worse the loss, the more."""
        alpha_LN, shared_L = self._coefficients(self.v_V)
        self.objective = self.objective.hardened(alpha_LN, shared_L)
        losses_P = self.objective.measure(alpha_LN, shared_L, "train").losses_P
        # Of all reweightings within a KL ball the worst has weights in proportion to exp(loss / temperature).
        self.weights_P = torch.softmax(losses_P / self.settings.robust_temperature, 0) * len(losses_P)
