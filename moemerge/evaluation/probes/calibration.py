"""Calibration: is sigmoid(score difference) the chance that the answer is the better one?

The label of a pair is always "chosen first", so each pair counts in both orders: with p = sigmoid(d) and
label 1, and with 1 - p and label 0. That is the same as asking how often the answer with the higher score is
the chosen one, given the confidence max(p, 1 - p) in [1/2, 1]; a tie has confidence 1/2 and is half right.

P pairs, B bins, K prompts, M models, R resamples, X = 1 + B measured values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats
from scipy.special import expit

from moemerge.evaluation.probes.base import NO_SUBSET, PairScores, Probe
from moemerge.evaluation.results import (
    BrierVersus,
    Calibration,
    CalibrationNumbers,
    CalibrationPart,
    CalibrationSet,
    Diagram,
    ModelCalibration,
    Slope,
)
from moemerge.options.evaluate import EvaluateSettings
from moemerge.reports import plotting
from moemerge.reports.figures import Line, Panel
from moemerge.reports.statistics import (
    Floats,
    Integers,
    bootstrap_means,
    cluster_sums,
    likeliest_slope,
    percentile_interval,
    sampling_units,
    wilson_band,
)
from moemerge.reports.table import Interval, Table, percent, with_interval

BINS = 10
MIN_PAIRS = 100  # of a subset; with fewer, ten bins hold little but noise


@dataclass(frozen=True)
class Binned:
    """Pairs by confidence, in bins of equal width on [1/2, 1], the last one closed.

    confidence, right: [P], right is 1, 0 or, for a tie, 1/2. bins: [P], each pair's bin.
    """

    confidence: Floats
    right: Floats
    bins: Integers

    @classmethod
    def of(cls, differences_P: Floats) -> Binned:
        """Bins of pairs with these differences, score(chosen) - score(rejected)."""
        confidence_P = expit(np.abs(differences_P))
        place_P = np.minimum(((confidence_P - 0.5) * 2 * BINS).astype(np.int64), BINS - 1)
        return cls(confidence_P, (np.sign(differences_P) + 1) / 2, place_P)

    def gaps(self) -> Floats:
        """[P, B], right - confidence in the pair's own bin, else 0; the ECE is sum |mean over pairs|."""
        gaps_PB = np.zeros((len(self.bins), BINS))
        gaps_PB[np.arange(len(self.bins)), self.bins] = self.right - self.confidence
        return gaps_PB

    def diagram(self, units_P: Integers, confidence: float) -> Diagram:
        """Per bin that has pairs: their number, mean confidence, share right, its Wilson interval.

        Of the pairs of one unit (prompt) in one bin, the interval counts one.
        """
        counts_B = np.bincount(self.bins, minlength=BINS)
        sums = [np.bincount(self.bins, v_P, minlength=BINS) for v_P in (self.confidence, self.right)]
        filled = counts_B > 0
        sure, right = (sum_B[filled] / counts_B[filled] for sum_B in sums)
        # A unit counts once per bin: its pairs are no independent trials.
        bin_of_unit = np.unique(np.column_stack([self.bins, units_P]), axis=0)[:, 0]
        trials = np.bincount(bin_of_unit, minlength=BINS)[filled]
        low, high = wilson_band(right, trials, confidence)
        return {
            "pairs": counts_B[filled].tolist(),
            "confidence": sure.tolist(),
            "right": right.tolist(),
            "low": low.tolist(),
            "high": high.tolist(),
        }


def ece_interval(gaps_RB: Floats, gaps_B: Floats, confidence: float) -> tuple[Interval, float]:
    """Interval of the ECE sum |gaps_B|, and what it would be on average if the model were calibrated.

    The ECE cannot be negative, so noise makes it too large, and resampling adds noise again: the percentile
    interval of a calibrated model never reaches zero. The lower end is therefore 0 unless the ECE is beyond
    what resamples moved to calibration (gaps_RB - gaps_B) give, else the basic bootstrap's; the upper end is
    the percentile's, which errs to the safe side.
    """
    tail = (1 - confidence) / 2
    ece, chance_R = float(np.abs(gaps_B).sum()), np.abs(gaps_RB - gaps_B).sum(axis=1)
    high = float(np.quantile(np.abs(gaps_RB).sum(axis=1), 1 - tail))
    low = 0.0 if ece <= np.quantile(chance_R, 1 - tail) else max(0.0, 2 * ece - high)
    return (low, max(high, ece)), float(chance_R.mean())


def slope(differences_P: Floats, units_P: Integers, confidence: float) -> Slope | None:
    """The b for which sigmoid(b d) has the highest likelihood (Cox 1958), with an interval; 1 if calibrated.

    Below 1 the differences are too large: the model is too sure. The interval is normal, with the sandwich
    variance over prompts. None if no finite b is best: all pairs right, all wrong, or all tied.
    """
    value = likeliest_slope(differences_P)
    if not math.isfinite(value):
        return None
    scale = float(np.abs(differences_P).max())
    scaled_P, best = differences_P / scale, value * scale
    curvature = float((scaled_P**2 * expit(best * scaled_P) * expit(-best * scaled_P)).sum())
    score_K = cluster_sums((scaled_P * expit(-best * scaled_P))[:, None], units_P)[:, 0]
    error = math.sqrt(float((score_K**2).sum())) / curvature
    z = float(stats.norm.ppf((1 + confidence) / 2))
    return {"value": value, "interval": ((best - z * error) / scale, (best + z * error) / scale)}


def measure(sets: Mapping[str, PairScores], settings: EvaluateSettings, seed: int) -> Calibration:
    """Brier score (1 - p)^2, ECE over 10 bins, slope and reliability diagram, per test set and model.

    If there are several, also of each of the `subsets` with 100 pairs or more, but for slope and diagram; the
    others are named in `small_subsets`. Brier: bootstrap interval over prompts, and paired difference to the
    baseline. A model that says nothing (all ties) has Brier 0.25 and ECE 0.
    """
    measured = {name: _measure_set(pairs, settings, seed) for name, pairs in sets.items()}
    return {"confidence": settings.confidence, "bins": BINS, "sets": measured}


def _measure_set(pairs: PairScores, settings: EvaluateSettings, seed: int) -> CalibrationSet:
    whole, units = _measure_part(pairs, settings, seed), sampling_units(pairs.prompts)
    names, counts = np.unique(pairs.subsets, return_counts=True)
    several = len(names) > 1
    large = names[counts >= MIN_PAIRS].tolist() if several else []
    small = names[counts < MIN_PAIRS].tolist() if several else []
    return {
        "pairs": whole["pairs"],
        "prompts": whole["prompts"],
        "baseline": whole["baseline"],
        "models": {
            model: _with_diagram(numbers, _differences(pairs.scores[model]), units, settings.confidence)
            for model, numbers in whole["models"].items()
        },
        "subsets": {
            subset or NO_SUBSET: _measure_part(pairs.part(pairs.subsets == subset), settings, seed)
            for subset in large
        },
        "small_subsets": [subset or NO_SUBSET for subset in small],
    }


def _with_diagram(
    numbers: CalibrationNumbers, differences_P: Floats, units_P: Integers, confidence: float
) -> ModelCalibration:
    return {
        **numbers,
        "slope": slope(differences_P, units_P, confidence),
        "diagram": Binned.of(differences_P).diagram(units_P, confidence),
    }


def _differences(scores_P2: Floats) -> Floats:
    differences_P: Floats = scores_P2[:, 0] - scores_P2[:, 1]
    return differences_P


def _measure_part(pairs: PairScores, settings: EvaluateSettings, seed: int) -> CalibrationPart:
    models, units = list(pairs.scores), sampling_units(pairs.prompts)
    values_PMX = np.stack([_columns(_differences(scores)) for scores in pairs.scores.values()], axis=1)
    sums = cluster_sums(values_PMX.reshape(len(units), -1), units)
    draws_RMX = bootstrap_means(sums, settings.resamples, seed).reshape(-1, *values_PMX.shape[1:])
    means_MX = values_PMX.mean(axis=0)
    baseline = models.index(settings.baseline or models[0])
    measured: dict[str, CalibrationNumbers] = {}
    for number, model in enumerate(models):
        measured[model] = _summary(means_MX[number], draws_RMX[:, number], settings.confidence)
        if number != baseline:
            gain_R = draws_RMX[:, number, 0] - draws_RMX[:, baseline, 0]
            difference = float(means_MX[number, 0] - means_MX[baseline, 0])
            interval = _interval(gain_R, settings.confidence)
            measured[model]["vs_baseline"] = {"difference": difference, "interval": interval}
    prompts = len(np.unique(pairs.prompts))
    return {"pairs": len(units), "prompts": prompts, "baseline": models[baseline], "models": measured}


def _columns(differences_P: Floats) -> Floats:
    """Brier score of each pair, then its gap in each bin; X = 1 + B columns."""
    return np.column_stack([expit(-differences_P) ** 2, Binned.of(differences_P).gaps()])


def _summary(means_X: Floats, draws_RX: Floats, confidence: float) -> CalibrationNumbers:
    interval, chance = ece_interval(draws_RX[:, 1:], means_X[1:], confidence)
    return {
        "brier": float(means_X[0]),
        "brier_interval": _interval(draws_RX[:, 0], confidence),
        "ece": float(np.abs(means_X[1:]).sum()),
        "ece_interval": interval,
        "ece_by_chance": chance,
    }


def _interval(draws_R: Floats, confidence: float) -> Interval:
    low, high = percentile_interval(draws_R[:, None], confidence)
    return float(low[0]), float(high[0])


def tables(result: Calibration) -> list[Table]:
    """One table per test set, and one of its subsets."""
    shown = []
    for name, measured in result["sets"].items():
        shown.append(_table(name, measured, result))
        shown += [_subset_table(name, measured, result["confidence"])] if measured["subsets"] else []
    return shown


def _table(name: str, measured: CalibrationSet, result: Calibration) -> Table:
    rows, compared = [], len(measured["models"]) > 1
    for model, numbers in measured["models"].items():
        brier, ece = _brier_and_ece(numbers, ".4f")
        best, chance = numbers["slope"], f"{numbers['ece_by_chance']:.4f}"
        slope_cell = with_interval(best["value"], best["interval"], ".3g") if best else "none"
        change = [_versus(numbers.get("vs_baseline"))] * compared
        rows.append([model, brier, *change, ece, chance, slope_cell])
    header = ["model", "Brier", *["minus baseline"] * compared, "ECE", "ECE by chance", "slope"]
    note = f"Of sigmoid(score difference) on {measured['pairs']} pairs, {measured['prompts']} prompts, "
    note += (
        f"each pair in both orders; {percent(result['confidence'])} intervals over prompts. Brier: 0.25 says "
    )
    note += "nothing. "
    note += f"ECE: {result['bins']} bins of confidence; by chance: its mean if the model were calibrated. "
    note += (
        "Slope: 1 is calibrated, below 1 overconfident, above 1 underconfident, none: no finite one is best."
    )
    if measured["small_subsets"] and not measured["subsets"]:
        note += f" Not by subset: each has fewer than {MIN_PAIRS} pairs."
    return Table(f"Calibration on {name}", header, rows, note)


def _subset_table(name: str, measured: CalibrationSet, confidence: float) -> Table:
    rows = []
    for subset, part in measured["subsets"].items():
        for model, numbers in part["models"].items():
            brier, ece = _brier_and_ece(numbers, ".3f")
            rows.append([subset, str(part["pairs"]), model, brier, ece, f"{numbers['ece_by_chance']:.3f}"])
    note = (
        f"{percent(confidence)} intervals, each by itself. By chance: the mean ECE of a calibrated model on "
    )
    note += "so many pairs; fewer pairs give a larger one."
    if measured["small_subsets"]:
        note += f" Left out, fewer than {MIN_PAIRS} pairs: {', '.join(measured['small_subsets'])}."
    header = ["subset", "pairs", "model", "Brier", "ECE", "ECE by chance"]
    return Table(f"Calibration on {name}, by subset", header, rows, note)


def _brier_and_ece(numbers: CalibrationNumbers, form: str) -> tuple[str, str]:
    return (
        with_interval(numbers["brier"], numbers["brier_interval"], form),
        with_interval(numbers["ece"], numbers["ece_interval"], form),
    )


def _versus(versus: BrierVersus | None) -> str:
    return with_interval(versus["difference"], versus["interval"], "+.4f") if versus else "baseline"


def plot(result: Calibration, folder: Path) -> list[str]:
    """calibration.png: the reliability diagram of every model, one panel per test set."""
    panels = []
    for name, measured in result["sets"].items():
        curves = {
            model: Line(bins["confidence"], bins["right"], bins["low"], bins["high"])
            for model, numbers in measured["models"].items()
            for bins in [numbers["diagram"]]
        }
        curves["calibrated"] = Line([0.5, 1.0], [0.5, 1.0], reference=True)
        panels.append(Panel(name, curves, "confidence", "share right"))
    plotting.panels(panels, folder / "calibration.png", title="Reliability diagram")
    return ["calibration.png"]


PROBE = Probe("pairs", measure, tables, plot)
