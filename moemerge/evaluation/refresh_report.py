"""What a refresh of a reward model came to: verified pairs, updates, and held-out accuracy while it ran.

Shapes: H held-out pairs, V measurements, R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moemerge.data.rows import Row
from moemerge.evaluation.gold import Reward
from moemerge.reports.statistics import (
    Floats,
    banded,
    bootstrap_means,
    cluster_sums,
    lead_interval,
)
from moemerge.reports.table import Table, ends, percent, with_interval

HELD_OUT = "held_out"


def held_out_curves(run: Row, steps: Sequence[int], resamples: int, confidence: float, seed: int) -> Row:
    """Accuracy on held-out pairs at each measurement, and its change since before any update, with intervals.

    Bootstrap over prompts. Nothing of a run that measured none.
    """
    held = run.get(HELD_OUT)
    if not held:
        return {}
    right_HV = np.array([held["right"][str(step)] for step in steps], dtype=np.float64).T
    before_H = np.array(held["before"], dtype=np.float64)
    columns = np.column_stack([right_HV, right_HV[:, -1] - before_H])
    clusters_H = np.unique(held["prompts"], return_inverse=True)[1]
    draws = bootstrap_means(cluster_sums(columns, clusters_H), resamples, seed)
    values = np.concatenate([columns.mean(axis=0, keepdims=True), draws])
    low, high = lead_interval(values[1:, -1], len(np.unique(clusters_H)), confidence)
    change = {"value": float(values[0, -1]), "low": low, "high": high}
    curve = banded(HELD_OUT, values[:, :-1], confidence)
    return {**curve, "held_out_pairs": len(before_H), "held_out_change": change}


def refreshed(run: Row, when: str, trains: str, gold: Reward) -> Row:
    """Counts of a run's updates and pairs, and how often gold agrees with the rule that certified them."""
    found, updates, pairs = run["refresh"], run["refresh"]["updates"], run["refresh"]["pairs"]
    losses = [update["loss"] for update in updates if update["loss"] is not None]
    prompts = sum(update["prompts"] for update in updates)
    return {
        "when": when,
        "trains": trains,
        "updates": len(updates),
        "updates_with_pairs": len(losses),
        "pairs": len(found["pairs"]),
        "masked": prompts - len(pairs),
        "made": sum(pair["made"] for pair in pairs),
        "replayed": sum(update["replayed"] for update in updates),
        "loss": [losses[0], losses[-1]] if losses else None,
        "gold_agrees": _agreement(pairs, gold) if pairs else None,
    }


def _agreement(pairs: Sequence[Row], gold: Reward) -> float:
    """The share of pairs whose right answer has the higher gold score."""
    sides: list[Floats] = [gold([(p["prompt"], p[side]) for p in pairs]) for side in ("chosen", "rejected")]
    return float((np.asarray(sides[0]) > np.asarray(sides[1])).mean())


def refresh_table(report: dict[str, Any]) -> Table | None:
    """A line per model: its pairs and updates, and what they did to accuracy on held-out pairs."""
    header = [
        "model", "refreshed", "trains", "updates", "verified pairs", "made wrong", "prompts without",
        "gold agrees", "held-out accuracy at the end", "since before",
    ]  # fmt: skip
    rows = [_row(name, curves) for name, curves in report["models"].items()]
    if not any(any(row[1:]) for row in rows):
        return None
    note = (
        f"Updates: those that had pairs, of all. {percent(report['confidence'])} intervals over prompts. "
        "Gold agrees: share of verified pairs whose right answer has the higher gold score."
    )
    return Table("Reward models refreshed", header, rows, note)


def _row(name: str, curves: Row) -> list[str]:
    found, held = curves.get("refresh"), HELD_OUT in curves
    cells = [""] * 7
    if found:
        agrees = "" if found["gold_agrees"] is None else f"{found['gold_agrees']:.1%}"
        updates = f"{found['updates_with_pairs']} of {found['updates']}"
        counts = (str(found[key]) for key in ("pairs", "made", "masked"))
        cells = [found["when"], found["trains"], updates, *counts, agrees]
    if not held:
        return [name, *cells, "", ""]
    value, low, high = (curve[-1] for curve in ends(curves, HELD_OUT))
    change = curves["held_out_change"]
    since = with_interval(change["value"], (change["low"], change["high"]), "+.3f")
    return [name, *cells, with_interval(value, (low, high), ".3f"), since]
