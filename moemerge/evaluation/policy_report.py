"""The numbers of policy-gradient runs: gold, own score and KL over steps, and what refreshes came to.

Q prompts that are measured on, V measurements (at step 0 and then every so many steps), M models, R resamples
(the values themselves come first).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moemerge.data.rows import Row
from moemerge.evaluation.gold import Reward, source_of_gold
from moemerge.evaluation.policy_page import MEASURED
from moemerge.evaluation.probes import over_optimisation
from moemerge.evaluation.refresh_report import held_out_curves, refreshed
from moemerge.options.optimise import Optimise
from moemerge.reports.statistics import Floats, banded, resampled_curves


def policy_report(options: Optimise, runs: dict[str, Row], gold_reward: Reward) -> dict[str, Any]:
    """Curves over steps per model, with intervals over prompts, and differences to the baseline."""
    models, first = list(runs), next(iter(runs.values()))
    steps = sorted({row["step"] for row in first["rows"]})
    values_3QMV = np.stack([by_prompt(run["rows"], steps) for run in runs.values()], axis=2)
    means_3MRV = resampled_curves(values_3QMV, options.resamples, options.seed)
    baseline = models.index(options.baseline or models[0])
    return {
        "confidence": options.confidence,
        "prompts": first["prompts"],
        "rows": first["source"],
        "gold": source_of_gold(options),
        "steps": steps,
        "baseline": models[baseline],
        "models": {
            name: _summary(means_3MRV[:, number], means_3MRV[:, baseline], steps, options.confidence)
            | _of_refresh(options, name, runs[name], steps, gold_reward)
            for number, name in enumerate(models)
        },
    }


def _of_refresh(options: Optimise, name: str, run: Row, steps: Sequence[int], gold_reward: Reward) -> Row:
    """Accuracy on held-out pairs, if it was measured, and what a refresh was made of."""
    curves = held_out_curves(run, steps, options.resamples, options.confidence, options.seed)
    if name not in options.refresh:
        return curves
    when, trains = options.refresh[name], options.refresh_trains
    return curves | {"refresh": refreshed(run, when, trains, gold_reward)}


def by_prompt(rows: Sequence[Row], steps: Sequence[int]) -> Floats:
    """Gold, standardised proxy and KL, means over answers; [3, Q, V]."""
    start = np.array([row["proxy"] for row in rows if row["step"] == steps[0]])
    count = 1 + max(row["number"] for row in rows)
    sums_3QV, column = np.zeros((3, count, len(steps))), {step: v for v, step in enumerate(steps)}
    for row in rows:
        sums_3QV[:, row["number"], column[row["step"]]] += [row[name] for name in MEASURED]
    means_3QV = sums_3QV / (len(start) / count)
    means_3QV[1] = (means_3QV[1] - start.mean()) / (start.std() or 1.0)
    return means_3QV


def _summary(means_3RV: Floats, baseline_3RV: Floats, steps: Sequence[int], confidence: float) -> Row:
    curves = dict(zip(MEASURED, means_3RV, strict=True))
    numbers, theirs = (_numbers(values_3RV, steps) for values_3RV in (means_3RV, baseline_3RV))
    if means_3RV is not baseline_3RV and not np.array_equal(means_3RV, baseline_3RV):
        curves["minus_baseline"] = means_3RV[0] - baseline_3RV[0]
        numbers |= {f"{name}_minus_baseline": numbers[name] - theirs[name] for name in theirs}
    shown = {**curves, **numbers}
    return {key: v for name, values in shown.items() for key, v in banded(name, values, confidence).items()}


def _numbers(means_3RV: Floats, steps: Sequence[int]) -> dict[str, Floats]:
    """Peak and drop of gold, and Gao's fit of policy gradient, each [1 + R]."""
    gold_RV, _, kl_RV = means_3RV
    peak_R = over_optimisation.peak(gold_RV)
    terms_RV2 = over_optimisation.policy_gradient_terms(kl_RV)
    fit_R2, _ = over_optimisation.fit(terms_RV2, gold_RV - gold_RV[:, :1])
    return {
        "peak_step": np.asarray(steps)[peak_R],
        "peak_kl": kl_RV[np.arange(len(kl_RV)), peak_R],
        "drop": gold_RV[:, peak_R[0]] - gold_RV[:, -1],
        "alpha": fit_R2[:, 0],
        "beta": fit_R2[:, 1],
    }
