"""Coefficients learned on preference pairs: Adam on softmax logits, judged on held-out pairs.

Shapes: L blocks, N routed experts, P pairs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div
from tqdm.auto import tqdm

from moemerge.coefficients.base import FitOutcome, FitProblem, Objective, gain, measures, start

SMALLEST_START = 1e-4


@dataclass(frozen=True)
class _Point:
    """Coefficients on the way, and their margins on the held-out pairs."""

    step: int
    alpha_LN: Tensor
    shared_L: Tensor
    margins_P: Tensor

    @property
    def measures(self) -> dict[str, float]:
        return measures(self.margins_P)


def learned(problem: FitProblem) -> FitOutcome:
    """Fit alpha, and lambda if shared_weight is learned, to the Bradley-Terry loss of the merged model.

    Starts from settings.initial (and shared weight 0.5, the best fixed one of UMM-RM, if that is learned;
    an expert without gate mass starts at 1e-4, so that it can come back). Every 1 / evals_per_epoch the
    held-out pairs are scored; `patience` evaluations without a lower loss end the fit. The outcome is the
    best point seen, which is the start itself if nothing beats it. Deterministic for a given seed.

    Raises OptionError without pairs, or without routing where the start needs it.
    Source: learned merge coefficients, XFT (arXiv 2404.15247, fourth step) and UMM-RM (arXiv 2512.00724).
    """
    objective = problem.data()
    walk = _Walk(problem, objective, start(problem))
    walk.run()
    first, best = walk.points[0], min(walk.points, key=lambda p: p.measures["loss"])
    report = {
        "verdict": _verdict(first, best),
        "kept_initial": best is first,
        "pairs": {"train": objective.num_train, "held_out": len(first.margins_P)},
        "train": {name: _on_train(objective, p) for name, p in (("before", first), ("after", best))},
        "held_out": {
            "before": first.measures,
            "after": best.measures,
            "gain": gain(first.margins_P, best.margins_P),
        },
        "moved": _movement(problem.blocks, first, best),
        "best_step": best.step,
        "steps": walk.points[-1].step,
        "trajectory": walk.trajectory,
    }
    return FitOutcome(best.alpha_LN, best.shared_L, report)


class _Walk:
    """The path of the optimiser through coefficient space; points[0] is the start, exactly."""

    def __init__(self, problem: FitProblem, objective: Objective, start: FitOutcome) -> None:
        self.settings, self.objective = problem.settings, objective
        self.start = start
        self.start_log_LN = start.alpha_LN.clamp(min=SMALLEST_START).log().log_softmax(1)
        self.logits_LN = self.start_log_LN.clone().requires_grad_()
        self.shared_logit_L = start.shared_L.logit()
        self.learns_shared = problem.has_shared and self.settings.shared_weight == "learned"
        self.shared_logit_L.requires_grad_(self.learns_shared)
        parameters = [self.logits_LN, *([self.shared_logit_L] if self.learns_shared else [])]
        self.optimiser = torch.optim.Adam(parameters, lr=self.settings.learning_rate)
        self.generator = torch.Generator().manual_seed(problem.seed)
        self.points: list[_Point] = []
        self.trajectory: list[dict[str, Any]] = []

    def run(self) -> None:
        """Step until `patience` evaluations in a row bring nothing, or max_epochs are over."""
        per_epoch = math.ceil(self.objective.num_train / self.settings.batch_size)
        every = math.ceil(per_epoch / self.settings.evals_per_epoch)
        total = per_epoch * self.settings.max_epochs
        self._evaluate(0, [], self.start.alpha_LN, self.start.shared_L)
        losses: list[float] = []
        order: list[list[int]] = []
        for step in tqdm(range(1, total + 1), desc="fit", leave=False, disable=None):
            order = order or self._epoch()
            losses.append(self._step(order.pop(0)))
            if step % every == 0 or step == total:
                self._evaluate(step, losses, *self._coefficients())
                losses = []
                if self._stale() >= self.settings.patience:
                    return

    def _epoch(self) -> list[list[int]]:
        order = torch.randperm(self.objective.num_train, generator=self.generator)
        return [rows.tolist() for rows in order.split(self.settings.batch_size)]

    def _coefficients(self) -> tuple[Tensor, Tensor]:
        shared_L = self.shared_logit_L.sigmoid() if self.learns_shared else self.start.shared_L
        return self.logits_LN.softmax(1), shared_L

    def _step(self, rows: list[int]) -> float:
        """One step on the pairs `rows`: the loss, made linear in the coefficients, is left to autograd."""
        alpha_LN, shared_L = self._coefficients()
        at = self.objective.gradient(alpha_LN.detach(), shared_L.detach(), rows)
        loss = (alpha_LN * at.alpha_LN).sum() + (shared_L * at.shared_L).sum()
        if self.settings.kl:
            pull = kl_div(self.start_log_LN, self.logits_LN.log_softmax(1), log_target=True, reduction="sum")
            loss = loss + self.settings.kl * pull / len(alpha_LN)
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        return at.loss

    def _evaluate(self, step: int, losses: list[float], alpha_LN: Tensor, shared_L: Tensor) -> None:
        alpha_LN, shared_L = alpha_LN.detach().clone(), shared_L.detach().clone()
        margins_P = self.objective.margins(alpha_LN, shared_L, "held_out")
        self.points.append(_Point(step, alpha_LN, shared_L, margins_P))
        moved = float((alpha_LN - self.start.alpha_LN).abs().sum(1).mean())
        train = {"train_loss": sum(losses) / len(losses)} if losses else {}
        held_out = {f"held_out_{name}": value for name, value in self.points[-1].measures.items()}
        self.trajectory.append({"step": step, **train, **held_out, "moved_l1": moved})

    def _stale(self) -> int:
        """Number of evaluations since the best one."""
        losses = [point.measures["loss"] for point in self.points]
        return len(losses) - 1 - losses.index(min(losses))


def _on_train(objective: Objective, point: _Point) -> dict[str, float]:
    return measures(objective.margins(point.alpha_LN, point.shared_L, "train"))


def _gain(first: _Point, best: _Point) -> dict[str, float]:
    return gain(first.margins_P, best.margins_P)


def _movement(blocks: list[str], first: _Point, best: _Point) -> list[dict[str, Any]]:
    l1_L = (best.alpha_LN - first.alpha_LN).abs().sum(1)
    shared_L = best.shared_L - first.shared_L
    return [
        {"block": name, "l1": float(l1), "total_variation": float(l1) / 2, "shared": float(shared)}
        for name, l1, shared in zip(blocks, l1_L, shared_L, strict=True)
    ]


def _verdict(first: _Point, best: _Point) -> str:
    if best is first:
        return "Nothing that was tried beat the initial coefficients on the held-out pairs: they are kept."
    lower, before, after = _gain(first, best), first.measures, best.measures
    text = (
        f"The held-out loss fell from {before['loss']:.4f} to {after['loss']:.4f}, by {lower['mean']:.4f} "
        f"(standard error {lower['standard_error']:.4f}), and accuracy went from {before['accuracy']:.4f} to "
        f"{after['accuracy']:.4f}."
    )
    if lower["mean"] < 2 * lower["standard_error"]:
        return f"{text} This is within two standard errors: it may be chance."
    return f"{text} The best of several points was chosen on these same pairs, which flatters it a little."
