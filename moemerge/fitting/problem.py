"""What a method that finds coefficients is given, and what it returns.

Shapes: L blocks (rows of coefficients), N routed experts, P pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from moemerge.data.pairs import numbered
from moemerge.errors import OptionError
from moemerge.merging.average import changes
from moemerge.merging.blocks import HEAD, layer_of
from moemerge.merging.merged_model import MergeGradient
from moemerge.options.fit import FitSettings

if TYPE_CHECKING:
    from moemerge.models.routing import RoutingStatistics

Split = Literal["train", "held_out"]


@dataclass(frozen=True)
class Measured:
    """Margin and loss of P pairs by the merged model, float64 on CPU.

    margins_P: score(chosen) - score(rejected). losses_P: the loss that is fitted.
    """

    margins_P: Tensor
    losses_P: Tensor


class Objective(Protocol):
    """The merged model's loss on preference pairs, as a function of the coefficients."""

    @property
    def num_train(self) -> int:
        """Number of training pairs."""
        ...

    def prompts(self, split: Split) -> list[int]:
        """For each pair of the split a number that pairs of the same prompt share."""
        ...

    def gradient(
        self, alpha_LN: Tensor, shared_L: Tensor, rows: Sequence[int], weights: Tensor | None = None
    ) -> MergeGradient:
        """Loss and gradient over the training pairs number `rows`, each times its weight (default: 1)."""
        ...

    def measure(self, alpha_LN: Tensor, shared_L: Tensor, split: Split) -> Measured:
        """Margin and loss of every pair of the split."""
        ...

    def folds(self, number: int, seed: int) -> list[Objective]:
        """Objectives that hold out each of `number` parts of the training pairs in turn."""
        ...

    def hardened(self, alpha_LN: Tensor, shared_L: Tensor) -> Objective:
        """The objective with further training pairs: a candidate that the merged model overrates, each."""
        ...


@dataclass(frozen=True)
class FitProblem:
    """What a method may use. `statistics` are there only after routing, `objective` only if pairs were given.

    `objective` and `output_grams` are functions, so that only a method that needs the merged model pays for
    loading it. `start` are coefficients to start from, if the user names some. `output_grams` gives the
    quadratic form of least_squares for each block, [L, N + 1, N + 1] (see gram.py). `kinds`: for granularity
    group, what kind of tensors each block has.
    """

    blocks: list[str]
    num_experts: int
    has_shared: bool
    settings: FitSettings
    seed: int = 0
    statistics: RoutingStatistics | None = None
    objective: Callable[[], Objective] | None = None
    start: FitOutcome | None = None
    output_grams: Callable[[FitOutcome], Tensor] | None = None
    kinds: Sequence[str] = ()

    def routing(self) -> RoutingStatistics:
        """The statistics; OptionError if there are none."""
        if self.statistics is not None:
            return self.statistics
        raise OptionError(
            "routing statistics are needed",
            given="routing: nothing",
            expected="the folder that route wrote for this MoE (for usage, and for shared_weight match)",
            fix="give routing, which moemerge route writes for a MoE; or choose method uniform, and a number "
            "as shared_weight",
        )

    def layer_rows(self, layers: Sequence[int]) -> list[int]:
        """For each block the position of its transformer layer in `layers`."""
        return [layers.index(layer_of(block)) for block in self.blocks]

    @cached_property
    def row_of_block(self) -> list[int]:
        """The free row of coefficients that each block uses: its own, that of its kind, or one for all.

        In a sum the head has a row of its own even then: its members add up to a scale, the body's do not.
        """
        if not self.settings.shares_rows:
            return list(range(len(self.blocks)))
        if self.settings.granularity == "group":
            return numbered(self.kinds)
        return numbered(self.settings.coordinates == "sum" and block == HEAD for block in self.blocks)

    def pooled(self, values: Tensor) -> Tensor:
        """`values`, a row per block; where blocks share a row, their mean in each."""
        if not self.settings.shares_rows:
            return values
        row_L = torch.tensor(self.row_of_block)
        return torch.stack([mean_of(values[row_L == row]) for row in self.row_of_block])

    def data(self) -> Objective:
        """The objective; OptionError if there is none."""
        if self.objective is not None:
            return self.objective()
        raise no_pairs()

    def grams(self, start: FitOutcome) -> Tensor:
        """The quadratic forms at `start`; OptionError without pairs."""
        if self.output_grams is not None:
            return self.output_grams(start)
        raise no_pairs()


def mean_of(values: Tensor) -> Tensor:
    """Mean over the first dimension; a number that is the same all along it stays as it is, bit for bit."""
    # The sum of three equal numbers is rounded, and a third of it need not be that number again.
    return torch.where((values == values[0]).all(0), values[0], values.mean(0))


def no_pairs() -> OptionError:
    """The error of a method that has no data."""
    return OptionError(
        "this method needs preference pairs",
        given="pairs: nothing",
        expected="a file of preference pairs",
        fix="give pairs; or choose method uniform, which needs none, or usage, which needs routing",
    )


@dataclass(frozen=True)
class FitOutcome:
    """Coefficients that a method found, or starts from. `report` holds JSON values, `verdict` a sentence."""

    alpha_LN: Tensor
    shared_L: Tensor
    report: dict[str, Any] = field(default_factory=dict)


def movement(problem: FitProblem, first: FitOutcome, last: FitOutcome) -> list[dict[str, Any]]:
    """How far each block's alpha, or the c of a sum, went: L1, half of it, and the shared weight's change."""
    adds = problem.settings.coordinates == "sum"
    before_LN, after_LN = (changes(at.alpha_LN, at.shared_L) if adds else at.alpha_LN for at in (first, last))
    l1_L = (after_LN - before_LN).abs().sum(1)
    shared_L = last.shared_L - first.shared_L
    return [
        {"block": name, "l1": float(l1), "total_variation": float(l1) / 2, "shared": float(shared)}
        for name, l1, shared in zip(problem.blocks, l1_L, shared_L, strict=True)
    ]


Method = Callable[[FitProblem], FitOutcome]
