"""What the page of an evaluation says, in sections; the page of a run takes the same ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from moemerge.data.rows import BadRows, RowSummary
from moemerge.evaluation import protocol, verdict
from moemerge.evaluation.cautions import without_copies
from moemerge.evaluation.main_table import main_table
from moemerge.evaluation.probes import PROBES
from moemerge.evaluation.report import COSTS, ModelFacts, Report, confidence
from moemerge.reports.figures import Figure
from moemerge.reports.html import Section
from moemerge.reports.table import Table, percent

BENCHMARKS = {"rewardbench": "RewardBench", "rmbench": "RM-Bench"}
KINDS = {"pairs": "preference pairs", "candidates": "scored candidates"} | BENCHMARKS


def evaluation_sections(report: Report, folder: Path) -> list[Section]:
    """Summary, one section per probe, worst cases to read, models and data, from what evaluate wrote.

    `report` is its report.json, `folder` where the plots are. A table with a column of prose is one to read.
    """
    held = {path.name: path for path in folder.iterdir()}  # a report may name files elsewhere
    figures = {
        name: [Figure.load(held[plot]) for plot in plots if plot in held]
        for name, plots in report["plots_by_probe"].items()
    }
    # Gold against KL is what is to be seen first, and is not shown twice.
    pictures, figures["best_of_n"] = figures.get("best_of_n", [])[:1], figures.get("best_of_n", [])[1:]
    sections, to_read = [_summary(report, pictures)], []
    for name, result in without_copies(report).items():
        tables = PROBES.get(name).tables(result)
        to_read += [table for table in tables if any(table.prose()[1:])]
        numbers = [table for table in tables if not any(table.prose()[1:])]
        shown, folded = ([t for t in numbers if t.detail == folds] for folds in (False, True))
        sections.append(Section(_title(name), (), shown, figures.get(name, []), folded))
    if to_read:
        sections.append(Section("Worst cases to read", tables=to_read))
    return [*sections, _models_and_data(report)]


def _models_and_data(report: Report) -> Section:
    edited = {name: rows for name, rows in report["rows"].items() if name.startswith("edits/")}
    read = {name: rows for name, rows in report["rows"].items() if name not in edited}
    tables = [model_table(report["models"]), *protocol.tables(report["protocol"]), row_table(read)]
    return Section(
        "Models and data", tables=tables, folded=[row_table(edited, "Edited answers")] if edited else []
    )


def _title(name: str) -> str:
    return BENCHMARKS.get(name, name.replace("_", " ").capitalize())


def _summary(report: Report, pictures: Sequence[Figure]) -> Section:
    """What was found, in a few lines and a picture; then the numbers."""
    lead, *more = verdict.standing_sentences(report)
    return Section(
        "Summary",
        [*more, *verdict.power(report)],
        [numbers_to_see_first(report)],
        pictures,
        lead=lead,
        pictures_first=True,
        closing=[_compared(report)],
    )


def numbers_to_see_first(report: Report) -> Table:
    """The table to see first, on the page and on a card."""
    header, rows = main_table(report)
    known = confidence(report)
    note = f"In brackets: {percent(known)} intervals, each by itself." if known is not None else ""
    return Table("Main numbers", header, rows, note)


def _compared(report: Report) -> str:
    """What was compared on what."""
    sets: dict[str, list[str]] = {}
    for key in report["rows"]:
        kind, _, name = key.partition("/")
        sets.setdefault(kind, []).append(name)
    on = ", ".join(f"{words} ({', '.join(sets[kind])})" for kind, words in KINDS.items() if kind in sets)
    models = ", ".join(report["models"])
    if len(report["models"]) == 1:
        return f"{models}, measured on {on}."
    return (
        f"{models}, compared on {on}. All models scored the same rows; differences to {report['baseline']} "
        "are paired, row by row."
    )


def model_table(models: Mapping[str, ModelFacts]) -> Table:
    """Class and cost of every model."""
    rows = [[name, facts["class"], *(f"{facts[key]:,}" for key in COSTS)] for name, facts in models.items()]
    return Table("Models", ["model", "class", *COSTS.values()], rows)


def row_table(reports: Mapping[str, RowSummary], title: str = "Data rows") -> Table:
    """How many rows of each set were used, and why the others were not, from RowReport.summary() of each."""
    rows = []
    for name, summary in reports.items():
        why = [f"{reason}: {bad['count']} ({_numbers(bad)})" for reason, bad in summary["bad"].items()]
        left_out = sum(bad["count"] for bad in summary["bad"].values())
        looked_at = summary["kept"] + left_out
        share = f"{left_out} ({left_out / looked_at:.1%})" if left_out else "0"
        why += [f"{summary['not_drawn']} not drawn"] if "not_drawn" in summary else []
        rows.append([name, str(summary["total"]), str(summary["kept"]), share, "; ".join(why)])
    return Table(title, ["set", "rows", "used", "left out", "why"], rows)


def _numbers(bad: BadRows) -> str:
    shown = ", ".join(map(str, bad["rows"]))
    return f"row {shown}{', ...' if bad['count'] > len(bad['rows']) else ''}"
