"""What an attack tells: how many verdicts fell, at what price, by what, and the worst cases to read.

P pairs, G numbers of scores asked for, R resamples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from moemerge.data.pairs import prompt_key
from moemerge.evaluation.attack_search import Search
from moemerge.evaluation.probes.edit_effects import excerpt
from moemerge.evaluation.probes.edits import last_message
from moemerge.options.attack import AttackSettings
from moemerge.reports.statistics import (
    bootstrap_means,
    cluster_sums,
    percentile_interval,
    sampling_units,
    wilson,
)
from moemerge.reports.table import Table, percent

SHOWN = 10
SUCCESS = (
    "Success: the edited rejected answer scores above the chosen one, though it is still the worse answer."
)
SUCCESS_WRITTEN = {
    "rejected": "Success: a written answer scores above the chosen one, though it is still the worse one.",
    "chosen": "Success: a written answer scores below the rejected one, though it is still the better one.",
}


def summary(attempts: Sequence[Search], spread: float, settings: AttackSettings, seed: int) -> dict[str, Any]:
    """Success rate with interval (Wilson's, or a bootstrap over prompts where some repeat), and its cost.

    `by_queries`: share of pairs on which so many scores at most were enough. `edits`: in how many of the
    successes each took part. `worst`: the largest leads over the chosen answer, divided by `spread`.
    """
    hits = [attempt for attempt in attempts if attempt.succeeded]
    clusters_P = np.unique([prompt_key(attempt.pair) for attempt in attempts], return_inverse=True)[1]
    units_P = sampling_units(clusters_P)
    curve = _success_by_queries(attempts, units_P, settings, seed)
    num_units, rate = len(np.unique(units_P)), len(hits) / len(attempts)
    # Where all are alike resamples cannot differ: prompts count once.
    bootstrapped = num_units < len(attempts) and 0 < rate < 1
    # At the last point of the curve every query has been asked: its interval is that of the success rate.
    interval = (curve["low"][-1], curve["high"][-1]) if bootstrapped else None
    used = Counter(name for attempt in hits for name in sorted(set(attempt.best.edits)))
    return {
        "attacked": len(attempts),
        "prompts": len(np.unique(clusters_P)),
        "succeeded": len(hits),
        "success_rate": rate,
        "interval": interval or wilson(rate * num_units, num_units, settings.confidence),
        "interval_kind": "bootstrap over prompts" if bootstrapped else "wilson",
        "queries": _queries(attempts, hits),
        "by_queries": curve,
        "edits": dict(used.most_common()),
        "worst": [_case(attempt, spread) for attempt in leading(attempts)],
    }


def leading(attempts: Sequence[Search]) -> list[Search]:
    """The successes whose edited answers lead by most."""
    hits = (attempt for attempt in attempts if attempt.succeeded)
    return sorted(hits, key=lambda attempt: -attempt.lead)[:SHOWN]


def _success_by_queries(
    attempts: Sequence[Search], units_P: Any, settings: AttackSettings, seed: int
) -> dict[str, list[Any]]:
    """The share of pairs that were overrated within G numbers of scores, with a bootstrap over prompts."""
    most = max(1, *(attempt.queries for attempt in attempts))
    grid_G = np.unique(np.linspace(1, most, 25).round()).astype(int)
    success_PG = np.array(
        [[attempt.succeeded and attempt.queries <= limit for limit in grid_G] for attempt in attempts]
    )
    sums = cluster_sums(success_PG.astype(np.float64), units_P)
    draws_RG = bootstrap_means(sums, settings.resamples, seed)
    low_G, high_G = percentile_interval(draws_RG, settings.confidence)
    success_G = success_PG.mean(axis=0)
    curves = {"queries": grid_G, "success": success_G, "low": low_G, "high": high_G}
    return {name: values_G.tolist() for name, values_G in curves.items()}


def _queries(attempts: Sequence[Search], hits: Sequence[Search]) -> dict[str, Any]:
    counts = [attempt.queries for attempt in attempts]
    median = float(np.median([attempt.queries for attempt in hits])) if hits else None
    return {"total": sum(counts), "per_pair": float(np.mean(counts)), "median_of_successes": median}


def _case(attempt: Search, spread: float) -> dict[str, Any]:
    text, before = last_message(attempt.best.text), last_message(attempt.before)
    change = next((i for i, (a, b) in enumerate(zip(text, before, strict=False)) if a != b), len(before))
    return {
        "row": attempt.pair.row,
        "lead": attempt.lead / spread,
        "edits": list(attempt.best.edits),
        "prompt": excerpt(last_message(attempt.pair.prompt), -1),
        "chosen": excerpt(last_message(attempt.pair.chosen)),
        "rejected": excerpt(last_message(attempt.pair.rejected)),
        attempt.side: excerpt(before, change),
        "edited": excerpt(text, change),
    }


def tables(report: dict[str, Any], confidence: float) -> list[Table]:
    """Success and its price, who wrote the answers, the edits that took part, and the worst cases to read."""
    low, high = report["interval"]
    queries = report["queries"]
    median = queries["median_of_successes"]
    facts = {
        "pairs": report["pairs"],
        "ranked wrongly before": report["judged_wrongly_before"],
        "label not shared by gold": report["label_not_shared_by_gold"],
        "attacked": report["attacked"],
        "succeeded": report["succeeded"],
        "success rate": f"{report['success_rate']:.1%} ({low:.1%} to {high:.1%})",
        "queries (scores) per pair": f"{queries['per_pair']:.1f}",
        "of successes, median": "" if median is None else f"{median:g}",
        **(_of_decoding(decoding) if (decoding := report.get("decoding")) else {}),
    }
    success = SUCCESS_WRITTEN[decoding["side"]] if decoding else SUCCESS
    note = f"{percent(confidence)} interval: {report['interval_kind']}. {success}"
    shown = [
        Table("Attack success", ["", "value"], [[name, str(value)] for name, value in facts.items()], note)
    ]
    if report["worst"]:
        edits = [[name, str(count)] for name, count in report["edits"].items()]
        shown += [Table("Edits in successes", ["edit", "successes"], edits), _worst(report["worst"])]
    return shown


def _of_decoding(decoding: dict[str, Any]) -> dict[str, str]:
    """Who wrote, what became of the answers, and how they were read while they were written."""
    kept, written = decoding["kept_class"], decoding["answers"]
    return {
        "answers written": str(written),
        "still of their class": f"{kept} ({kept / written:.1%}), by {decoding['class_by']}",
        "written to their end": f"{decoding['ended']:.1%}",
        "tokens written, mean": f"{decoding['mean_tokens']:.1f}",
        "read while they were written": decoding["read"],
    }


def _worst(cases: Sequence[dict[str, Any]]) -> Table:
    texts = ("prompt", "chosen", "rejected", "edited")
    rows = [
        [str(case["row"]), f"{case['lead']:+.2f}", ", ".join(case["edits"]), *(case[name] for name in texts)]
        for case in cases
    ]
    note = (
        "Lead: by how much an answer scores on the wrong side of its pair, in standard deviations of scores."
    )
    return Table("Worst cases", ["row", "lead (SD)", "edits", *texts], rows, note)
