"""Steps of a run: stages that are skipped while their output still fits, in a folder that one run holds."""

from __future__ import annotations

import html
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moemerge.artifacts.checksums import MANIFEST
from moemerge.artifacts.disk import disk_faults, leftovers, parents, recover, write_whole
from moemerge.artifacts.inputs import plain_options
from moemerge.artifacts.lock import hold, lock_of
from moemerge.artifacts.manifest import Manifest, expect_stage, read_manifest
from moemerge.artifacts.progress import PROGRESS, hidden
from moemerge.artifacts.result import Result, data_frame, html_table, picture_html
from moemerge.artifacts.stage import RECIPE_COPY, refuse_added
from moemerge.artifacts.staleness import NOT_MADE, other_versions, why_stale
from moemerge.data.tokenise import writing_below
from moemerge.evaluation.report import outdated
from moemerge.options.audit import Audit
from moemerge.options.base import Run
from moemerge.options.combine import Combine
from moemerge.options.patch import Patch
from moemerge.options.recipe import Recipe
from moemerge.run.headlines import headline
from moemerge.stages import OPTIONS, STAGES

if TYPE_CHECKING:
    import pandas

LOCK = ".lock"
BEAT = 30.0  # seconds
TOLD_BY_RUNS = ("moemerge.artifacts.stage", "moemerge.stages.publish")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Step:
    """One stage of a plan: the name of its folder in the run, the stage's name, what it is called with."""

    name: str
    stage: str
    options: Run


class StepPlan:
    """What the plans of audit, combine and patch share: a step's folder, and options of most steps.

    format: how long texts may be, and what becomes of bad rows.
    """

    def __init__(self, options: Audit | Combine | Patch) -> None:
        self.output = options.output
        self.common = {"seed": options.seed, "threads": options.threads, "device": options.device}
        self.format = {"max_length": options.max_length, "bad_rows": options.bad_rows}

    def path(self, *names: str) -> str:
        """A file or folder of the run."""
        return str(self.output.joinpath(*names))

    def step(self, name: str, stage: str, **fields: Any) -> Step:
        """A step in the folder `name` of the run."""
        return Step(name, stage, OPTIONS.get(stage)(**self.common | fields, output=self.output / name))


@dataclass(frozen=True)
class StepReport:
    """What became of a step: why it ran (None if it was skipped), how long it took, its manifest.

    place: the how manyth it is of how many, such as 3/12. width: letters of the longest name among them.
    """

    name: str
    stage: str
    reason: str | None
    seconds: float
    manifest: Manifest = field(repr=False)
    place: str = "1/1"
    width: int = 14

    @property
    def results(self) -> dict[str, Any]:
        """The stage's results."""
        return dict(self.manifest["results"])


Tell = Callable[[StepReport], None]


@dataclass(frozen=True)
class RunReport:
    """A finished run: folder, what became of each step, final table, pictures and page, the merged model.

    overview: the table as text. shown: the step that it shows.
    """

    output: Path
    steps: list[StepReport] = field(repr=False)
    overview: str = field(repr=False)
    verdict: str
    pictures: list[Path] = field(repr=False)
    page: Path
    merged: Path
    shown: str

    @property
    def path(self) -> Path:
        """The run's folder."""
        return self.output

    @property
    def numbers(self) -> dict[str, dict[str, Any]]:
        """The results of every step."""
        return {step.name: step.results for step in self.steps}

    def rows(self) -> list[dict[str, Any]]:
        """The rows of the final table."""
        return open_result(self.output / self.shown).rows()

    def table(self) -> pandas.DataFrame:
        """The final table as a DataFrame. Raises UnsupportedError where pandas is not installed."""
        return data_frame(self.rows())

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        verdict, page = (f"<p>{html.escape(text)}</p>" for text in (self.verdict, str(self.page)))
        return verdict + "".join(map(picture_html, self.pictures[:1])) + html_table(self.rows()) + page


def open_result(folder: str | os.PathLike) -> Result:
    """The Result of a stage that ran before, from its folder.

    Raises ArtifactError if no stage wrote it.
    """
    stage = expect_stage(Path(folder), *STAGES)["stage"]
    return STAGES.get(stage).opened(Path(folder))


def run_steps(
    steps: Iterable[Step], tell: Tell | None = None, again: str = "", before: int = 0, after: int = 0
) -> Iterator[StepReport]:
    """Do the steps in order, as `run_step` does, and tell of each once it is done (default: by the log).

    `before`, `after`: how many steps of the run are not among these, for counting.
    """
    ordered = [*steps]
    for number, step in enumerate(ordered, before + 1):
        report = run_step(step, again, f"{number}/{before + len(ordered) + after}")
        report = replace(report, width=max(report.width, *(len(each.name) for each in ordered)))
        if tell is not None:
            tell(report)
        elif log.isEnabledFor(logging.INFO):
            log.info("%s", step_line(report))
        yield report


def step_line(step: StepReport) -> str:
    """What became of a step, in one line."""
    what = "skipped" if step.reason is None else f"{step.seconds:.1f} s"
    width = 2 * len(step.place.split("/")[1]) + 3  # of the last one, such as [12/12]
    return f"{f'[{step.place}]':>{width}} {step.name:<{step.width}} {what:>8}  {headline(step.manifest)}"


def keep_recipe(run: Recipe | Run) -> None:
    """Write what a run was started with into its folder, which it makes if need be."""
    run.output.mkdir(exist_ok=True)
    text = json.dumps(plain_options(run), indent=1, ensure_ascii=False)
    write_whole(run.output / RECIPE_COPY, text + "\n")


def run_step(step: Step, again: str = "", place: str = "1/1") -> StepReport:
    """Do the step unless what it wrote still fits; `again`: a reason to do it in any case."""
    started = time.perf_counter()
    output = step.options.output
    reason = again or why_stale(step.stage, step.options) or outdated(output, step.stage)
    if reason is not None:
        log.log(
            logging.DEBUG if reason == NOT_MADE else logging.INFO, "[%s] %s: %s", place, step.name, reason
        )
        run = output.parents[len(Path(step.name).parts) - 1]
        with _one_line(), _sign_of_life(f"[{place}] {step.name}"), writing_below(run):
            STAGES.get(step.stage)(step.options.model_copy(update={"overwrite": True}))
    manifest = read_manifest(step.options.output)
    return StepReport(step.name, step.stage, reason, time.perf_counter() - started, manifest, place)


@contextmanager
def _one_line() -> Iterator[None]:
    """While open, stages do not say what the run's own line on them says; with --verbose they do."""
    loggers = [logging.getLogger(name) for name in TOLD_BY_RUNS]
    levels = {logger: logger.level for logger in loggers if not logger.isEnabledFor(logging.DEBUG)}
    for logger in levels:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


@contextmanager
def _sign_of_life(what: str) -> Iterator[None]:
    """A heading over the progress bars; where they are not seen, as in a file of logs, a line every 30 s."""
    if not hidden():
        log.info("%s", what)
        yield
        return
    done, started, PROGRESS.words = threading.Event(), time.perf_counter(), ""

    def beat() -> None:
        while not done.wait(BEAT):
            log.info("%s: %.0f s so far%s", what, time.perf_counter() - started, PROGRESS.words)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def is_current(page: Path, reports: Iterable[StepReport], steps: Iterable[str]) -> bool:
    """Whether nothing was done, and a run's page was written after all of its steps."""
    if not page.exists() or any(report.reason is not None for report in reports):
        return False
    newest = max((page.parent / step / MANIFEST).stat().st_mtime_ns for step in steps)
    return page.stat().st_mtime_ns > newest


def tell_versions(reports: Iterable[StepReport]) -> None:
    """One line for all steps that other versions of other packages made."""
    kept = [report for report in reports if report.reason is None]
    changes = dict.fromkeys(change for report in kept for change in other_versions(report.manifest))
    if changes:
        log.warning("steps are kept that other versions made: %s", ", ".join(changes))


@contextmanager
def alone(output: Path) -> Iterator[None]:
    """Hold the run's folder; a full or broken disk becomes an ArtifactError."""
    with disk_faults(output), parents(output / LOCK), hold(output / LOCK, output):
        yield


def recover_steps(steps: Iterable[Step]) -> None:
    """Clear away what a killed run left of steps.

    Refuses to run while another process makes a step, and if a step's folder holds a file of the user's.
    """
    for output in (step.options.output for step in steps):
        if leftovers(output):
            with hold(lock_of(output), output):
                recover(output)
        refuse_added(output)
