"""What fit reports: report.json, fit.md with its tables, alpha.png.

Shapes: N weighted members (routed experts, or models besides the base).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moemerge.artifacts.json_file import write_json
from moemerge.artifacts.stage import Draft
from moemerge.fitting.curve import draw, table
from moemerge.fitting.problem import FitOutcome
from moemerge.merging.coefficients import Coefficients
from moemerge.reports import plotting
from moemerge.reports.table import Table


def write_report(draft: Draft, coefficients: Coefficients, outcome: FitOutcome, members: list[str]) -> None:
    """Write report and pictures into the draft's folder, and the numbers of the report into its results."""
    write_json(draft.folder / "report.json", outcome.report)
    plotting.heat_map(
        [values for _, _, values in coefficients.table()],
        draft.folder / "alpha.png",
        "Merge coefficients",
        "member",
        "block",
        y_ticks=[block.removeprefix("layers.") for block in coefficients.blocks],
    )
    tables, pictures = [], "![alpha](alpha.png)\n"
    if rows := outcome.report.get("curve"):
        draw(rows, draft.folder / "curve.png")
        tables, pictures = [table(rows)], pictures + "![curve](curve.png)\n"
    tables += [
        *_loss_tables(outcome.report),
        _coefficient_table(coefficients, outcome.report, members),
        *_sensitivity_tables(outcome.report),
    ]
    parts = ["# Merge coefficients\n", outcome.report["verdict"] + "\n", *(t.markdown() for t in tables)]
    (draft.folder / "fit.md").write_text("\n".join([*parts, pictures]), encoding="utf-8")
    draft.results |= {k: v for k, v in outcome.report.items() if k not in ("trajectory", "curve")}


def coefficient_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """Each block's weights, as coefficients.json shows them: of the shared member, then of the others."""
    for block, shared, values in Coefficients.load(folder).table():
        members = {f"member {number}": value for number, value in enumerate(values)}
        yield {"block": block, "shared": shared, **members}


def _loss_tables(report: dict[str, Any]) -> list[Table]:
    if "held_out" not in report:
        return []
    rows = []
    for split in ("train", "held_out"):
        for when in ("before", "after"):
            at, number = report[split][when], str(report["pairs"][split])
            change = report[split].get("change") if when == "after" else None
            values = [_changed(at, change, name) for name in ("loss", "accuracy")]
            rows.append([split, when, number, *values])
    note = "In brackets the change with its 95 % interval: bootstrap over prompts, paired."
    return [Table("Bradley-Terry loss", ["pairs", "when", "number", "loss", "accuracy"], rows, note)]


def _changed(at: dict[str, float], change: dict[str, Any] | None, name: str) -> str:
    if change is None:
        return f"{at[name]:.4f}"
    c = change[name]
    return f"{at[name]:.4f} ({c['change']:+.4f}, {c['low']:+.4f} to {c['high']:+.4f})"


def _sensitivity_tables(report: dict[str, Any]) -> list[Table]:
    rows = [[r["layer"], f"{r['loss']:+.5f}", f"{r['accuracy']:+.4f}"] for r in report.get("sensitivity", [])]
    note = "What held-out pairs lose when one layer goes back to its initial coefficients."
    header = ["layer", "loss rises by", "accuracy falls by"]
    return [Table("Sensitivity", header, rows, note)] if rows else []


def _coefficient_table(coefficients: Coefficients, report: dict[str, Any], members: list[str]) -> Table:
    moved = [f"{block['l1']:.4f}" for block in report.get("moved", [])] or [""] * len(coefficients.blocks)
    rows = [
        [block, l1, f"{shared:.4f}", *(f"{a:.4f}" for a in alpha_N)]
        for l1, (block, shared, alpha_N) in zip(moved, coefficients.table(), strict=True)
    ]
    header = ["block", "moved", "shared", *members]
    note = "moved: L1 distance of the members' coefficients from where they started."
    return Table("Coefficients", header, rows, note if report.get("moved") else "")
