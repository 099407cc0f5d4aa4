"""What an optimiser is given. Shapes: V free numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from moemerge.options.fit import FitSettings


class Task(Protocol):
    """A loss over vectors between two bounds, all float64, and an observer of the points on the way.

    `v_V` is where to begin. An optimiser calls `visit` with every point that may become the outcome, and ends
    when that returns True; it returns nothing, as the task keeps what it was shown.
    """

    v_V: Tensor
    low_V: Tensor
    high_V: Tensor
    settings: FitSettings
    seed: int

    @property
    def num_pairs(self) -> int:
        """Number of pairs that are fitted."""
        ...

    def loss(self, v_V: Tensor) -> float:
        """Mean loss over all pairs, forward only."""
        ...

    def gradient(self, v_V: Tensor, rows: Sequence[int] | None = None) -> tuple[float, Tensor]:
        """Mean loss over the pairs number `rows` (None: all), and its gradient."""
        ...

    def visit(self, v_V: Tensor) -> bool:
        """Measure a point and keep it; True: stop."""
        ...


Optimiser = Callable[[Task], None]
