"""A small report of an evaluation, and scores of rows of RewardBench."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from moemerge.evaluation.probes.base import ChoiceScores
from moemerge.evaluation.report import FORMAT

MODELS = ("dense", "control", "moe", "merge-usage", "merge-learned")
VERSUS = {
    "difference": 0.02,
    "interval": [0.01, 0.03],
    "right_alone": 3,
    "baseline_right_alone": 1,
    "p": 0.004,
}


def report_of(models: Iterable[str], baseline: str, **probes: Any) -> dict[str, Any]:
    """report.json of an evaluation of `models`, with the results of `probes`."""
    facts = {"source": "", "class": "", "tokens": 1, "parameters": 10, "flops_per_token": 20}
    return {
        "format": FORMAT,
        "models": {name: {**facts, "active_parameters": 10} for name in models},
        "baseline": baseline,
        "gold": "scores in the file",
        "rows": {},
        "protocol": {"sets": {}, "models": {}},
        "probes": probes,
        "plots": [],
        "plots_by_probe": {},
    }


def accuracy_part() -> dict[str, Any]:
    """What the probe accuracy finds on all pairs of a set: all models alike, better than the baseline."""
    numbers = {"accuracy": 0.75, "ties": 0, "loss": 0.5, "interval": [0.7, 0.8]}
    return {
        "pairs": 100,
        "prompts": 100,
        "interval_kind": "wilson",
        "baseline": "control",
        "models": {name: {**numbers, "vs_baseline": VERSUS} for name in MODELS},
        "comparisons": [],
        "always_longer": 0.5,
        "always_shorter": 0.5,
    }


REPORT = report_of(
    MODELS,
    "control",
    accuracy={
        "confidence": 0.95,
        "sets": {"test": {"all": accuracy_part(), "sections": {}, "subsets": {}}},
    },
)


def choice_scores(rows: list[dict[str, Any]], version: int = 2) -> ChoiceScores:
    """Rows with scores (of one model, or of several by name), correct, subset, id, prompt, lengths."""
    named = [r["scores"] if isinstance(r["scores"], dict) else {"m": r["scores"]} for r in rows]
    sizes = [len(next(iter(scores.values()))) for scores in named]
    lengths = [r.get("lengths", [1] * size) for r, size in zip(rows, sizes, strict=True)]
    return ChoiceScores(
        version,
        {model: np.concatenate([scores[model] for scores in named]).astype(float) for model in named[0]},
        np.concatenate(lengths),
        np.array(sizes),
        np.array([r.get("correct", 1) for r in rows]),
        np.array([r.get("subset", "") for r in rows]),
        np.array([r.get("id", "") for r in rows]),
        np.array([r.get("prompt", place) for place, r in enumerate(rows)]),
    )
