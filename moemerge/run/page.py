"""The page of a whole run: what evaluate says, and behind it routing, coefficients, training, provenance."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from moemerge.artifacts.json_file import read_object
from moemerge.artifacts.manifest import read_manifest
from moemerge.evaluation import verdict
from moemerge.evaluation.page import evaluation_sections, row_table
from moemerge.evaluation.policy_page import tables
from moemerge.evaluation.report import Report, read_report
from moemerge.evaluation.vote_report import number_tables, paragraphs
from moemerge.reports.figures import Figure, on_one_scale
from moemerge.reports.html import Section, write_report
from moemerge.reports.provenance import provenance_section
from moemerge.reports.table import Table
from moemerge.run.headlines import headline


def write_run_page(run: Path, steps: Sequence[str], learned: str) -> Path:
    """Write report.html and report.md into the folder of a finished run.

    steps: names of its steps in order; learned: the merged model that the verdict is about.
    """
    manifests = {step: read_manifest(run / step) for step in steps}
    report = read_report(run / "evaluate")
    first, *measured = evaluation_sections(report, run / "evaluate")
    to_read = [section for section in measured[:-1] if _is_to_read(section)]
    probes = [section for section in measured[:-1] if not _is_to_read(section)]
    sections = [
        _with_verdict(first, report, learned),
        *_votes(run, manifests),
        *probes,
        *_stage_sections(run, manifests),
        *to_read,
        _data(measured[-1], manifests),
        steps_section(manifests),
        provenance_section(manifests),
    ]
    return write_report(run, f"Run {run.resolve().name}", sections)


def _is_to_read(section: Section) -> bool:
    return any(any(table.prose()[1:]) for table in section.tables)


def _with_verdict(first: Section, report: Report, learned: str) -> Section:
    """The summary with the run's own question first; how all models stand is said below."""
    lead, alone, _, power = verdict.verdict_sentences(report, learned)
    closing = [part for part in (first.lead, *first.closing) if part]
    return replace(first, lead=lead, text=[part for part in (alone, power) if part], closing=closing)


def _stage_sections(run: Path, manifests: Mapping[str, Any]) -> Iterator[Section]:
    """Pictures of the steps by what they show, with a line on each step."""
    kinds = {
        "optimise": "Policy gradient",
        "train": "Training curves",
        "route": "Routing",
        "fit": "Merge coefficients",
    }
    for stage, title in kinds.items():
        steps = [step for step, manifest in manifests.items() if manifest["stage"] == stage]
        figures = [figure for step in steps for figure in _figures(run / step, len(steps) > 1)]
        lines = [f"{step}: {headline(manifests[step])}" for step in steps]
        shown = [one for step in steps if stage == "optimise" for one in _optimised(run / step)]
        if figures:
            yield Section(title, lines, tables=shown, figures=on_one_scale(figures))


def _votes(run: Path, manifests: Mapping[str, Any]) -> Iterator[Section]:
    """What a vote on the training labels came to; its own page has the pairs to read."""
    for step in (step for step, manifest in manifests.items() if manifest["stage"] == "strength"):
        numbers = read_object(run / step / "strength.json")
        figures, lead = [*_figures(run / step, named=False)], headline(manifests[step])
        yield Section("Training labels", paragraphs(numbers), number_tables(numbers), figures, lead=lead)


def _optimised(folder: Path) -> list[Table]:
    return tables(read_object(folder / "report.json"))


def _figures(folder: Path, named: bool) -> Iterator[Figure]:
    for file in sorted(folder.glob("*.png")):
        figure = Figure.load(file)
        yield figure.renamed(f"{folder.name}: {figure.title}") if named else figure


def _data(section: Section, manifests: Mapping[str, Any]) -> Section:
    """Models and data, with what became of the rows of the run's own files."""
    results = manifests.get("data", {}).get("results", {})
    if "rows" not in results:
        return section
    return replace(section, tables=[*section.tables, row_table(results["rows"], "Rows of the files given")])


def steps_section(manifests: Mapping[str, Any]) -> Section:
    """What each step came to, and how long it took."""
    rows = [[step, f"{manifest['seconds']:.1f}", headline(manifest)] for step, manifest in manifests.items()]
    return Section("Steps", tables=[Table("Steps in order", ["step", "seconds", "result"], rows)])
