"""The preference loss: Bradley-Terry, with label smoothing and margins. Shapes: P pairs, B at a time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from moemerge.data.pairs import margins_of
from moemerge.fitting.objectives.base import Term, of_rows
from moemerge.fitting.targets import Targets
from moemerge.merging.merged_model import Answers


def bradley_terry(targets: Targets) -> Term:
    """-(1 - e) log sigmoid(d - m) - e log sigmoid(m - d), d = score(chosen) - score(rejected).

    e is settings.label_smoothing; the margin m is 0, the data's column, or the teacher's own difference
    (preference strength). Raises DataError if a pair lacks the column.
    Source: adaptive margin and soft labels, Secrets of RLHF II (arXiv 2401.06080).
    """
    margins_P, smoothing = _margins(targets), targets.settings.label_smoothing

    def loss(answers: Answers, rows: Tensor) -> Tensor:
        d_B = answers.margins_P
        if margins_P is not None:
            # Hard negatives have no margin: theirs is 0.
            d_B = d_B - of_rows(margins_P, rows, torch.zeros_like(d_B))
        return -(1 - smoothing) * logsigmoid(d_B) - smoothing * logsigmoid(-d_B)

    return Term(loss)


def _margins(targets: Targets) -> Tensor | None:
    kind = targets.settings.margin
    if kind == "none":
        return None
    if kind == "strength":
        return targets.teacher_P
    margins = margins_of([pair.pair for pair in targets.pairs])
    return torch.tensor(margins, dtype=torch.float64)
