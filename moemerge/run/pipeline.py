"""The order of the stages: a recipe becomes a plan of steps; steps that are still valid are skipped."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moemerge.artifacts.checksums import MANIFEST
from moemerge.artifacts.disk import disk_faults, leftovers, parents, recover, write_whole
from moemerge.artifacts.inputs import plain_options
from moemerge.artifacts.lock import hold, lock_of
from moemerge.artifacts.manifest import Manifest, read_manifest, written_by_stages
from moemerge.artifacts.stage import RECIPE_COPY, refuse_added, refuse_several
from moemerge.artifacts.staleness import other_versions, why_stale
from moemerge.errors import Faults
from moemerge.evaluation import main_table as summary
from moemerge.evaluation.report import outdated, read_comparison, read_report
from moemerge.options.recipe import Recipe
from moemerge.run.budget import shortfalls
from moemerge.run.check import load_recipe
from moemerge.run.faults import find_faults
from moemerge.run.plan import Step, by_seed, plan
from moemerge.stages import STAGES

LOCK = ".lock"
SUMMARY, PAGE = "summary.md", "report.html"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepReport:
    """What became of a step: why it ran (None if it was skipped), how long it took, its manifest."""

    name: str
    stage: str
    reason: str | None
    seconds: float
    manifest: Manifest

    @property
    def results(self) -> dict[str, Any]:
        """The stage's results."""
        return dict(self.manifest["results"])


@dataclass(frozen=True)
class RunReport:
    """A finished run: folder, what became of each step, final table, pictures and page, the merged model."""

    output: Path
    steps: list[StepReport]
    table: str
    verdict: str
    pictures: list[Path]
    page: Path
    merged: Path


def run_recipe(
    recipe: Recipe | str | Path,
    overrides: Iterable[str] = (),
    output: str | Path | None = None,
    tell: Callable[[StepReport], None] | None = None,
) -> RunReport:
    """Run every step of a recipe (or of the recipe file) whose output is not valid any more, in order.

    `tell` is called after each step. Raises OptionError or Faults before anything runs if the recipe is
    faulty, ArtifactError if another run is at work in the same folder, and whatever a stage raises.
    A run that was killed goes on where it was when it is started again.
    """
    refuse_several("run")
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, overrides, output)
    elif faults := find_faults(recipe):
        raise Faults("recipe", list(faults))
    for shortfall in shortfalls(recipe):
        log.warning("%s", shortfall)
    steps = plan(recipe)
    with _alone(recipe.output):
        _recover(steps)
        for run in [recipe, *by_seed(recipe)]:
            run.output.mkdir(exist_ok=True)
            text = json.dumps(plain_options(run), indent=1, ensure_ascii=False)
            write_whole(run.output / RECIPE_COPY, text + "\n")
        reports = []
        for step in steps:
            reports.append(_run_step(step))
            if tell is not None:
                tell(reports[-1])
        _tell_versions(reports)
        return finish(recipe, reports)


def _run_step(step: Step) -> StepReport:
    started = time.perf_counter()
    reason = why_stale(step.stage, step.options) or outdated(step.options.output, step.stage)
    if reason is not None:
        log.info("%s starts: %s", step.name, reason)
        STAGES.get(step.stage)(step.options.model_copy(update={"overwrite": True}))
    manifest = read_manifest(step.options.output)
    return StepReport(step.name, step.stage, reason, time.perf_counter() - started, manifest)


def _tell_versions(reports: Iterable[StepReport]) -> None:
    """One line for all steps that other versions of other packages made."""
    kept = [report for report in reports if report.reason is None]
    changes = dict.fromkeys(change for report in kept for change in other_versions(report.manifest))
    if changes:
        log.warning("steps are kept that other versions made: %s", ", ".join(changes))


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
    return RunReport(recipe.output, reports, table, verdict, pictures, page, runs[0].merged)


def _last_word(recipe: Recipe, reports: list[StepReport]) -> RunReport:
    from moemerge.evaluation.verdict import verdict

    report = read_report(recipe.output / "evaluate")
    learned = f"merge-{recipe.fit.method}"
    table, words = summary.table(report), verdict(report, learned)
    write_whole(recipe.output / SUMMARY, f"# Results\n\n{table}\n\n{words}\n")
    pictures = [recipe.output / "evaluate" / name for name in report["plots"]]
    steps = [step.name for step in plan(recipe)]
    page = recipe.output / PAGE
    if any(report.reason is not None for report in reports) or not _is_current(page, steps):
        page = _page(recipe.output, steps, learned)
    return RunReport(recipe.output, reports, table, words, pictures, page, recipe.output / learned)


def _page(run: Path, steps: Sequence[str], learned: str) -> Path:
    from moemerge.run.page import write_run_page

    return write_run_page(run, steps, learned)


def _is_current(page: Path, steps: Sequence[str]) -> bool:
    """Whether the run's page was written after all of its steps."""
    newest = max((page.parent / step / MANIFEST).stat().st_mtime_ns for step in steps)
    return page.exists() and page.stat().st_mtime_ns > newest


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Hold the run's folder; a full or broken disk becomes an ArtifactError."""
    with disk_faults(output), parents(output / LOCK), hold(output / LOCK, output):
        yield


def _recover(steps: Iterable[Step]) -> None:
    """Clear away what a killed run left of steps.

    Refuses to run while another process makes a step, and if a step's folder holds a file of the user's.
    """
    for output in (step.options.output for step in steps):
        if leftovers(output):
            with hold(lock_of(output), output):
                recover(output)
        refuse_added(output)
