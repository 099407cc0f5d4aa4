"""What an objective is. Shapes: P pairs, B of them at a time, D width of the last state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moemerge.fitting.objectives import OBJECTIVES
from moemerge.fitting.targets import Targets
from moemerge.merging.merged_model import Answers

Loss = Callable[[Answers, Tensor], Tensor]


@dataclass(frozen=True)
class Term:
    """`loss(answers, rows)`: the loss of B pairs, float64 [B], whose numbers in Targets.pairs are `rows`.

    Numbers beyond those pairs are hard negatives, which have labels and no targets: a term that needs targets
    gives 0 for them. `states`: the loss looks at last-token states.
    """

    loss: Loss
    states: bool = False


MakeTerm = Callable[[Targets], Term]


def mixture(weights: Mapping[str, float], targets: Targets) -> Term:
    """The weighted sum of the objectives named. Raises OptionError for an unknown one."""
    terms = [(weight, OBJECTIVES.get(name)(targets)) for name, weight in weights.items()]

    def loss(answers: Answers, rows: Tensor) -> Tensor:
        return torch.stack([weight * term.loss(answers, rows) for weight, term in terms]).sum(0)

    return Term(loss, any(term.states for _, term in terms))


def of_rows(values_P: Tensor, rows: Tensor, otherwise: Tensor) -> Tensor:
    """`values_P` of these rows; where there is none, `otherwise`, so that their difference is 0."""
    known = rows < len(values_P)
    # Rows beyond the end read the last value, which `where` then drops.
    values_B = values_P[rows.clamp(max=len(values_P) - 1)].to(otherwise.device)
    shape = [-1] + [1] * (otherwise.ndim - 1)
    # A target has no gradient; where it is the answer itself, the squared difference has none either.
    return torch.where(known.view(shape).to(otherwise.device), values_B, otherwise.detach())
