"""What the pages say of policy-gradient runs: where each began, peaked and ended."""

from __future__ import annotations

from typing import Any

from moemerge.data.rows import Row
from moemerge.evaluation.refresh_report import refresh_table
from moemerge.reports.table import Table, ends, percent, with_interval

MEASURED = ("gold", "proxy", "kl")
COSTS = ("peak_step", "peak_kl", "drop", "alpha", "beta")


def tables(report: dict[str, Any]) -> list[Table]:
    """Where each model's run began, peaked and ended; and what refreshes came to, if there were any."""
    refreshes = refresh_table(report)
    return [_table(report), *([refreshes] if refreshes else [])]


def _table(report: dict[str, Any]) -> Table:
    """Where each model's run began, peaked and ended."""
    header = [
        "model",
        "gold at step 0",
        "gold at the end",
        "proxy at the end",
        "KL at the end",
        *map(_words, COSTS),
    ]
    rows = []
    for name, curves in report["models"].items():
        ends = [_cell(curves, "gold", 0), *(_cell(curves, curve, -1) for curve in MEASURED)]
        rows.append([name, *ends, *(_cell(curves, cost) for cost in COSTS)])
        if "minus_baseline" in curves:
            versus = (_cell(curves, f"{cost}_minus_baseline") for cost in COSTS)
            ends = [_cell(curves, "minus_baseline", point) for point in (0, -1)]
            rows.append([f"{name} minus {report['baseline']}", *ends, "", "", *versus])
    note = (
        f"{report['steps'][-1]} steps, measured on {report['prompts']['measured']} prompts set aside; "
        f"{percent(report['confidence'])} intervals over these. Drop: highest gold minus that at the end. "
        "alpha, beta: gold gain = d (alpha - beta log d), d = sqrt(KL)."
    )
    return Table("Gold score while the policy is optimised", header, rows, note)


def _words(name: str) -> str:
    return name.replace("_", " ").replace("kl", "KL")


def _cell(curves: Row, name: str, point: int | None = None) -> str:
    """A number and its interval; of a curve, those at its point number `point`."""
    numbers = ends(curves, name)
    value, low, high = numbers if point is None else (curve[point] for curve in numbers)
    return with_interval(value, (low, high), ".0f" if name.startswith("peak_step") else ".3f")
