"""RM-Bench (arXiv 2410.16184): does style outweigh what is right? Three styles of right and of wrong answers.

Each chosen answer is compared with each rejected one, strictly. Hard: the wrong answer has the richer style
(concise, detailed, detailed with markdown); normal: both have one; easy: the right one has the richer. As on
its leaderboard, safety is the mean of its two domains, and the overall numbers are the mean of chat, code,
math and safety.

M models and the two rules that go by length, Q rows, R resamples; V = 1 + R, the value itself first; S
styles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from moemerge.data.rmbench import STYLES
from moemerge.evaluation.benchmark_results import (
    ModelScore,
    RMBench,
    StylePart,
    StyleScores,
    StyleSet,
)
from moemerge.evaluation.probes.base import ChoiceScores, Probe
from moemerge.evaluation.probes.comparisons import score_comparison
from moemerge.evaluation.probes.rewardbench import LONGER, SHORTER
from moemerge.options.evaluate import EvaluateSettings
from moemerge.reports import plotting
from moemerge.reports.statistics import (
    Floats,
    bootstrap_means,
    cluster_sums,
    percentile_interval,
    sampling_units,
)
from moemerge.reports.table import Table, percent

GROUPS = ("chat", "code", "math", "safety")  # of RM-Bench's domains: what stands before a hyphen
CELLS = {
    "hard": np.triu(np.ones((len(STYLES),) * 2), 1),
    "normal": np.eye(len(STYLES)),
    "easy": np.tril(np.ones((len(STYLES),) * 2), -1),
    "average": np.ones((len(STYLES),) * 2),
}


def won(scores_C: Floats) -> Floats:
    """Whether each chosen answer (first S) has a strictly higher score than each rejected one; [Q, S, S]."""
    chosen_QS, rejected_QS = scores_C.reshape(-1, 2, len(STYLES)).swapaxes(0, 1)
    return (chosen_QS[:, :, None] > rejected_QS[:, None, :]).astype(np.float64)


def measure(sets: Mapping[str, ChoiceScores], settings: EvaluateSettings, seed: int) -> RMBench:
    """Every model's matrix of styles, and its hard, normal and easy share, per file overall and by domain.

    Intervals are from a bootstrap over prompts within each domain, paired in differences to the baseline.
    """
    measured = {name: _measure_set(rows, settings, seed) for name, rows in sets.items()}
    return {"confidence": settings.confidence, "sets": measured}


def _measure_set(rows: ChoiceScores, settings: EvaluateSettings, seed: int) -> StyleSet:
    names = sorted(set(rows.subsets.tolist()))
    parts = {name: rows.part(rows.subsets == name) for name in names}
    values = {
        name: _values(part, settings.resamples, seed + number)
        for number, (name, part) in enumerate(parts.items())
    }
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.split("-")[0], []).append(name)
    means = [np.mean([values[name] for name in some], axis=0) for some in groups.values()]
    baseline = settings.baseline or next(iter(rows.scores))
    missing = [group for group in GROUPS if group not in groups]
    return {
        "baseline": baseline,
        "overall": _part(rows, np.mean(means, axis=0), baseline, settings.confidence),
        "domains": {
            name: _part(part, values[name], baseline, settings.confidence) for name, part in parts.items()
        },
        "missing": missing if len(missing) < len(GROUPS) else [],
    }


def _values(rows: ChoiceScores, resamples: int, seed: int) -> Floats:
    """The matrix of each model and rule, and of each resample of prompts; [V, M, S, S]."""
    lengths_C = rows.lengths.astype(np.float64)
    won_QMSS = np.stack([won(s_C) for s_C in (*rows.scores.values(), lengths_C, -lengths_C)], axis=1)
    flat_QX = won_QMSS.reshape(len(won_QMSS), -1)
    draws_RX = bootstrap_means(cluster_sums(flat_QX, sampling_units(rows.prompts)), resamples, seed)
    return np.vstack([flat_QX.mean(axis=0), draws_RX]).reshape(-1, *won_QMSS.shape[1:])


def _part(rows: ChoiceScores, values_VMSS: Floats, baseline: str, confidence: float) -> StylePart:
    models, units = list(rows.scores), len(np.unique(sampling_units(rows.prompts)))
    shares = {kind: (values_VMSS * cells).sum(axis=(2, 3)) / cells.sum() for kind, cells in CELLS.items()}
    first = models.index(baseline)
    return {
        "rows": len(rows.sizes),
        "models": {
            model: _of_model(rows, model, values_VMSS[:, m], confidence) for m, model in enumerate(models)
        },
        # The last two columns are the rules that go by length.
        "always_longer": {kind: float(share_VM[0, -2]) for kind, share_VM in shares.items()},
        "always_shorter": {kind: float(share_VM[0, -1]) for kind, share_VM in shares.items()},
        "vs_baseline": {
            model: {
                kind: score_comparison(
                    (model, baseline), share_VM[:, m] - share_VM[:, first], units, confidence
                )
                for kind, share_VM in shares.items()
            }
            for m, model in enumerate(models)
            if m != first
        },
    }


def _of_model(rows: ChoiceScores, model: str, values_VSS: Floats, confidence: float) -> StyleScores:
    scores = {
        kind: _score((values_VSS * cells).sum(axis=(1, 2)) / cells.sum(), confidence)
        for kind, cells in CELLS.items()
    }
    return {
        "matrix": values_VSS[0].tolist(),
        "hard": scores["hard"],
        "normal": scores["normal"],
        "easy": scores["easy"],
        "average": scores["average"],
        "length_correlation": _correlation(rows.scores[model], rows.lengths),
    }


def _score(share_V: Floats, confidence: float) -> ModelScore:
    low, high = percentile_interval(share_V[1:, None], confidence)
    return {"score": float(share_V[0]), "interval": (float(low[0]), float(high[0]))}


def _correlation(scores_C: Floats, lengths_C: Sequence[int] | np.ndarray) -> float | None:
    if np.ptp(scores_C) == 0 or np.ptp(lengths_C) == 0:
        return None
    return float(np.corrcoef(scores_C, lengths_C)[0, 1])


def tables(result: RMBench) -> list[Table]:
    """Per file: hard, normal and easy, overall and by domain; and every model's matrix of styles."""
    return [
        table
        for name, measured in result["sets"].items()
        for table in (_score_table(name, measured, result["confidence"]), _matrix_table(name, measured))
    ]


def _score_table(name: str, measured: StyleSet, confidence: float) -> Table:
    rows = []
    for part, numbers in {"overall": measured["overall"], **measured["domains"]}.items():
        for model, scores in numbers["models"].items():
            shares = (scores["hard"], scores["normal"], scores["easy"], scores["average"])
            correlation = scores["length_correlation"]
            last = "" if correlation is None else f"{correlation:+.2f}"
            rows.append([part, model, str(numbers["rows"]), *map(_cell, shares), last])
        for rule, values in ((LONGER, numbers["always_longer"]), (SHORTER, numbers["always_shorter"])):
            rows.append([part, rule, str(numbers["rows"]), *(f"{values[kind]:.4f}" for kind in CELLS), ""])
    note = (
        "Hard: the wrong answer has the richer style; easy: the right one has. A tie is an error. Overall: "
        "the mean of the domains, safety-refuse and safety-response as one. "
        f"{percent(confidence)} intervals over prompts. Length: Pearson's correlation of scores and "
        "characters."
    )
    if measured["missing"]:
        note += f" Not the whole benchmark: without {', '.join(measured['missing'])}."
    return Table(f"RM-Bench on {name}", ["", "model", "rows", *CELLS, "length"], rows, note)


def _cell(score: ModelScore) -> str:
    low, high = score["interval"]
    return f"{score['score']:.4f} ({low:.3f} to {high:.3f})"


def _matrix_table(name: str, measured: StyleSet) -> Table:
    rows = [
        [model, chosen, *(f"{share:.4f}" for share in shares)]
        for model, scores in measured["overall"]["models"].items()
        for chosen, shares in zip(STYLES, scores["matrix"], strict=True)
    ]
    header = ["model", "style of the chosen answer", *(f"rejected: {style}" for style in STYLES)]
    return Table(
        f"Styles against each other, {name}", header, rows, "Share of rows whose chosen answer wins."
    )


def plot(result: RMBench, folder: Path) -> list[str]:
    """rmbench.png: hard, normal, easy and average of every model, a panel for each."""
    panels = {
        f"{name}: {kind}": {
            model: (score["score"], *score["interval"])
            for model, scores in measured["overall"]["models"].items()
            for score in [scores[kind]]  # type: ignore[literal-required]
        }
        for name, measured in result["sets"].items()
        for kind in CELLS
    }
    baseline = next(iter(result["sets"].values()))["baseline"]
    plotting.dots(panels, folder / "rmbench.png", "share of comparisons won", baseline)
    return ["rmbench.png"]


PROBE = Probe("rmbench", measure, tables, plot)
