"""Every model against every other on the same pairs; of many models, each against the baseline.

M models, P pairs, R resamples.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from moemerge.evaluation.benchmark_results import ScoreComparison
from moemerge.evaluation.results import AccuracyPart, Comparison, Paired
from moemerge.reports.statistics import (
    Floats,
    Integers,
    clustered_mcnemar,
    holm,
    lead_interval,
    mcnemar,
    resampled_p,
)
from moemerge.reports.table import Table, percent, with_interval

MOST_MODELS = 20  # of which every two are compared: their number, and Holm's factor, grow with the square


def compared(models: int, baseline: int) -> list[tuple[int, int]]:
    """The two models of each comparison: every two, or of more than MOST_MODELS each and the baseline."""
    every = itertools.combinations(range(models), 2)
    return [both for both in every if models <= MOST_MODELS or baseline in both]


def score_comparison(
    names: tuple[str, str], gain_V: Floats, units: int, confidence: float
) -> ScoreComparison:
    """How the first model's score exceeds the second's: `gain_V` holds the value, then resamples of it."""
    difference = float(gain_V[0])
    return {
        "first": names[0],
        "second": names[1],
        "difference": difference,
        "interval": lead_interval(gain_V[1:], units, confidence),
        "p": resampled_p(difference, gain_V[1:], units),
    }


def difference(right_P2: NDArray[np.bool_], draws_R2: Floats, units_P: Integers, confidence: float) -> Paired:
    """First model minus second: accuracy, paired bootstrap interval, exact McNemar p.

    Where pairs share a unit (a prompt), McNemar's test takes units whole (`clustered_mcnemar`).
    """
    gain_P = right_P2[:, 0].astype(np.int64) - right_P2[:, 1]
    ours, theirs = int((gain_P > 0).sum()), int((gain_P < 0).sum())
    _, numbers = np.unique(units_P, return_inverse=True)
    by_unit = np.bincount(numbers, gain_P).round().astype(np.int64)
    shared = len(by_unit) < len(gain_P)
    return {
        "difference": (ours - theirs) / len(gain_P),
        "interval": lead_interval(draws_R2[:, 0] - draws_R2[:, 1], len(by_unit), confidence),
        "first_alone": ours,
        "second_alone": theirs,
        "p": clustered_mcnemar(by_unit) if shared else mcnemar(ours, theirs),
    }


def all_pairs(
    models: Sequence[str],
    baseline: int,
    right_PM: NDArray[np.bool_],
    draws_RM: Floats,
    units_P: Integers,
    confidence: float,
) -> list[Comparison]:
    """`difference` of the models that `compared` names, in order; each a family of its own until `adjust`."""
    found: list[Comparison] = []
    for both in compared(len(models), baseline):
        paired = difference(right_PM[:, both], draws_RM[:, both], units_P, confidence)
        first, second = (models[number] for number in both)
        found.append({"first": first, "second": second, **paired, "p_holm": paired["p"], "tests": 1})
    return found


def adjust(families: Iterable[Sequence[Comparison]], first_alike: Mapping[str, str]) -> None:
    """Give each comparison of `families`, which are looked at together, Holm's p and their number, in place.

    first_alike: of each model the first whose scores are the same. What is said of a model and of its copy is
    one comparison, and a model is not compared with its copy.
    """
    alike: dict[tuple[int, frozenset[str]], list[Comparison]] = {}
    for number, family in enumerate(families):
        for comparison in family:
            both = frozenset(first_alike[comparison[side]] for side in ("first", "second"))
            alike.setdefault((number, both), []).append(comparison)
    different = [found for (_, both), found in alike.items() if len(both) > 1]
    adjusted = holm(np.array([found[0]["p"] for found in different]))
    for found, p in zip(different, adjusted.tolist(), strict=True):
        for comparison in found:
            comparison["p_holm"] = p
    for comparison in itertools.chain.from_iterable(alike.values()):
        comparison["tests"] = len(different)


def table(name: str, comparisons: Sequence[Comparison], confidence: float) -> Table:
    """Every comparison of one test set."""
    header = ["A", "B", "A minus B", f"{percent(confidence)} interval", "only A right", "only B right"]
    rows = []
    for versus in comparisons:
        low, high = versus["interval"]
        row = [
            versus["first"],
            versus["second"],
            f"{versus['difference']:+.4f}",
            f"{low:+.4f} to {high:+.4f}",
        ]
        alone = [str(versus["first_alone"]), str(versus["second_alone"])]
        rows.append([*row, *alone, f"{versus['p']:.3g}", f"{versus['p_holm']:.3g}"])
    note = f"{len(rows)} comparisons of the same pairs. Intervals and p take each by itself; "
    note += "p (Holm) is adjusted for their number."
    title = f"{whole_or_part(comparisons)} on {name}"
    return Table(title, [*header, "p", "p (Holm)"], rows, note, detail=True)


def whole_or_part(comparisons: Sequence[Comparison] | Sequence[ScoreComparison]) -> str:
    """What the comparisons are of, as a title begins."""
    models = {name for one in comparisons for name in (one["first"], one["second"])}
    every = len(comparisons) == len(models) * (len(models) - 1) // 2
    return "Pairwise comparisons" if every else "Each model and the baseline"


def against(name: str, parts: Mapping[str, AccuracyPart], baseline: str, confidence: float) -> Table:
    """Each model minus the baseline, part by part (sections, subsets)."""
    models = [model for model in next(iter(parts.values()))["models"] if model != baseline]
    rows = []
    for part, measured in parts.items():
        # The baseline may be either of the two that a comparison is of.
        versus = {c["first"]: (c, 1) for c in measured["comparisons"] if c["second"] == baseline}
        versus |= {c["second"]: (c, -1) for c in measured["comparisons"] if c["first"] == baseline}
        rows.append([part, str(measured["pairs"]), *(_signed(*versus[model]) for model in models)])
    tests = next(iter(parts.values()))["comparisons"][0]["tests"]
    note = (
        f"{percent(confidence)} intervals, each by itself; p: Holm's, adjusted for all {tests} comparisons "
    )
    note += "of two models on one of these parts. Of few prompts intervals are too narrow: read p."
    return Table(f"Differences to {baseline} on {name}", ["part", "pairs", *models], rows, note, detail=True)


def _signed(comparison: Comparison, sign: int) -> str:
    low, high = sorted(sign * end + 0.0 for end in comparison["interval"])  # + 0.0: no minus zero
    value = with_interval(sign * comparison["difference"] + 0.0, (low, high), "+.3f")
    return f"{value}, p {comparison['p_holm']:.2g}"
