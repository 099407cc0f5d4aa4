"""Accuracy on preference pairs, with intervals, against the baseline and of every model against every other.

A pair counts as right if the chosen answer scores strictly higher; ties are errors, and counted.

M models, P pairs, R resamples.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from moemerge.errors import OptionError, suggest
from moemerge.evaluation.probes import comparisons
from moemerge.evaluation.probes.base import NO_SUBSET, PairScores, Probe
from moemerge.evaluation.results import (
    Accuracy,
    AccuracyPart,
    AccuracySet,
    AccuracyVersus,
    ModelAccuracy,
    Paired,
)
from moemerge.options.evaluate import EvaluateSettings
from moemerge.reports import plotting
from moemerge.reports.statistics import Floats, bootstrap_means, cluster_sums, sampling_units, share_interval
from moemerge.reports.table import Interval, Table, percent, with_interval


def check_sections(settings: EvaluateSettings, subsets: Iterable[str]) -> None:
    """Raise OptionError if a section of `settings` names a subset that is none of `subsets`."""
    known = {subset or NO_SUBSET for subset in subsets}
    for section, names in settings.sections.items():
        for name in names:
            if name not in known:
                raise OptionError(
                    f"section {section} names a subset that no test set has",
                    given=name,
                    expected="subsets of the test sets",
                    fix=suggest(name, known),
                )


def measure(sets: Mapping[str, PairScores], settings: EvaluateSettings, seed: int) -> Accuracy:
    """Accuracy of every model per test set: `all` pairs, the `sections` asked for, `subsets` if several.

    Intervals are Wilson's, or from a bootstrap over prompts where prompts repeat (`interval_kind`); of a part
    with one prompt, Wilson's over its pairs.
    `comparisons`: every two models on the same pairs (of more than 20 each and the baseline), with Holm's p
    over all of a set; over all its sections; over all its subsets. A section's accuracy is the mean over its
    pairs.
    """
    measured = {name: _measure_set(scores, settings, seed) for name, scores in sets.items()}
    return {"confidence": settings.confidence, "sets": measured}


def _measure_set(pairs: PairScores, settings: EvaluateSettings, seed: int) -> AccuracySet:
    names = sorted(set(pairs.subsets.tolist()))
    groups = {name or NO_SUBSET: [name] for name in names} if len(names) > 1 else {}
    return {
        "all": _measure_parts(pairs, {"all": names}, settings, seed)["all"],
        "sections": _measure_parts(pairs, settings.sections, settings, seed),
        "subsets": _measure_parts(pairs, groups, settings, seed),
    }


def _measure_parts(
    pairs: PairScores, groups: Mapping[str, list[str]], settings: EvaluateSettings, seed: int
) -> dict[str, AccuracyPart]:
    """Each group of subsets that has pairs here; their comparisons make one family."""
    named = np.where(pairs.subsets == "", NO_SUBSET, pairs.subsets)
    rows = {name: np.isin(named, [subset or NO_SUBSET for subset in group]) for name, group in groups.items()}
    parts = {
        name: _measure_part(pairs.part(some), settings, seed) for name, some in rows.items() if some.any()
    }
    comparisons.adjust((part["comparisons"] for part in parts.values()), _first_alike(pairs.scores))
    return parts


def _first_alike(scores: Mapping[str, Floats]) -> dict[str, str]:
    """Each model, and the first one whose scores are the same to the last bit."""
    first: dict[bytes, str] = {}
    return {model: first.setdefault(own.tobytes(), model) for model, own in scores.items()}


def _measure_part(pairs: PairScores, settings: EvaluateSettings, seed: int) -> AccuracyPart:
    models = list(pairs.scores)
    right_PM = np.column_stack([scores[:, 0] > scores[:, 1] for scores in pairs.scores.values()])
    units = sampling_units(pairs.prompts)
    sums = cluster_sums(right_PM.astype(np.float64), units)
    draws_RM = bootstrap_means(sums, settings.resamples, seed)
    baseline = models.index(settings.baseline or models[0])
    measured: dict[str, ModelAccuracy] = {}
    for number, model in enumerate(models):
        right_P = right_PM[:, number].astype(np.float64)
        interval = share_interval(right_P, draws_RM[:, number], len(sums), settings.confidence)
        measured[model] = _plain_numbers(pairs.scores[model], interval)
        if number != baseline:
            both = [number, baseline]
            versus = comparisons.difference(right_PM[:, both], draws_RM[:, both], units, settings.confidence)
            measured[model]["vs_baseline"] = _against_baseline(versus)
    return {
        "pairs": len(right_PM),
        "prompts": len(np.unique(pairs.prompts)),
        "interval_kind": "bootstrap over prompts" if len(sums) < len(right_PM) else "wilson",
        "baseline": models[baseline],
        "models": measured,
        "comparisons": comparisons.all_pairs(
            models, baseline, right_PM, draws_RM, units, settings.confidence
        ),
        "always_longer": float((pairs.lengths[:, 0] > pairs.lengths[:, 1]).mean()),
        "always_shorter": float((pairs.lengths[:, 0] < pairs.lengths[:, 1]).mean()),
    }


def _against_baseline(versus: Paired) -> AccuracyVersus:
    return {
        "difference": versus["difference"],
        "interval": versus["interval"],
        "right_alone": versus["first_alone"],
        "baseline_right_alone": versus["second_alone"],
        "p": versus["p"],
    }


def _plain_numbers(scores_P2: Floats, interval: Interval) -> ModelAccuracy:
    import torch  # not where tables and plots of earlier results are made

    from moemerge.models.scoring import loss_and_accuracy

    margin_P = scores_P2[:, 0] - scores_P2[:, 1]
    loss, accuracy = loss_and_accuracy(torch.from_numpy(margin_P))
    ties = int((margin_P == 0).sum())
    return {"accuracy": accuracy, "ties": ties, "loss": loss, "interval": interval}


def tables(result: Accuracy) -> list[Table]:
    """Per test set: every model; every two of three or more; sections and subsets, and their differences."""
    shown, confidence = [], result["confidence"]
    for name, measured in result["sets"].items():
        shown.append(_set_table(name, measured["all"], confidence))
        if len(measured["all"]["models"]) > 2:
            shown.append(comparisons.table(name, measured["all"]["comparisons"], confidence))
        for kind, parts in (("section", measured["sections"]), ("subset", measured["subsets"])):
            shown += _part_tables(f"{name}, by {kind}", kind, parts, confidence)
    return shown


def _set_table(name: str, part: AccuracyPart, confidence: float) -> Table:
    compared = len(part["models"]) > 1
    header = ["model", "accuracy", f"{percent(confidence)} interval", "ties", "loss"]
    header += ["minus baseline", "p"] if compared else []
    rows = []
    for model, numbers in part["models"].items():
        low, high = numbers["interval"]
        row = [model, f"{numbers['accuracy']:.4f}", f"{low:.4f} to {high:.4f}"]
        row += [str(numbers["ties"]), f"{numbers['loss']:.4f}"]
        rows.append(row + (_versus(numbers.get("vs_baseline")) if compared else []))
    for rule, share in (("always longer", part["always_longer"]), ("always shorter", part["always_shorter"])):
        rows.append([rule, f"{share:.4f}", *[""] * (len(header) - 2)])
    wilson = part["interval_kind"] == "wilson"
    kind, units = ("Wilson's", "pairs") if wilson else (part["interval_kind"], "prompts")
    note = f"{part['pairs']} pairs, {part['prompts']} prompts; intervals: {kind}. A tie is an error."
    if compared:
        note += f" Baseline: {part['baseline']}; p: exact McNemar test over {units}."
    return Table(f"Accuracy on {name}", header, rows, note)


def _versus(versus: AccuracyVersus | None) -> list[str]:
    if versus is None:
        return ["baseline", ""]
    return [with_interval(versus["difference"], versus["interval"], "+.4f"), f"{versus['p']:.3g}"]


def _part_tables(title: str, kind: str, parts: dict[str, AccuracyPart], confidence: float) -> list[Table]:
    if not parts:
        return []
    models = list(next(iter(parts.values()))["models"])
    rows = []
    for name, part in parts.items():
        cells = [_with_ties(part["models"][m]) for m in models]
        rules = [f"{share:.3f}" for share in (part["always_longer"], part["always_shorter"])]
        rows.append([name, str(part["pairs"]), str(part["prompts"]), *cells, *rules])
    note = f"{percent(confidence)} intervals, each by itself; where prompts repeat, from a bootstrap over "
    note += "prompts (too narrow if they are few), or over pairs if all have one prompt. A tie is an error."
    header = [kind, "pairs", "prompts", *models, "always longer", "always shorter"]
    shares = Table(f"Accuracy on {title}", header, rows, note, detail=True)
    baseline = next(iter(parts.values()))["baseline"]
    return [shares] + ([comparisons.against(title, parts, baseline, confidence)] if len(models) > 1 else [])


def _with_ties(numbers: ModelAccuracy) -> str:
    low, high = numbers["interval"]
    ties = f", {numbers['ties']} tied" if numbers["ties"] else ""
    return f"{numbers['accuracy']:.3f} ({low:.3f} to {high:.3f}{ties})"


def plot(result: Accuracy, folder: Path) -> list[str]:
    """accuracy.png: accuracy and interval of every model, one panel per test set."""
    rows = {
        name: {model: (n["accuracy"], *n["interval"]) for model, n in measured["all"]["models"].items()}
        for name, measured in result["sets"].items()
    }
    baseline = next(iter(result["sets"].values()))["all"]["baseline"]
    plotting.dots(rows, folder / "accuracy.png", "accuracy", baseline)
    return ["accuracy.png"]


PROBE = Probe("pairs", measure, tables, plot)
