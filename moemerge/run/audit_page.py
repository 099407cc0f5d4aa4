"""The page of an audit: what an evaluation says, then the attacks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moemerge.artifacts.disk import write_whole
from moemerge.artifacts.json_file import read_object
from moemerge.artifacts.manifest import written_by_stages
from moemerge.evaluation import main_table
from moemerge.evaluation.page import evaluation_sections
from moemerge.evaluation.report import read_report
from moemerge.evaluation.robustness import tables
from moemerge.evaluation.verdict import standing
from moemerge.options.audit import Audit
from moemerge.reports.figures import Figure
from moemerge.reports.html import Section, write_report
from moemerge.reports.provenance import provenance_section
from moemerge.reports.table import Table
from moemerge.run.audit import ATTACKS, COMPARED, EVALUATION
from moemerge.run.page import steps_section
from moemerge.run.steps import RunReport, StepReport, is_current

SUMMARY, PAGE = "summary.md", "report.html"


def write_pages(options: Audit, reports: Sequence[StepReport]) -> RunReport:
    """Write report.html, report.md and summary.md into the run's folder, unless nothing has changed.

    Raises ArtifactError for results that no stage wrote.
    """
    run = options.output
    fix = "remove the folders of the steps that you have not made yourself, then run the command again"
    with written_by_stages(f"what the steps of {run} wrote cannot be shown", fix):
        report = read_report(run / EVALUATION)
        table, words = main_table.table(report), " ".join([standing(report), *_sentences(options)])
        if not is_current(run / PAGE, reports, [step.name for step in reports]):
            write_whole(run / SUMMARY, f"# Audit\n\n{table}\n\n{words}\n")
            first, *rest = evaluation_sections(report, run / EVALUATION)
            manifests = {step.name: step.manifest for step in reports}
            last = [steps_section(manifests), provenance_section(manifests)]
            write_report(run, f"Audit {run.resolve().name}", [first, _attacks(options), *rest, *last])
    pictures = [run / EVALUATION / name for name in report["plots"]]
    model = next(iter(options.models.values()))
    return RunReport(run, list(reports), table, words, pictures, run / PAGE, Path(model), EVALUATION)


def _numbers(options: Audit) -> Iterator[tuple[str, dict[str, Any]]]:
    for name in options.models:
        yield name, read_object(options.output / ATTACKS / name / "report.json")


def _sentences(options: Audit) -> Iterator[str]:
    """How many right verdicts of each model fall."""
    for name, numbers in _numbers(options):
        low, high = numbers["interval"]
        yield (
            f"Edits that leave the content as it was overturn {numbers['success_rate']:.1%} ({low:.1%} to "
            f"{high:.1%}) of the right verdicts of {name}."
        )


def _attacks(options: Audit) -> Section:
    """The attacks one by one, and compared if there are several."""
    lead, *text = _sentences(options)
    rows = [
        [name, str(numbers["attacked"]), str(numbers["succeeded"]), f"{numbers['success_rate']:.1%}"]
        for name, numbers in _numbers(options)
    ]
    shown = [Table("Attacks by edited rejected answers", ["model", "attacked", "overturned", "share"], rows)]
    compared = options.output / COMPARED
    if len(options.models) == 1:
        return Section("Attacks", text, shown, lead=lead)
    shown += tables(read_object(compared / "robustness.json"))
    return Section("Attacks", text, shown, [Figure.load(compared / "robustness.png")], lead=lead)
