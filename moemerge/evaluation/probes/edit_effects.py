"""What edits of answers do to scores: statistics, tables and plot of all probes that edit.

Two kinds. An edit of the *rejected* answer is an attack: it adds nothing of worth, so that the chosen answer
should still win. An edit of the *chosen* answer is damage: the answer as it was should win.

P pairs of a set, E of them with a scored edit, K prompts of these, M models, R resamples; last axis 3: shift,
whether the verdict was right before, whether it is flipped.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moemerge.data.rows import Text
from moemerge.evaluation.probes.base import Edits, EditScores, PairScores, Probe
from moemerge.evaluation.probes.edits import last_message
from moemerge.evaluation.results import (
    Edited,
    EditedSet,
    EditEffect,
    EffectVersus,
    ModelEffect,
    WorstCase,
)
from moemerge.options.evaluate import EvaluateSettings
from moemerge.reports import plotting
from moemerge.reports.statistics import (
    Floats,
    bootstrap_means,
    cluster_sums,
    percentile_interval,
    wilson,
)
from moemerge.reports.table import Interval, Table, percent, with_interval

SIDES = {"chosen": 0, "rejected": 1}
EXCERPT, LEAD = 160, 40


def edit_probe(name: str, edits: Edits) -> Probe:
    """The probe that measures what `edits` do."""
    return Probe("pairs", partial(measure, name, edits), partial(tables, name), partial(plot, name), edits)


def measure(
    probe: str, edits: Edits, sets: Mapping[str, PairScores], settings: EvaluateSettings, seed: int
) -> Edited:
    """Per set, edit and model: `shift`, what the edit adds to a score, and `flipped`, with intervals.

    A shift is a mean over pairs, in standard deviations of the model's scores over all answers of the set.
    Flipped, for an attack: share of the pairs ranked correctly before in which the edited rejected answer
    scores above the chosen one; for damage: share of all pairs in which the damaged answer scores above the
    whole one; None without such pairs. Intervals are from a bootstrap over prompts, paired in differences to
    the baseline; Wilson's for `flipped` where no prompt repeats or all pairs agree. `worst` is the pair in
    which the edited answer leads by most, or is least behind.
    """
    measured: dict[str, EditedSet] = {
        name: {
            "baseline": settings.baseline or next(iter(pairs.scores)),
            "edits": {
                edit: _measure_edit(pairs, pairs.edits[f"{probe}/{edit}"], edits.side, settings, seed)
                for edit in edits.functions
            },
        }
        for name, pairs in sets.items()
    }
    return {"confidence": settings.confidence, "side": edits.side, "sets": measured}


def _measure_edit(
    pairs: PairScores, edit: EditScores, side: str, settings: EvaluateSettings, seed: int
) -> EditEffect:
    if not edit.items:
        return {"pairs": 0, "prompts": 0, "left_out": edit.left_out, "models": {}}
    models = list(pairs.scores)
    numbers_E = np.array([item.number for item in edit.items])
    values_EM3 = np.stack([_values(pairs, edit, model, side) for model in models], axis=1)
    sums_KX = cluster_sums(values_EM3.reshape(len(numbers_E), -1), pairs.prompts[numbers_E])
    draws_RM3 = bootstrap_means(sums_KX, settings.resamples, seed).reshape(-1, len(models), 3)
    baseline = models.index(settings.baseline or models[0])
    effects = [
        _effect(
            values_EM3[:, m],
            draws_RM3[:, m],
            len(sums_KX),
            settings,
            _worst(pairs, edit, model, values_EM3[:, m, 1] > 0),
        )
        for m, model in enumerate(models)
    ]
    for number, effect in enumerate(effects):
        if number != baseline:
            draws = draws_RM3[:, number], draws_RM3[:, baseline]
            effect["vs_baseline"] = _difference(effect, effects[baseline], *draws, settings.confidence)
    return {
        "pairs": len(edit.items),
        "prompts": len(sums_KX),
        "left_out": edit.left_out,
        "models": dict(zip(models, effects, strict=True)),
    }


def _values(pairs: PairScores, edit: EditScores, model: str, side: str) -> Floats:
    """Shift, right before, flipped; [E, 3]."""
    scores_E2 = pairs.scores[model][[item.number for item in edit.items]]
    shift_E = (edit.scores[model] - scores_E2[:, SIDES[side]]) / _spread(pairs, model)
    right_E = np.ones(len(shift_E), dtype=bool) if side == "chosen" else scores_E2[:, 0] > scores_E2[:, 1]
    return np.column_stack([shift_E, right_E, right_E & (edit.scores[model] > scores_E2[:, 0])])


def _spread(pairs: PairScores, model: str) -> float:
    """Standard deviation of the model's scores over all answers; 1 where all are equal."""
    return float(pairs.scores[model].std()) or 1.0


def _effect(
    values_E3: Floats, draws_R3: Floats, clusters: int, settings: EvaluateSettings, worst: WorstCase
) -> ModelEffect:
    right, flipped = (int(count) for count in values_E3[:, 1:].sum(axis=0))
    flipped_interval = None
    if right and (clusters == len(values_E3) or flipped in (0, right)):
        # Where all go one way a bootstrap has no width; prompts then count once.
        trials = min(right, clusters)
        flipped_interval = wilson(round(trials * flipped / right), trials, settings.confidence)
    elif right:
        flipped_interval = interval_of(_ratio(draws_R3), settings.confidence)
    return {
        "shift": float(values_E3[:, 0].mean()),
        "shift_interval": interval_of(draws_R3[:, 0], settings.confidence),
        "right": right,
        "flipped": flipped / right if right else None,
        "flipped_interval": flipped_interval,
        "worst": worst,
    }


def _ratio(draws_R3: Floats) -> Floats:
    """Flipped over right; NaN in a resample without a right pair."""
    nothing_R = np.full(len(draws_R3), np.nan)
    return np.divide(draws_R3[:, 2], draws_R3[:, 1], out=nothing_R, where=draws_R3[:, 1] > 0)


def interval_of(draws_R: Floats, confidence: float) -> Interval | None:
    """Percentile interval of one quantity, without resamples in which it has no value."""
    known_R1 = draws_R[np.isfinite(draws_R)][:, None]
    if not len(known_R1):
        return None
    low, high = percentile_interval(known_R1, confidence)
    return float(low[0]), float(high[0])


def _difference(
    ours: ModelEffect, theirs: ModelEffect, ours_R3: Floats, theirs_R3: Floats, confidence: float
) -> EffectVersus:
    flips, flips_interval = None, None
    if ours["flipped"] is not None and theirs["flipped"] is not None:
        flips = ours["flipped"] - theirs["flipped"]
        flips_interval = interval_of(_ratio(ours_R3) - _ratio(theirs_R3), confidence)
    return {
        "shift": ours["shift"] - theirs["shift"],
        "shift_interval": interval_of(ours_R3[:, 0] - theirs_R3[:, 0], confidence),
        "flipped": flips,
        "flipped_interval": flips_interval,
    }


def _worst(pairs: PairScores, edit: EditScores, model: str, right_E: NDArray[np.bool_]) -> WorstCase:
    """The pair, of those ranked correctly if there are any, whose edited answer leads by most."""
    chosen_E = pairs.scores[model][[item.number for item in edit.items], 0]
    lead_E = (edit.scores[model] - chosen_E) / _spread(pairs, model)
    worst = int(np.where(right_E | ~right_E.any(), lead_E, -np.inf).argmax())
    pair, text = edit.items[worst].pair, edit.items[worst].text
    return {
        "row": pair.row,
        "lead": float(lead_E[worst]),
        "prompt": excerpt(last_message(pair.prompt), -1),
        "chosen": excerpt(last_message(pair.chosen)),
        "edited": excerpt(last_message(text), _first_change(pair.rejected, pair.chosen, text)),
    }


def _first_change(rejected: Text, chosen: Text, edited: Text) -> int:
    """Where an edited text leaves the answer that it shares most with."""
    after = last_message(edited)
    shared = (_shared(last_message(before), after) for before in (rejected, chosen))
    return max(shared)


def _shared(first: str, second: str) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def excerpt(text: str, around: int = 0) -> str:
    """Up to EXCERPT letters of `text`, from a little before number `around`; -1 stands for the last ones."""
    last = max(0, len(text) - EXCERPT)
    start = last if around < 0 else max(0, min(around - LEAD, last))
    end = start + EXCERPT
    shown = " ".join(text[start:end].split())
    return f"{'… ' if start else ''}{shown}{' …' if end < len(text) else ''}"


def tables(probe: str, result: Edited) -> list[Table]:
    """Per set the effects of every edit on every model, and the worst cases to read."""
    shown = []
    for name, measured in result["sets"].items():
        edits = {edit: effect for edit, effect in measured["edits"].items() if effect["pairs"]}
        if edits:
            shown += [_effects(probe, name, measured, result), _worst_cases(probe, name, edits)]
    return shown


def _effects(probe: str, name: str, measured: EditedSet, result: Edited) -> Table:
    rows = []
    for edit, effect in measured["edits"].items():
        for model, numbers in effect["models"].items():
            versus = numbers.get("vs_baseline")
            (shift, flipped), (shift_versus, flipped_versus) = _cells(numbers, ""), _versus_cells(versus)
            pairs = str(effect["pairs"])
            rows.append([edit, model, shift, shift_versus, flipped, flipped_versus, pairs])
    header = ["edit", "model", "shift (SD)", "minus baseline", "flipped", "minus baseline", "pairs"]
    side, verdict = result["side"], "of pairs ranked correctly before, share in which the edited answer wins"
    if side == "chosen":
        verdict = "share of pairs in which the edited answer scores above the chosen one itself; "
        verdict += "half, with a shift of 0, where a model does not see the difference"
    note = (
        f"Edits of the {side} answer. Shift: what the edit adds to its score, in standard deviations of the "
    )
    note += f"model's scores. Flipped: {verdict}. {percent(result['confidence'])} intervals over prompts."
    return Table(f"{probe.capitalize()}: edited answers on {name}", header, rows, note + _left_out(measured))


def _cells(numbers: ModelEffect | EffectVersus, sign: str) -> tuple[str, str]:
    return (
        cell(numbers["shift"], numbers["shift_interval"]),
        cell(numbers["flipped"], numbers["flipped_interval"], f"{sign}.1%"),
    )


def _versus_cells(versus: EffectVersus | None) -> tuple[str, str]:
    return _cells(versus, "+") if versus else ("baseline", "baseline")


def cell(value: float | None, interval: Interval | None, form: str = "+.2f") -> str:
    """A value and its interval as a table's cell; empty if there is none."""
    return "" if value is None or interval is None else with_interval(value, interval, form)


def _left_out(measured: EditedSet) -> str:
    reasons = [
        f"{edit} {count} ({why})"
        for edit, effect in measured["edits"].items()
        for why, count in effect["left_out"].items()
    ]
    return f" Left out for all models: {', '.join(reasons)}." if reasons else ""


def _worst_cases(probe: str, name: str, edits: Mapping[str, EditEffect]) -> Table:
    header = ["edit", "model", "row", "lead (SD)", "prompt", "chosen", "edited"]
    rows = []
    for edit, effect in edits.items():
        for model, numbers in effect["models"].items():
            worst = numbers["worst"]
            texts = [worst["prompt"], worst["chosen"], worst["edited"]]
            rows.append([edit, model, str(worst["row"]), f"{worst['lead']:+.2f}", *texts])
    note = "Lead: score of the edited answer minus that of the chosen one."
    return Table(f"{probe.capitalize()}: worst cases on {name}", header, rows, note)


def plot(probe: str, result: Edited, folder: Path) -> list[str]:
    """PROBE.png: shift and interval of every edit and model, one panel per set; nothing without edits."""
    panels = {
        name: {
            f"{edit}, {model}": (numbers["shift"], *numbers["shift_interval"])
            for edit, effect in measured["edits"].items()
            for model, numbers in effect["models"].items()
            if numbers["shift_interval"] is not None
        }
        for name, measured in result["sets"].items()
    }
    if not any(panels.values()):
        return []
    label = f"{probe}: shift of the {result['side']} answer's score (SD)"
    plotting.dots({name: rows for name, rows in panels.items() if rows}, folder / f"{probe}.png", label)
    return [f"{probe}.png"]
