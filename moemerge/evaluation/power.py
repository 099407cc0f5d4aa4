"""What a test set of its size can show: said beside a verdict, so that silence is not read as equality."""

from __future__ import annotations

import math
from collections.abc import Iterator

from scipy import stats

from moemerge.evaluation.report import Report, accuracy_sets, confidence
from moemerge.evaluation.results import AccuracyPart

WANTED = 0.02  # the difference in accuracy whose price in pairs is told
POWER = 0.8
MOST_SHARED = 0.5  # prompts per pair below which the arithmetic of single pairs promises too much


def power_sentences(report: Report, comparisons: int) -> Iterator[str]:
    """Per test set: differences in accuracy to the baseline that its pairs cannot show, and how many could.

    comparisons: how many a verdict looks at together. Nothing for a single model.
    """
    known = confidence(report)
    if known is None or not comparisons:
        return
    for name, measured in accuracy_sets(report).items():
        part = measured["all"]
        if part["prompts"] < MOST_SHARED * part["pairs"]:
            yield (
                f"{part['pairs']:,} pairs of {name} are of {part['prompts']:,} prompts, and it is prompts "
                "that count: take more of them to see smaller differences."
            )
            continue
        least, seen, wanted = limits(part["pairs"], _disagreement(part), 1 - known, comparisons)
        yield (
            f"{part['pairs']:,} pairs of {name} cannot show a difference below {least:.2g}, and show one of "
            f"{seen:.2g} in {POWER:.0%} of cases; for one of {WANTED:g} take about {wanted:,} pairs."
        )


def limits(pairs: int, disagreement: float, level: float, comparisons: int) -> tuple[float, float, int]:
    """The least difference that can be clear, the one that is in POWER of cases, the pairs that WANTED takes.

    McNemar's exact p of k pairs that all speak for one model is 2^(1 - k); the first of Holm's steps asks for
    level / comparisons. For power: the normal approximation to McNemar's test, with a share `disagreement` of
    pairs that only one model has right (Connor 1987, doi 10.2307/2531961).
    """
    strict = level / comparisons
    least = math.ceil(1 - math.log2(strict)) / pairs
    z = float(stats.norm.isf(strict / 2) + stats.norm.ppf(POWER))
    wanted = z**2 * max(disagreement, WANTED) / WANTED**2
    rounded = 10 ** max(0, math.floor(math.log10(wanted)) - 1)
    seen = max(least, z * math.sqrt(max(disagreement, 1 / pairs) / pairs))
    return min(1.0, least), min(1.0, seen), math.ceil(wanted / rounded) * rounded


def _disagreement(part: AccuracyPart) -> float:
    """The largest share of pairs that only one of a model and the baseline has right."""
    versus = [numbers["vs_baseline"] for numbers in part["models"].values() if "vs_baseline" in numbers]
    shares = [(one["right_alone"] + one["baseline_right_alone"]) / part["pairs"] for one in versus]
    return max(shares, default=0.0)
