"""Which of several candidate models is taken: a simpler one, unless a costlier one is better beyond chance.

Shapes: C candidates, P pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from moemerge.fitting.significance import calibrated_losses, chance
from moemerge.reports.statistics import Floats, Integers


@dataclass(frozen=True)
class Judged:
    """What candidates say of pairs that none of them was made from.

    margins_CP: score(chosen) - score(rejected). ranks_C: how much a candidate takes to make; equal ranks take
    as much. parts_P: the part of the data in which a pair was held out. prompts_P: equal for pairs of one
    prompt.
    """

    names: Sequence[str]
    ranks_C: Integers
    margins_CP: Floats
    parts_P: Integers
    prompts_P: Integers

    def of_pairs(self, chosen_P: Integers) -> Judged:
        """The same candidates on the pairs with these numbers."""
        margins_CP, parts_P = self.margins_CP[:, chosen_P], self.parts_P[chosen_P]
        return Judged(self.names, self.ranks_C, margins_CP, parts_P, self.prompts_P[chosen_P])

    def first(self, count: int) -> Judged:
        """The first so many candidates, on the same pairs."""
        names, ranks_C, margins_CP = self.names[:count], self.ranks_C[:count], self.margins_CP[:count]
        return Judged(names, ranks_C, margins_CP, self.parts_P, self.prompts_P)

    @cached_property
    def losses_CP(self) -> Floats:
        """Bradley-Terry loss after the best factor on each candidate's margins: louder is not better.

        One factor over all parts: the models that stand for a candidate there were made alike.
        """
        losses = [calibrated_losses(torch.from_numpy(margins_P)) for margins_P in self.margins_CP]
        return torch.stack(losses).numpy()

    @cached_property
    def right_CP(self) -> Floats:
        """1 where the chosen answer has the higher score; ties are errors."""
        return (self.margins_CP > 0).astype(np.float64)


@dataclass(frozen=True)
class Round:
    """A comparison of the candidate taken so far with all costlier ones: p of each that it may be chance."""

    taken: str
    p: dict[str, float]


@dataclass(frozen=True)
class Choice:
    """The candidate taken, by its number, and the comparisons that led there."""

    taken: int
    rounds: list[Round] = field(default_factory=list)


def choose(judged: Judged, level: float, seed: int) -> Choice:
    """The candidate to take.

    It starts with the simplest, of several the one with the lowest calibrated loss. As long as costlier ones
    have a lower loss with p < level and no lower accuracy, the simplest of these takes its place. p knows how
    many are compared (max-T over sign flips of whole prompts), so that where no costlier candidate is better
    than the start, one is taken with a chance of at most `level`.
    """
    taken = _best(judged, np.flatnonzero(judged.ranks_C == judged.ranks_C.min()))
    rounds = []
    while len(costlier := np.flatnonzero(judged.ranks_C > judged.ranks_C[taken])):
        p = _chances(judged, taken, costlier, seed)
        rounds.append(Round(judged.names[taken], {judged.names[c]: p[c] for c in costlier.tolist()}))
        accuracy_C = judged.right_CP.mean(1)
        better = [c for c in costlier.tolist() if p[c] < level and accuracy_C[c] >= accuracy_C[taken]]
        if not better:
            break
        lowest = judged.ranks_C[better].min()
        taken = _best(judged, np.array([c for c in better if judged.ranks_C[c] == lowest]))
    return Choice(taken, rounds)


def choose_in_parts(judged: Judged, level: float, seed: int) -> Integers:
    """For each pair the candidate that `choose` takes on the pairs of all other parts, [P].

    What the rule takes, measured on pairs that it has not seen: the accuracy of the best of many candidates
    on the pairs that chose it is too high.
    """
    taken_P = np.zeros(len(judged.parts_P), dtype=np.int64)
    for part in np.unique(judged.parts_P):
        others = judged.of_pairs(np.flatnonzero(judged.parts_P != part))
        taken_P[judged.parts_P == part] = choose(others, level, seed).taken
    return taken_P


def _best(judged: Judged, numbers: Integers) -> int:
    return int(numbers[judged.losses_CP[numbers].mean(1).argmin()])


def _chances(judged: Judged, taken: int, costlier: Integers, seed: int) -> dict[int, float]:
    gains_KP = torch.from_numpy(judged.losses_CP[taken] - judged.losses_CP[costlier])
    prompts = judged.prompts_P.tolist()
    return {int(c): chance(gains_KP, k, prompts, seed) for k, c in enumerate(costlier)}
