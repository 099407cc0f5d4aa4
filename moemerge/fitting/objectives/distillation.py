"""Distillation: the merged model is to score as the MoE does. Shapes: P pairs, B at a time."""

from __future__ import annotations

from torch import Tensor

from moemerge.fitting.objectives.base import Term, of_rows
from moemerge.fitting.targets import Targets
from moemerge.merging.merged_model import Answers


def distillation(targets: Targets) -> Term:
    """(d - t)^2, d and t being score(chosen) - score(rejected) of the merged model and of the teacher.

    Scores count up to a constant only, so differences are compared. The teacher is the MoE itself, or, for a
    list of models, the mean of their scores. Labels are not used.
    """
    teacher_P = targets.teacher_P

    def loss(answers: Answers, rows: Tensor) -> Tensor:
        return (answers.margins_P - of_rows(teacher_P, rows, answers.margins_P)).square()

    return Term(loss)
