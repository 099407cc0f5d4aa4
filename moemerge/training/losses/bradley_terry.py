"""The preference loss: Bradley-Terry, with label smoothing and margins. Shapes: P pairs, B in a batch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from moemerge.data.pairs import doubts_of, margins_of
from moemerge.training.losses.base import Batch, Course, Loss

FLOAT = torch.float32


def bradley_terry(course: Course) -> Loss:
    """-(1 - e) log sigmoid(d - m) - e log sigmoid(m - d), d = score(chosen) - score(rejected).

    e is options.label_smoothing, or the data's column doubt; the margin m is 0, or the data's column. Raises
    DataError if a pair lacks what is asked for.
    Source: adaptive margin and label smoothing, Secrets of RLHF II (arXiv 2401.06080).
    """
    options, pairs = course.options, [pair.pair for pair in course.pairs]
    # As TRL has them: margins are float32, whatever the scores are.
    margins_P = torch.tensor(margins_of(pairs), dtype=FLOAT) if options.margin == "column" else None
    doubted = options.label_smoothing == "column"
    doubts_P = torch.tensor(doubts_of(pairs), dtype=FLOAT) if doubted else None

    def of(batch: Batch) -> Tensor:
        d_B = batch.differences_B
        if margins_P is not None:
            d_B = d_B - margins_P.to(d_B.device)[batch.places_B]
        loss_B = -logsigmoid(d_B)
        if doubts_P is not None:
            doubts_B = doubts_P.to(d_B.device)[batch.places_B]
            return (1 - doubts_B) * loss_B - doubts_B * logsigmoid(-d_B)
        if options.label_smoothing:
            e = float(options.label_smoothing)
            loss_B = (1 - e) * loss_B - e * logsigmoid(-d_B)
        return loss_B

    return Loss(of)
