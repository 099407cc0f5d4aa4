"""Rows drawn at random before they are tokenised: of a large file only those that are wanted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import numpy as np

from moemerge.data.rows import RowReport


class Numbered(Protocol):
    """What knows the number of its row in the source."""

    @property
    def row(self) -> int:
        """Counted from 1."""


T = TypeVar("T", bound=Numbered)
U = TypeVar("U", bound=Numbered)


def draw(
    items: Sequence[T],
    most: int | None,
    seed: int,
    usable: Callable[[Sequence[T]], Sequence[U]],
    report: RowReport,
) -> list[U]:
    """What `usable` makes of at most `most` items (None: all), drawn from `seed`, in the order of their rows.

    For each item that it leaves out another is drawn, as long as there are any. Those that it was not asked
    about are counted in `report`.
    """
    if most is None or len(items) <= most:
        return [*usable(items)]
    order = np.random.default_rng(seed).permutation(len(items)).tolist()
    taken: list[U] = []
    while order and len(taken) < most:
        wanted = most - len(taken)
        some, order = order[:wanted], order[wanted:]
        taken += usable([items[place] for place in sorted(some)])
    report.not_drawn += len(order)
    return sorted(taken, key=lambda item: item.row)


def first(items: Sequence[T], most: int | None, report: RowReport) -> Sequence[T]:
    """The first `most` items (None: all); the others are counted in `report`."""
    report.not_drawn += len(items) - len(items[:most])
    return items[:most]
