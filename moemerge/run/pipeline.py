"""The order of the stages: a recipe becomes a plan of steps; steps that are still valid are skipped."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

from moemerge.artifacts.disk import write_whole
from moemerge.artifacts.manifest import written_by_stages
from moemerge.artifacts.ranks import refuse_several
from moemerge.errors import Faults
from moemerge.evaluation import main_table as summary
from moemerge.evaluation.report import read_comparison, read_report
from moemerge.options.recipe import Recipe
from moemerge.run.budget import shortfalls
from moemerge.run.check import load_recipe
from moemerge.run.commands import FUNCTIONS, row_of
from moemerge.run.faults import find_faults
from moemerge.run.plan import by_seed, plan
from moemerge.run.steps import (
    RunReport,
    StepReport,
    Tell,
    alone,
    is_current,
    keep_recipe,
    recover_steps,
    run_steps,
    tell_versions,
)

SUMMARY, PAGE = "summary.md", "report.html"

log = logging.getLogger(__name__)


def run_recipe(
    recipe: Recipe | str | Path,
    overrides: Iterable[str] = (),
    output: str | Path | None = None,
    tell: Tell | None = None,
) -> RunReport:
    """Run every step of a recipe (or of the recipe file) whose output is not valid any more, in order.

    `tell` is called after each step. Raises OptionError or Faults before anything runs if the recipe is
    faulty, ArtifactError if another run is at work in the same folder, and whatever a stage raises.
    A run that was killed goes on where it was when it is started again.
    """
    refuse_several("run")
    if not isinstance(recipe, Recipe):
        loaded = load_recipe(recipe, overrides, output)
        if not isinstance(loaded, Recipe):
            return FUNCTIONS.get(row_of(loaded).name)(loaded, tell=tell)
        recipe = loaded
    elif faults := find_faults(recipe):
        raise Faults("recipe", list(faults))
    for shortfall in shortfalls(recipe):
        log.warning("%s", shortfall)
    steps = plan(recipe)
    with alone(recipe.output):
        recover_steps(steps)
        for run in [recipe, *by_seed(recipe)]:
            keep_recipe(run)
        reports = [*run_steps(steps, tell)]
        tell_versions(reports)
        return finish(recipe, reports)


def finish(recipe: Recipe, reports: list[StepReport]) -> RunReport:
    """The report of a run whose steps are done, and its summary and page.

    Raises ArtifactError for manifests, reports and plots that no stage wrote.
    """
    fix = "remove the folders of the steps that you have not made yourself, then run the recipe again"
    with written_by_stages(f"what the steps of {recipe.output} wrote cannot be shown", fix):
        return _report(recipe, reports)


def _report(recipe: Recipe, reports: list[StepReport]) -> RunReport:
    """The report of a run: of one seed by its evaluation, of several by their comparison."""
    if not recipe.seeds:
        return _last_word(recipe, reports)
    from moemerge.evaluation.verdict import verdict_over_seeds

    runs = [_last_word(run, reports) for run in by_seed(recipe)]
    folder = recipe.output / "compare"
    table = (folder / "compare.md").read_text(encoding="utf-8").strip()
    report = read_comparison(folder)
    learned = f"merge-{recipe.fit.method}"
    verdict = verdict_over_seeds(report["groups"][0], learned, report["confidence"])
    pictures = [folder / name for name in report["plots"]]
    page = folder / "report.html"
    merged, shown = runs[0].merged, folder.name
    return RunReport(recipe.output, reports, table, verdict, pictures, page, merged, shown)


def _last_word(recipe: Recipe, reports: list[StepReport]) -> RunReport:
    from moemerge.evaluation.verdict import verdict

    report = read_report(recipe.output / "evaluate")
    learned = f"merge-{recipe.fit.method}"
    table, words = summary.table(report), verdict(report, learned)
    write_whole(recipe.output / SUMMARY, f"# Results\n\n{table}\n\n{words}\n")
    pictures = [recipe.output / "evaluate" / name for name in report["plots"]]
    steps = [step.name for step in plan(recipe)]
    page = recipe.output / PAGE
    if not is_current(page, reports, steps):
        page = _page(recipe.output, steps, learned)
    merged = recipe.output / learned
    return RunReport(recipe.output, reports, table, words, pictures, page, merged, "evaluate")


def _page(run: Path, steps: Sequence[str], learned: str) -> Path:
    from moemerge.run.page import write_run_page

    return write_run_page(run, steps, learned)
