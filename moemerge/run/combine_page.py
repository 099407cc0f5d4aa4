"""The page of a combination: the choice first, then what each model knows, then the steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moemerge.artifacts.disk import write_whole
from moemerge.artifacts.json_file import read_object
from moemerge.artifacts.manifest import written_by_stages
from moemerge.fitting.choice_report import PICTURE, in_parts_sentence, points, sentence, tables
from moemerge.merging.changes import tables_of
from moemerge.options.combine import MARK, Combine
from moemerge.reports.figures import Figure
from moemerge.reports.html import Section, write_report
from moemerge.reports.provenance import provenance_section
from moemerge.run.combine_plan import CHOICE, LOOK, MODEL
from moemerge.run.page import steps_section
from moemerge.run.steps import RunReport, StepReport, is_current

SUMMARY, PAGE = "summary.md", "report.html"


def write_pages(options: Combine, reports: Sequence[StepReport]) -> RunReport:
    """Write report.html, report.md and summary.md into the run's folder, unless nothing has changed.

    Raises ArtifactError for results that no stage wrote.
    """
    run = options.output
    fix = "remove the folders of the steps that you have not made yourself, then run the command again"
    with written_by_stages(f"what the steps of {run} wrote cannot be shown", fix):
        numbers = read_object(run / CHOICE / "choice.json")
        look = look_sentence(read_object(run / LOOK / "choice.json")) if len(options.models) > 1 else ""
        first, *rest = tables(numbers, options.confidence)
        words = [text for text in (in_parts_sentence(numbers), look) if text]
        figure = Figure.load(run / CHOICE / PICTURE)
        page = run / PAGE
        if not is_current(page, reports, [report.name for report in reports]):
            choice = Section("Which model to take", words, [first, *rest], [figure], lead=sentence(numbers))
            _write(options, choice, reports)
    return RunReport(
        run,
        list(reports),
        first.aligned(),
        "\n".join([sentence(numbers), *words]),
        [figure.file],
        page,
        run / MODEL,
        CHOICE,
    )


def _write(options: Combine, choice: Section, reports: Sequence[StepReport]) -> None:
    """The page, whose first section is `choice`, and the same in short."""
    run, manifests = options.output, {report.name: report.manifest for report in reports}
    agreement = read_object(run / "changes" / "changes.json") if options.base else None
    sections = [
        choice,
        *([_agreement(agreement, run)] if agreement else []),
        steps_section(manifests),
        provenance_section(manifests),
    ]
    parts = [f"# {choice.lead}", choice.tables[0].markdown().rstrip(), *choice.text]
    write_whole(run / SUMMARY, "\n\n".join(parts) + "\n")
    write_report(run, f"Combination {run.resolve().name}", sections)


def _agreement(numbers: dict[str, Any], run: Path) -> Section:
    """How far the models' changes agree."""
    figure = Figure.load(run / "changes" / "cosine.png")
    return Section("How far the models' changes agree", tables=tables_of(numbers), figures=[figure])


def look_sentence(look: Mapping[str, Any]) -> str:
    """What the members' scores alone say: whether together they know more than the best of them."""
    mean = look["models"][f"{MARK}-mean"]
    lead, best = mean["lead"], look["taken"]
    if lead["low"] > 0:
        said = "Together the models know more than the best of them: a merge can gain"
    elif lead["high"] < 0:
        said = "Together the models know less than the best of them: a merge will hardly gain"
    else:
        said = "Whether together the models know more than the best of them does not show in these pairs"
    return f"{said} (mean of their scores on one scale, minus {best}: {points(lead)})."
