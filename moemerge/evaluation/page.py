"""What the page of an evaluation says, in sections; the page of a run takes the same ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moemerge.evaluation import main_table as summary
from moemerge.evaluation import protocol, verdict
from moemerge.evaluation.probes import PROBES
from moemerge.models.cost import COSTS
from moemerge.reports.figures import Figure
from moemerge.reports.html import Section
from moemerge.reports.table import Table, percent

KINDS = {"pairs": "preference pairs", "candidates": "scored candidates", "rewardbench": "RewardBench"}


def evaluation_sections(report: Mapping[str, Any], folder: Path) -> list[Section]:
    """Summary, one section per probe, worst cases to read, models and data, from what evaluate wrote.

    `report` is its report.json, `folder` where the plots are. A table with a column of prose is one to read.
    """
    results, plots = report["probes"], report.get("plots_by_probe", {})
    sections, to_read = [_summary(report)], []
    for name, result in results.items():
        tables = PROBES.get(name).tables(result)
        to_read += [table for table in tables if any(table.prose()[1:])]
        numbers = [table for table in tables if not any(table.prose()[1:])]
        figures = [Figure.load(folder / plot) for plot in plots.get(name, [])]
        sections.append(Section(_title(name), tables=numbers, figures=figures))
    if to_read:
        sections.append(Section("Worst cases to read", tables=to_read))
    return [*sections, _models_and_data(report)]


def _models_and_data(report: Mapping[str, Any]) -> Section:
    edited = {name: one for name, one in report["rows"].items() if name.startswith("edits/")}
    given = {name: one for name, one in report["rows"].items() if name not in edited}
    tables = [model_table(report["models"]), *protocol.tables(report["protocol"]), row_table(given)]
    return Section(
        "Models and data", tables=tables, folded=[row_table(edited, "Edited answers")] if edited else []
    )


def _title(name: str) -> str:
    return KINDS["rewardbench"] if name == "rewardbench" else name.replace("_", " ").capitalize()


def _summary(report: Mapping[str, Any]) -> Section:
    lead = verdict.standing(dict(report))
    return Section("Summary", [_compared(report)], [main_numbers(report)], lead=lead)


def main_numbers(report: Mapping[str, Any]) -> Table:
    """The table to see first, on the page and on a card."""
    header, rows = summary.main_table(dict(report))
    known = [result["confidence"] for result in report["probes"].values() if "confidence" in result]
    note = f"In brackets: {percent(known[0])} intervals, each by itself." if known else ""
    return Table("Main numbers", header, rows, note)


def _compared(report: Mapping[str, Any]) -> str:
    """What was compared on what."""
    sets: dict[str, list[str]] = {}
    for place in report["rows"]:
        kind, _, name = place.partition("/")
        sets.setdefault(kind, []).append(name)
    told = {kind: name for kind, name in KINDS.items() if kind in sets}
    on = ", ".join(f"{name} ({', '.join(sets[kind])})" for kind, name in told.items())
    models = ", ".join(report["models"])
    if len(report["models"]) == 1:
        return f"{models}, measured on {on}."
    return (
        f"{models}, compared on {on}. All models scored the same rows; differences to {report['baseline']} "
        "are paired, row by row."
    )


def model_table(models: Mapping[str, Mapping[str, Any]]) -> Table:
    """Class and cost of every model."""
    rows = [[name, facts["class"], *(f"{facts[key]:,}" for key in COSTS)] for name, facts in models.items()]
    return Table("Models", ["model", "class", *COSTS.values()], rows)


def row_table(reports: Mapping[str, Mapping[str, Any]], title: str = "Data rows") -> Table:
    """How many rows of each set were used, and why the others were not, from RowReport.summary() of each."""
    rows = []
    for name, one in reports.items():
        why = [f"{reason}: {bad['count']} ({_numbers(bad)})" for reason, bad in one["bad"].items()]
        left = one["total"] - one["kept"]
        rows.append([name, str(one["total"]), str(one["kept"]), str(left), "; ".join(why)])
    return Table(title, ["set", "rows", "used", "left out", "why"], rows)


def _numbers(bad: Mapping[str, Any]) -> str:
    shown = ", ".join(map(str, bad["rows"]))
    return f"row {shown}{', ...' if bad['count'] > len(bad['rows']) else ''}"
