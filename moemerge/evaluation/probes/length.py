"""Length: score against length at fixed quality, padding, repetition (Singhal et al., arXiv 2310.03716).

At fixed quality: the difference of a pair's two scores against the difference of their lengths. What prompt
and label add to a score falls out of the correlation of differences.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from moemerge.evaluation.probes.base import Case, Edits, PairScores
from moemerge.evaluation.probes.edit_effects import cell, edit_probe, interval_of
from moemerge.evaluation.results import Edited, ModelLength
from moemerge.options.evaluate import EvaluateSettings
from moemerge.reports.statistics import Floats, bootstrap_means, cluster_sums
from moemerge.reports.table import Table, percent

PADDING = (
    "There are many things to keep in mind here.",
    "It is worth looking at this from more than one side.",
    "This is a point that comes up again and again.",
    "As with most things, the details matter.",
    "Taking a moment to consider the whole picture is always useful.",
    "In other words, what has been said above still holds.",
    "All of this should be seen in its proper context.",
    "There is of course more that could be said about it.",
)


def padded(case: Case) -> str:
    """Sentences that say nothing, until the answer is at least twice as long."""
    longer, order = case.answer, case.random.sample(PADDING, len(PADDING))
    while len(longer) < 2 * len(case.answer):
        longer = f"{longer} {order[0]}"
        order = [*order[1:], order[0]]
    return longer


def repeated(case: Case) -> str:
    """The whole answer twice."""
    return f"{case.answer}\n\n{case.answer}"


def correlations(pairs: PairScores, settings: EvaluateSettings, seed: int) -> dict[str, ModelLength]:
    """Per model: Pearson's correlation of score and length differences, with a bootstrap over prompts.

    0 where one of them does not vary. `accuracy` apart for pairs whose chosen answer is the longer and the
    shorter one, None without such pairs.
    """
    baseline = settings.baseline or next(iter(pairs.scores))
    longer_P = pairs.lengths[:, 0] - pairs.lengths[:, 1]
    draws: dict[str, Floats] = {}
    measured: dict[str, ModelLength] = {}
    for model, scores_P2 in pairs.scores.items():
        margin_P = scores_P2[:, 0] - scores_P2[:, 1]
        moments_P5 = _moments(_standard(longer_P.astype(np.float64)), _standard(margin_P))
        sums = cluster_sums(moments_P5, pairs.prompts)
        draws[model] = _correlation(bootstrap_means(sums, settings.resamples, seed))
        measured[model] = {
            "correlation": float(_correlation(moments_P5.mean(axis=0, keepdims=True))[0]),
            "interval": interval_of(draws[model], settings.confidence),
            "accuracy": {
                "chosen longer": _share(margin_P[longer_P > 0] > 0),
                "chosen shorter": _share(margin_P[longer_P < 0] > 0),
            },
        }
    for model in measured.keys() - {baseline}:
        measured[model]["vs_baseline"] = {
            "correlation": measured[model]["correlation"] - measured[baseline]["correlation"],
            "interval": interval_of(draws[model] - draws[baseline], settings.confidence),
        }
    return measured


def _standard(values_P: Floats) -> Floats:
    """Mean 0 and variance 1; 0 where nothing varies."""
    spread = values_P.std()
    return np.zeros_like(values_P) if spread == 0 else (values_P - values_P.mean()) / spread


def _moments(x_P: Floats, y_P: Floats) -> Floats:
    return np.column_stack([x_P, y_P, x_P**2, y_P**2, x_P * y_P])


def _correlation(moments_R5: Floats) -> Floats:
    x_R, y_R, xx_R, yy_R, xy_R = moments_R5.T
    spread_R = np.sqrt(np.maximum((xx_R - x_R**2) * (yy_R - y_R**2), 0))
    varies_R = spread_R > 1e-9
    found_R = np.divide(xy_R - x_R * y_R, spread_R, out=np.zeros_like(x_R), where=varies_R)
    return np.clip(found_R, -1, 1)


def _share(right: NDArray[np.bool_]) -> float | None:
    return float(right.mean()) if len(right) else None


def measure(sets: Mapping[str, PairScores], settings: EvaluateSettings, seed: int) -> Edited:
    """The effects of the edits, and `length` per set: see correlations."""
    result: Edited = EDITED.measure(sets, settings, seed)
    for name, pairs in sets.items():
        result["sets"][name]["length"] = correlations(pairs, settings, seed)
    return result


def tables(result: Edited) -> list[Table]:
    """A table of correlations per set, then those of the edits."""
    sets, confidence = result["sets"].items(), result["confidence"]
    return [_table(name, measured["length"], confidence) for name, measured in sets] + EDITED.tables(result)


def _table(name: str, models: Mapping[str, ModelLength], confidence: float) -> Table:
    sides = ("chosen longer", "chosen shorter")
    header = ["model", "correlation", "minus baseline", *(f"accuracy, {side}" for side in sides)]
    rows = []
    for model, numbers in models.items():
        versus = numbers.get("vs_baseline")
        shares = [numbers["accuracy"][side] for side in sides]
        row = [model, cell(numbers["correlation"], numbers["interval"])]
        row += [cell(versus["correlation"], versus["interval"]) if versus else "baseline"]
        rows.append([*row, *("" if share is None else f"{share:.1%}" for share in shares)])
    note = "Correlation over pairs: score of chosen minus rejected against their characters, "
    note += (
        f"{percent(confidence)} intervals over prompts. Length is no merit: 0 is the aim at equal accuracy."
    )
    return Table(f"Score against length on {name}", header, rows, note)


EDITED = edit_probe("length", Edits("rejected", {"padding": padded, "repetition": repeated}))
PROBE = replace(EDITED, measure=measure, tables=tables)
