"""A small report of an evaluation, and scores of rows of RewardBench."""

from __future__ import annotations

from typing import Any

import numpy as np

from moemerge.evaluation.probes.base import ChoiceScores
from moemerge.evaluation.report import FORMAT

REPORT: dict[str, Any] = {
    "format": FORMAT,
    "models": {
        name: {"active_parameters": 10}
        for name in ("dense", "control", "moe", "merge-usage", "merge-learned")
    },
    "baseline": "control",
    "probes": {
        "accuracy": {
            "confidence": 0.95,
            "sets": {
                "test": {
                    "all": {
                        "models": {
                            name: {
                                "accuracy": 0.75,
                                "interval": [0.7, 0.8],
                                "vs_baseline": {"difference": 0.02, "interval": [0.01, 0.03], "p": 0.004},
                            }
                            for name in ("dense", "control", "moe", "merge-usage", "merge-learned")
                        }
                    }
                }
            },
        }
    },
}


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
