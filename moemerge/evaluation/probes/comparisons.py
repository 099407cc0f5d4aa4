"""Every model against every other on the same pairs.

M models, P pairs, R resamples.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moemerge.reports.statistics import (
    Floats,
    Integers,
    clustered_mcnemar,
    holm,
    mcnemar,
    percentile_interval,
)
from moemerge.reports.table import Table, percent

Comparison = dict[str, Any]


def difference(
    right_P2: NDArray[np.bool_], draws_R2: Floats, units_P: Integers, confidence: float
) -> Comparison:
    """First model minus second: accuracy, paired bootstrap interval, exact McNemar p.

    Where pairs share a unit (a prompt), McNemar's test takes units whole (`clustered_mcnemar`).
    """
    gain_P = right_P2[:, 0].astype(np.int64) - right_P2[:, 1]
    ours, theirs = int((gain_P > 0).sum()), int((gain_P < 0).sum())
    low, high = percentile_interval(draws_R2[:, [0]] - draws_R2[:, [1]], confidence)
    _, numbers = np.unique(units_P, return_inverse=True)
    by_unit = np.bincount(numbers, gain_P).round().astype(np.int64)
    shared = len(by_unit) < len(gain_P)
    return {
        "difference": (ours - theirs) / len(gain_P),
        "interval": (float(low[0]), float(high[0])),
        "first_alone": ours,
        "second_alone": theirs,
        "p": clustered_mcnemar(by_unit) if shared else mcnemar(ours, theirs),
    }


def all_pairs(
    models: Sequence[str],
    right_PM: NDArray[np.bool_],
    draws_RM: Floats,
    units_P: Integers,
    confidence: float,
) -> list[Comparison]:
    """`difference` of each two models, in the order of `models`."""
    return [
        {"first": models[one], "second": models[other]}
        | difference(right_PM[:, [one, other]], draws_RM[:, [one, other]], units_P, confidence)
        for one, other in itertools.combinations(range(len(models)), 2)
    ]


def adjust(comparisons: Iterable[Comparison]) -> None:
    """Give each of `comparisons`, which are looked at together, Holm's p and their number, in place."""
    family = list(comparisons)
    for one, p in zip(family, holm(np.array([c["p"] for c in family])), strict=True):
        one |= {"p_holm": float(p), "tests": len(family)}


def table(name: str, comparisons: Sequence[Comparison], confidence: float) -> Table:
    """Every comparison of one test set."""
    header = ["A", "B", "A minus B", f"{percent(confidence)} interval", "only A right", "only B right"]
    rows = []
    for one in comparisons:
        low, high = one["interval"]
        row = [one["first"], one["second"], f"{one['difference']:+.4f}", f"{low:+.4f} to {high:+.4f}"]
        alone = [str(one["first_alone"]), str(one["second_alone"])]
        rows.append([*row, *alone, f"{one['p']:.3g}", f"{one['p_holm']:.3g}"])
    note = f"{len(rows)} comparisons of the same pairs. Intervals and p take each by itself; "
    note += "p (Holm) is adjusted for their number."
    return Table(f"Every two models on {name}", [*header, "p", "p (Holm)"], rows, note)


def against(name: str, parts: Mapping[str, Any], baseline: str, confidence: float) -> Table:
    """Each model minus the baseline, part by part (sections, subsets)."""
    models = [model for model in next(iter(parts.values()))["models"] if model != baseline]
    rows = []
    for part, measured in parts.items():
        found = {one["first"]: (one, 1) for one in measured["comparisons"] if one["second"] == baseline}
        found |= {one["second"]: (one, -1) for one in measured["comparisons"] if one["first"] == baseline}
        rows.append([part, str(measured["pairs"]), *(_signed(*found[model]) for model in models)])
    tests = next(iter(parts.values()))["comparisons"][0]["tests"]
    note = (
        f"{percent(confidence)} intervals, each by itself; p: Holm's, adjusted for all {tests} comparisons "
    )
    note += "of two models on one of these parts. Of few prompts intervals are too narrow: read p."
    return Table(f"Minus {baseline} on {name}", ["part", "pairs", *models], rows, note)


def _signed(one: Comparison, sign: int) -> str:
    low, high = sorted(sign * end + 0.0 for end in one["interval"])  # + 0.0: no minus zero
    return f"{sign * one['difference'] + 0.0:+.3f} ({low:+.3f} to {high:+.3f}), p {one['p_holm']:.2g}"
