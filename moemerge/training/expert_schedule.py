"""What makes experts grow apart in training: a schedule that says, step by step, how to steer the gates.

All of it follows from the options, the number of the step and the pairs' places in the data set, so a resumed
run is steered as one that was never stopped. Shapes: P pairs of a batch, B = 2 P sequences, the chosen ones
first, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moemerge.errors import OptionError, suggest
from moemerge.models.moe import Steering
from moemerge.options.train import Train


@dataclass(frozen=True)
class ExpertSchedule:
    """How gates are steered from the first step to the last of `total_steps`.

    `experts` holds the routed expert of every training pair, by its place in the data set; it is empty if
    routers choose from the start.
    """

    options: Train
    total_steps: int
    experts: Sequence[int] = ()

    @property
    def sizes(self) -> list[int]:
        """How many pairs each expert was given; empty if routers choose."""
        return np.bincount(self.experts).tolist() if self.experts else []

    def at(self, step: int, places_P: Tensor) -> Steering:
        """The steering of a batch of the pairs at `places_P`, in the update after `step` updates.

        Both answers of a pair are steered alike.
        """
        forced = self.experts and step < self.options.assign_share * self.total_steps
        experts_P = [self.experts[row] for row in places_P.tolist()] if forced else None
        return Steering(
            temperature=self.temperature(step),
            num_selected=1 if step < self.options.top1_warmup * self.total_steps else None,
            expert_B=None if experts_P is None else torch.tensor(experts_P * 2, device=places_P.device),
            alone_B=self._alone(step, places_P),
        )

    def temperature(self, step: int) -> float:
        """From `router_temperature` in a straight line to 1, where it stays."""
        left = max(0.0, 1 - step / (self.options.temperature_share * self.total_steps))
        return 1 + (self.options.router_temperature - 1) * left

    def _alone(self, step: int, places_P: Tensor) -> Tensor | None:
        """One draw per pair and step, whatever the batches: [B], or None without dropout."""
        chance, seed = self.options.shared_dropout, self.options.seed
        if not chance:
            return None
        # A generator of its own for each pair and step: a resumed run draws the same, in any order of pairs.
        drawn_P = [np.random.default_rng((seed, step, row)).random() for row in places_P.tolist()]
        return torch.tensor([drawn < chance for drawn in drawn_P] * 2, device=places_P.device)


def assign_experts(options: Train, subsets: Sequence[str], num_experts: int) -> list[int]:
    """The routed expert of each pair, whose subset is given; nothing if routers choose.

    `shards` deals the pairs out at random, `subset` the subsets in order, by name or as `assign_order` says;
    with more subsets than experts they go round again. Raises OptionError if there is but one subset, or one
    that the order lacks.
    """
    if options.assign == "router":
        return []
    if options.assign == "shards":
        order = np.random.default_rng(options.seed).permutation(len(subsets))
        return [int(rank) % num_experts for rank in order]  # shards of equal size, up to one pair
    names = options.assign_order or sorted(set(subsets))
    _check_subsets(sorted(set(subsets)), names)
    return [names.index(subset) % num_experts for subset in subsets]


def _check_subsets(subsets: list[str], names: list[str]) -> None:
    if len(subsets) < 2:
        raise OptionError(
            "assign: subset needs subsets",
            given=f"{len(subsets)} in the training pairs: {subsets}",
            expected="rows with a field subset, of two values at least",
            fix="name the field, fields: {subset: NAME}, or use assign: shards",
        )
    unknown = [name for name in subsets if name not in names]
    if unknown:
        raise OptionError(
            f"assign_order lacks {len(unknown)} subset(s) of the training pairs",
            given=f"{', '.join(names)}; lacks {', '.join(map(repr, unknown[:5]))}",
            expected="every subset once",
            fix=suggest(unknown[0], names),
        )
