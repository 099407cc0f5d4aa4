"""Accuracy on preference pairs, with intervals and paired comparison to a baseline.

A pair counts as right if the chosen answer scores strictly higher; ties are errors, and counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import log_expit

from moemerge import plotting
from moemerge.probes.base import Floats, Interval, PairScores, Probe, Table
from moemerge.probes.statistics import bootstrap_means, cluster_sums, mcnemar, percentile_interval, wilson
from moemerge.recipe import EvaluateSettings


def measure(sets: Mapping[str, PairScores], settings: EvaluateSettings, seed: int) -> dict[str, Any]:
    """Accuracy of every model per test set: `all` pairs, and `subsets` where there are several.

    Intervals are Wilson's, or from a bootstrap over prompts where prompts repeat (`interval_kind`). Against
    the baseline: difference with a paired bootstrap interval, and McNemar's exact p (pairs as independent).
    """
    found = {name: _measure_set(scores, settings, seed) for name, scores in sets.items()}
    return {"confidence": settings.confidence, "sets": found}


def _measure_set(pairs: PairScores, settings: EvaluateSettings, seed: int) -> dict[str, Any]:
    names = sorted(set(pairs.subsets.tolist()))
    parts = {name: pairs.part(pairs.subsets == name) for name in names} if len(names) > 1 else {}
    return {
        "all": _measure_part(pairs, settings, seed),
        "subsets": {name or "(none)": _measure_part(part, settings, seed) for name, part in parts.items()},
    }


def _measure_part(pairs: PairScores, settings: EvaluateSettings, seed: int) -> dict[str, Any]:
    models = list(pairs.scores)
    right_PM = np.column_stack([scores[:, 0] > scores[:, 1] for scores in pairs.scores.values()])
    sums = cluster_sums(right_PM.astype(np.float64), pairs.prompts)
    draws_RM = bootstrap_means(sums, settings.resamples, seed)
    repeated = len(sums) < len(right_PM)
    baseline = models.index(settings.baseline or models[0])
    measured = {}
    for number, model in enumerate(models):
        interval = _interval(right_PM[:, number], draws_RM[:, number], repeated, settings.confidence)
        measured[model] = {**_plain_numbers(pairs.scores[model]), "interval": interval}
        if number != baseline:
            difference = _difference(right_PM, draws_RM, number, baseline, settings.confidence)
            measured[model]["vs_baseline"] = difference
    return {
        "pairs": len(right_PM),
        "prompts": len(sums),
        "interval_kind": "bootstrap over prompts" if repeated else "wilson",
        "baseline": models[baseline],
        "models": measured,
        "always_longer": float((pairs.lengths[:, 0] > pairs.lengths[:, 1]).mean()),
        "always_shorter": float((pairs.lengths[:, 0] < pairs.lengths[:, 1]).mean()),
    }


def _plain_numbers(scores_P2: Floats) -> dict[str, Any]:
    margin_P = scores_P2[:, 0] - scores_P2[:, 1]
    return {
        "accuracy": float((margin_P > 0).mean()),
        "ties": int((margin_P == 0).sum()),
        "loss": float(-log_expit(margin_P).mean()),
    }


def _interval(right_P: Any, draws_R: Floats, repeated: bool, confidence: float) -> Interval:
    if not repeated:
        return wilson(int(right_P.sum()), len(right_P), confidence)
    low, high = percentile_interval(draws_R[:, None], confidence)
    return float(low[0]), float(high[0])


def _difference(
    right_PM: Any, draws_RM: Floats, model: int, baseline: int, confidence: float
) -> dict[str, Any]:
    ours_P, theirs_P = right_PM[:, model], right_PM[:, baseline]
    ours, theirs = int((ours_P & ~theirs_P).sum()), int((theirs_P & ~ours_P).sum())
    low, high = percentile_interval(draws_RM[:, [model]] - draws_RM[:, [baseline]], confidence)
    return {
        "difference": (ours - theirs) / len(right_PM),
        "interval": (float(low[0]), float(high[0])),
        "right_alone": ours,
        "baseline_right_alone": theirs,
        "p": mcnemar(ours, theirs),
    }


def tables(result: dict[str, Any]) -> list[Table]:
    """One table per test set with every model, and one per set with subsets."""
    found = []
    for name, measured in result["sets"].items():
        found.append(_set_table(name, measured["all"], result["confidence"]))
        if measured["subsets"]:
            found.append(_subset_table(name, measured["subsets"]))
    return found


def _set_table(name: str, part: dict[str, Any], confidence: float) -> Table:
    header = ["model", "accuracy", f"{confidence:.0%} interval", "ties", "loss", "minus baseline", "p"]
    rows = []
    for model, numbers in part["models"].items():
        low, high = numbers["interval"]
        row = [model, f"{numbers['accuracy']:.4f}", f"{low:.4f} to {high:.4f}"]
        row += [str(numbers["ties"]), f"{numbers['loss']:.4f}", *_versus(numbers.get("vs_baseline"))]
        rows.append(row)
    for rule in ("always_longer", "always_shorter"):
        rows.append([rule.replace("_", " "), f"{part[rule]:.4f}", "", "", "", "", ""])
    note = f"{part['pairs']} pairs, {part['prompts']} prompts; intervals: {part['interval_kind']}. "
    note += f"Baseline: {part['baseline']}; p: exact McNemar test over pairs."
    return Table(f"Accuracy on {name}", header, rows, note)


def _versus(difference: dict[str, Any] | None) -> list[str]:
    if difference is None:
        return ["baseline", ""]
    low, high = difference["interval"]
    return [f"{difference['difference']:+.4f} ({low:+.4f} to {high:+.4f})", f"{difference['p']:.3g}"]


def _subset_table(name: str, subsets: dict[str, Any]) -> Table:
    models = list(next(iter(subsets.values()))["models"])
    rows = []
    for subset, part in subsets.items():
        rows.append([subset, str(part["pairs"]), *(_with_interval(part["models"][m]) for m in models)])
    return Table(f"Accuracy on {name}, by subset", ["subset", "pairs", *models], rows)


def _with_interval(numbers: dict[str, Any]) -> str:
    low, high = numbers["interval"]
    return f"{numbers['accuracy']:.3f} ({low:.3f} to {high:.3f})"


def plot(result: dict[str, Any], folder: Path) -> list[str]:
    """accuracy.png: accuracy and interval of every model, one panel per test set."""
    rows = {
        name: {model: (n["accuracy"], *n["interval"]) for model, n in measured["all"]["models"].items()}
        for name, measured in result["sets"].items()
    }
    baseline = next(iter(result["sets"].values()))["all"]["baseline"]
    plotting.dots(rows, folder / "accuracy.png", "accuracy", baseline)
    return ["accuracy.png"]


PROBE = Probe("pairs", measure, tables, plot)
