"""RewardBench's results as its own scripts write them, to be filed or read by its tools.

After scripts/run_rm.py (version 1) and run_v2.py of rewardbench 0.1.4: of each model a score per subset, and
beside it the scores of every row; without the texts, which are RewardBench's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moemerge.artifacts.json_file import write_json
from moemerge.evaluation.probes.base import ChoiceScores
from moemerge.evaluation.probes.rewardbench import PRIOR, results
from moemerge.evaluation.report import Report, rewardbench_sets

FOLDER, SCORES, PRIOR_FILE = "rewardbench", "scores", "pref-sets"


def write_results(folder: Path, report: Report, sets: Mapping[str, ChoiceScores], template: str) -> None:
    """Write rewardbench/SET/MODEL.json, MODEL.scores.json and, with prior sets, MODEL.pref-sets.json.

    `template`: what RewardBench's files call the chat template; "tokenizer" for the tokenizer's own.
    """
    for name, benchmark in rewardbench_sets(report).items():
        home = folder / FOLDER / name
        home.mkdir(parents=True)
        for model, facts in report["models"].items():
            about = {"model": facts["source"], "model_type": "Seq. Classifier", "chat_template": template}
            scores = {s: part["models"][model]["score"] for s, part in benchmark["subsets"].items()}
            prior = {subset: scores.pop(subset) for subset in PRIOR if subset in scores}
            write_json(home / f"{model}.json", about | scores)
            if prior:
                write_json(home / f"{model}.{PRIOR_FILE}.json", about | prior)
            if name in sets:
                write_json(home / f"{model}.{SCORES}.json", about | _of_rows(sets[name], model))


def _of_rows(rows: ChoiceScores, model: str) -> dict[str, Any]:
    """Columns: one score of each side (1), or the scores of all answers, the right ones first (2)."""
    scores_C = rows.scores[model]
    by_row = [scores_Q.tolist() for scores_Q in np.split(scores_C, np.cumsum(rows.sizes)[:-1])]
    counted_Q, _ = results(scores_C, rows)
    columns: dict[str, Any] = {"id": rows.ids.tolist(), "subset": rows.subsets.tolist()}
    if rows.version == 1:
        sides = {"scores_chosen": [row[0] for row in by_row], "scores_rejected": [row[1] for row in by_row]}
        return columns | {"results": counted_Q.astype(int).tolist(), **sides}
    # A row of Ties has no result of its own: its score is one formula over all of them.
    ties = [subset.lower() == "ties" for subset in rows.subsets.tolist()]
    of_rows = [None if tied else value for tied, value in zip(ties, counted_Q.tolist(), strict=True)]
    return columns | {"results": of_rows, "scores": by_row, "num_correct": rows.num_correct.tolist()}
