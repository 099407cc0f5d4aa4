"""Coefficients as a free vector: of an average softmax logits, of a sum the changes' factors themselves.

Shapes: L blocks, R free rows (all blocks may share one), N weighted members, V numbers in all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from moemerge.fitting.problem import FitOutcome, FitProblem, mean_of
from moemerge.merging.average import as_changes, changes
from moemerge.merging.merged_model import MergeGradient

SMALLEST_START = 1e-4
BOUND = 10.0
BOUND_OF_CHANGES = 4.0


class Space(ABC):
    """The vectors v_V, float64, around `start_V`, and the coefficients that they stand for."""

    start_V: Tensor
    low_V: Tensor
    high_V: Tensor

    def __init__(self, problem: FitProblem, start: FitOutcome) -> None:
        self.start, self.settings = start, problem.settings
        self.row_L = torch.tensor(problem.row_of_block)
        # Where blocks share a row, those of the start are equal, and the first stands for all.
        self.first_R = [problem.row_of_block.index(row) for row in range(max(problem.row_of_block) + 1)]

    @abstractmethod
    def point(self, v_V: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_LN and shared_L; gradients pass."""

    @abstractmethod
    def pull(self, v_V: Tensor) -> Tensor:
        """Regularisers, mean over rows."""

    def gradient(self, v_V: Tensor, merge: MergeGradient) -> tuple[float, Tensor]:
        """Loss with regularisers, and its gradient, from the merge's gradient at `point(v_V)`."""
        v_V = v_V.detach().clone().requires_grad_()
        with torch.enable_grad():
            alpha_LN, shared_L = self.point(v_V)
            pull = self.pull(v_V)
            linear = along(merge, alpha_LN, shared_L) + pull
        return merge.loss + float(pull.detach()), torch.autograd.grad(linear, v_V)[0]


def along(merge: MergeGradient, alpha_LN: Tensor, shared_L: Tensor) -> Tensor:
    """<coefficients(v), their gradient held fixed>, whose gradient by v is that of the loss: the chain rule.

    Blocks that share a row add up by themselves. A constant in a row of merge.alpha_LN drops out, as the row
    of alpha sums to one whatever v is.
    """
    return (alpha_LN * merge.alpha_LN).sum() + (shared_L * merge.shared_L).sum()


class Averages(Space):
    """Softmax logits of alpha, and logits of lambda where that is learned.

    Logits move by at most 10 from their start. A member without weight, or a shared weight of 0 or 1, starts
    at 1e-4 from there, so that it can come back.
    """

    def __init__(self, problem: FitProblem, start: FitOutcome) -> None:
        super().__init__(problem, start)
        rows, smallest = len(self.first_R), SMALLEST_START
        self.start_log_RN = start.alpha_LN[self.first_R].clamp(min=smallest).log().log_softmax(1)
        shared_rows = {"learned": rows, "learned_global": 1}.get(str(self.settings.shared_weight), 0)
        self.shared_rows = shared_rows if problem.has_shared else 0
        # One lambda for all blocks starts at their mean, also where alpha has a row for each.
        pooled_R = mean_of(start.shared_L)[None] if self.shared_rows == 1 else start.shared_L[self.first_R]
        shared_R = pooled_R[: self.shared_rows].clamp(smallest, 1 - smallest)
        self.start_V = torch.cat([self.start_log_RN.flatten(), shared_R.logit()])
        self.low_V, self.high_V = self.start_V - BOUND, self.start_V + BOUND

    def point(self, v_V: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_LN and shared_L; gradients pass."""
        logits_RN, shared_R = self._parts(v_V)
        alpha_LN = logits_RN.softmax(1)[self.row_L]
        if not self.shared_rows:
            return alpha_LN, self.start.shared_L
        shared_L = shared_R.sigmoid()
        return alpha_LN, shared_L[self.row_L] if self.shared_rows > 1 else shared_L.expand_as(self.row_L)

    def pull(self, v_V: Tensor) -> Tensor:
        """Mean over rows: kl * KL(alpha | start) and l2 * squared distance of the logits."""
        logits_RN, _ = self._parts(v_V)
        log_RN = logits_RN.log_softmax(1)
        divergence = kl_div(self.start_log_RN, log_RN, log_target=True, reduction="sum")
        away = (v_V - self.start_V).square().sum()
        return (self.settings.kl * divergence + self.settings.l2 * away) / len(logits_RN)

    def _parts(self, v_V: Tensor) -> tuple[Tensor, Tensor]:
        size = self.start_log_RN.numel()
        return v_V[:size].view_as(self.start_log_RN), v_V[size:]


class Sums(Space):
    """The factors c of W = W_shared + sum_i c_i (W_i - W_shared), of any sign and sum.

    They move by at most 4 from their start, and l2 pulls them back there: few pairs fit many of them too
    well.
    """

    def __init__(self, problem: FitProblem, start: FitOutcome) -> None:
        super().__init__(problem, start)
        self.start_RN = changes(start.alpha_LN, start.shared_L)[self.first_R]
        self.start_V = self.start_RN.flatten()
        self.low_V, self.high_V = self.start_V - BOUND_OF_CHANGES, self.start_V + BOUND_OF_CHANGES

    def point(self, v_V: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_LN and shared_L; gradients pass."""
        alpha_RN, total_R = as_changes(v_V.view_as(self.start_RN))
        return alpha_RN[self.row_L], 1 - total_R[self.row_L]

    def pull(self, v_V: Tensor) -> Tensor:
        """l2 * squared distance from the start, mean over rows."""
        return self.settings.l2 * (v_V - self.start_V).square().sum() / len(self.start_RN)


def space_of(problem: FitProblem, start: FitOutcome) -> Space:
    """The space of the settings' coordinates, around `start`."""
    return Sums(problem, start) if problem.settings.coordinates == "sum" else Averages(problem, start)
