"""The page of a patch: whether it helps, first against edits that it was not made of; then at what cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moemerge.artifacts.disk import write_whole
from moemerge.artifacts.json_file import read_object
from moemerge.artifacts.manifest import written_by_stages
from moemerge.evaluation import main_table
from moemerge.evaluation.report import read_report
from moemerge.evaluation.robustness import tables
from moemerge.evaluation.verdict import standing
from moemerge.reports.figures import Figure
from moemerge.reports.html import Section, write_report
from moemerge.reports.provenance import provenance_section
from moemerge.reports.table import Table
from moemerge.run.page import steps_section
from moemerge.run.patch_plan import BEFORE, COMPARED, EVALUATION, PATCHED, UNSEEN, WORDS, Plan
from moemerge.run.steps import RunReport, StepReport, is_current

SUMMARY, PAGE = "summary.md", "report.html"


def write_pages(plan: Plan, reports: Sequence[StepReport]) -> RunReport:
    """Write report.html, report.md and summary.md into the run's folder, unless nothing has changed.

    Raises ArtifactError for results that no stage wrote.
    """
    run = plan.output
    fix = "remove the folders of the steps that you have not made yourself, then run the command again"
    with written_by_stages(f"what the steps of {run} wrote cannot be shown", fix):
        sections = _compared(plan) if plan.rounds else [_nothing(plan)]
        lead = sections[0].lead
        if not is_current(run / PAGE, reports, [report.name for report in reports]):
            _write(plan, sections, reports)
    first = sections[0].tables[0]
    return RunReport(
        run,
        list(reports),
        first.aligned(),
        "\n".join([lead, *sections[0].text]),
        [figure.file for section in sections for figure in section.figures],
        run / PAGE,
        run / plan.model_of(PATCHED, plan.rounds),
        f"{UNSEEN}/{COMPARED}" if plan.rounds else f"{UNSEEN}/{BEFORE}",
    )


def _write(plan: Plan, sections: Sequence[Section], reports: Sequence[StepReport]) -> None:
    run, manifests = plan.output, {report.name: report.manifest for report in reports}
    parts = [f"# {sections[0].lead}", sections[0].tables[0].markdown().rstrip(), *sections[0].text]
    write_whole(run / SUMMARY, "\n\n".join(parts) + "\n")
    more = [steps_section(manifests), provenance_section(manifests)]
    write_report(run, f"Patch {run.resolve().name}", [*sections, *more])


def _nothing(plan: Plan) -> Section:
    """The section of a run in which no attack on the training pairs succeeded."""
    rows = []
    for kind in (UNSEEN, plan.own):
        report = read_object(plan.output / kind / BEFORE / "report.json")
        rows.append([WORDS[kind], str(report["attacked"]), f"{report['success_rate']:.1%}"])
    table = Table("Attacks on other pairs", ["by", "attacked", "overturned"], rows)
    lead = (
        "There is nothing to patch: no attack on the training pairs succeeded. "
        f"The model stays as it is: {plan.options.model}"
    )
    return Section("Patch", [], [table], lead=lead)


def _compared(plan: Plan) -> list[Section]:
    """What the patch does to edits that it has not, to attacks of its own kind, and to accuracy."""
    kinds = (UNSEEN, plan.own)
    numbers = {kind: read_object(plan.output / kind / COMPARED / "robustness.json") for kind in kinds}
    evaluated = read_report(plan.output / EVALUATION)
    words = [sentence(numbers[kind], WORDS[kind]) for kind in kinds]
    words.append(standing(evaluated))
    sections: list[Section] = []
    for kind in kinds:
        figure = Figure.load(plan.output / kind / COMPARED / "robustness.png")
        title = f"Attacked by {WORDS[kind]}"
        lead, *text = words if not sections else ("",)
        sections.append(Section(title, text, tables(numbers[kind]), [figure], lead=lead))
    accuracy = Table("", *main_table.main_table(evaluated))
    return [*sections, Section("Accuracy on the test pairs", tables=[accuracy])]


def sentence(numbers: Mapping[str, Any], words: str) -> str:
    """How many of the right verdicts fall, before and after, and what of it the rivals have too."""
    models = numbers["models"]
    fall = {name: f"{model['overturned']['value']:.1%}" for name, model in models.items()}
    rivals = [name for name in models if name not in (BEFORE, PATCHED)]
    beside = f" ({', '.join(f'{name}: {fall[name]}' for name in rivals)})" if rivals else ""
    leads = [_lead(models[PATCHED]["minus"][name], name) for name in (BEFORE, *rivals)]
    return (
        f"By {words}, {fall[BEFORE]} of right verdicts are overturned before and {fall[PATCHED]} after"
        f"{beside}; robust accuracy of the patched model: {'; '.join(leads)}."
    )


def _lead(minus: Mapping[str, Any], name: str) -> str:
    value, low, high = (100 * minus["robust_accuracy"][end] for end in ("value", "low", "high"))
    return f"{value:+.1f} points ({low:+.1f} to {high:+.1f}) on {name}"
