"""The preference loss: Bradley-Terry, with label smoothing and margins. Shapes: P pairs, B in a batch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from moemerge.data.pairs import margins_of
from moemerge.training.losses.base import Batch, Course, Loss


def bradley_terry(course: Course) -> Loss:
    """-(1 - e) log sigmoid(d - m) - e log sigmoid(m - d), d = score(chosen) - score(rejected).

    e is options.label_smoothing; the margin m is 0, or the data's column. Raises DataError if a pair lacks
    it.
    Source: adaptive margin and label smoothing, Secrets of RLHF II (arXiv 2401.06080).
    """
    options, margins_P = course.options, None
    if options.margin == "column":
        # As TRL has them: margins are float32, whatever the scores are.
        margins_P = torch.tensor(margins_of([pair.pair for pair in course.pairs]), dtype=torch.float32)

    def of(batch: Batch) -> Tensor:
        d_B = batch.differences_B
        if margins_P is not None:
            d_B = d_B - margins_P.to(d_B.device)[batch.places_B]
        loss_B = -logsigmoid(d_B)
        if options.label_smoothing:
            loss_B = (1 - options.label_smoothing) * loss_B - options.label_smoothing * logsigmoid(-d_B)
        return loss_B

    return Loss(of)
