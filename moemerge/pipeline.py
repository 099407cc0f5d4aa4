"""The order of the stages: a recipe becomes a plan of steps; steps that are still valid are skipped."""

from __future__ import annotations

import importlib.resources
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moemerge import baselines, policy_steps, summary
from moemerge import recipe as options_of
from moemerge.artifacts import RECIPE_COPY, Stage, plain_options, read_manifest, why_stale
from moemerge.budget import shortfalls
from moemerge.check import check_recipe, find_faults, load_recipe, model_names
from moemerge.coefficients import FINDS_SHARED
from moemerge.disk import disk_faults, leftovers, recover, write_whole
from moemerge.errors import Faults, OptionError, suggest
from moemerge.fingerprints import MANIFEST
from moemerge.locks import hold, lock_of
from moemerge.options import Options, Run, TextFormat
from moemerge.recipe import Recipe
from moemerge.registry import Registry
from moemerge.report_file import outdated, read_report

__all__ = ["STAGES", "check_recipe", "load_recipe", "plan", "run_recipe", "templates", "write_template"]

# Every stage by the name in its manifests, in pipeline order.
STAGES: Registry[Stage[Any]] = Registry(
    "stage",
    {
        "synthetic": "moemerge.synthetic:write_world",
        "data": "moemerge.data:prepare",
        "upcycle": "moemerge.upcycle:upcycle",
        "train": "moemerge.train:train",
        "route": "moemerge.route:route",
        "fit": "moemerge.fit:fit",
        "merge": "moemerge.merge:merge",
        "export": "moemerge.export:export",
        "sample": "moemerge.sample:sample",
        "optimise": "moemerge.optimise:optimise",
        "evaluate": "moemerge.evaluate:evaluate",
        "attack": "moemerge.attack:attack",
        "publish": "moemerge.publish:publish",
        "compare": "moemerge.compare:compare",
    },
)
# What the synthetic world writes, as a recipe's section data names it.
WORLD = {
    "train": "train",
    "validation": "validation",
    "tests": {name: f"tests/{name}" for name in ("in_distribution", "out_of_distribution")},
    "candidates": {"wide": "candidates/wide"},
}
LOCK = ".lock"
SUMMARY = "summary.md"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Step:
    """One stage of a plan: the name of its folder in the run, the stage's name, what it is called with."""

    name: str
    stage: str
    options: Run


@dataclass(frozen=True)
class StepReport:
    """What became of a step: why it ran (None if it was skipped), how long it took, what it told."""

    name: str
    stage: str
    reason: str | None
    seconds: float
    results: dict[str, Any]


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
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, overrides, output)
    elif faults := find_faults(recipe):
        raise Faults("recipe", list(faults))
    for shortfall in shortfalls(recipe):
        log.warning("%s", shortfall)
    steps = plan(recipe)
    with _alone(recipe.output):
        _recover(steps)
        for one in [recipe, *by_seed(recipe)]:
            one.output.mkdir(exist_ok=True)
            text = json.dumps(plain_options(one), indent=1, ensure_ascii=False)
            write_whole(one.output / RECIPE_COPY, text + "\n")
        reports = []
        for step in steps:
            reports.append(_run_step(step))
            if tell is not None:
                tell(reports[-1])
        return _finish(recipe, reports)


def _run_step(step: Step) -> StepReport:
    started = time.perf_counter()
    reason = why_stale(step.stage, step.options) or outdated(step.options.output, step.stage)
    if reason is not None:
        log.info("%s starts: %s", step.name, reason)
        STAGES.get(step.stage)(step.options.model_copy(update={"overwrite": True}))
    results = read_manifest(step.options.output)["results"]
    return StepReport(step.name, step.stage, reason, time.perf_counter() - started, results)


def _finish(recipe: Recipe, reports: list[StepReport]) -> RunReport:
    """The last word on a run; on runs with several seeds their comparison has it."""
    if not recipe.seeds:
        return _last_word(recipe, reports)
    from moemerge.verdict import verdict_over_seeds

    runs = [_last_word(one, reports) for one in by_seed(recipe)]
    folder = recipe.output / "compare"
    table = (folder / "compare.md").read_text(encoding="utf-8").strip()
    report = read_report(folder, "compare")
    learned = f"merge-{recipe.fit.method}"
    verdict = verdict_over_seeds(report["groups"][0], learned, report["confidence"])
    pictures = [folder / name for name in report["plots"]]
    page = folder / "report.html"
    return RunReport(recipe.output, reports, table, verdict, pictures, page, runs[0].merged)


def _last_word(recipe: Recipe, reports: list[StepReport]) -> RunReport:
    from moemerge.verdict import verdict

    report = read_report(recipe.output / "evaluate")
    learned = f"merge-{recipe.fit.method}"
    table, words = summary.table(report), verdict(report, learned)
    write_whole(recipe.output / SUMMARY, f"# Results\n\n{table}\n\n{words}\n")
    pictures = [recipe.output / "evaluate" / name for name in report.get("plots", [])]
    page = _page(recipe.output, [step.name for step in plan(recipe)], learned)
    return RunReport(recipe.output, reports, table, words, pictures, page, recipe.output / learned)


def _page(run: Path, steps: Sequence[str], learned: str) -> Path:
    """The run's page, written again when it is older than a step."""
    from moemerge.run_page import PAGE, write_run_page

    page = run / PAGE
    newest = max((run / step / MANIFEST).stat().st_mtime_ns for step in steps)
    if page.exists() and page.stat().st_mtime_ns > newest:
        return page
    return write_run_page(run, steps, learned)


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Hold the run's folder; a full or broken disk becomes an ArtifactError."""
    with disk_faults(output):
        output.mkdir(parents=True, exist_ok=True)
        with hold(output / LOCK, output):
            yield


def _recover(steps: Iterable[Step]) -> None:
    """Clear away what a killed run left of steps, and refuse to run while another process makes one."""
    for output in (step.options.output for step in steps):
        if leftovers(output):
            with hold(lock_of(output), output):
                recover(output)


def plan(recipe: Recipe) -> list[Step]:
    """The steps of a recipe in order. Reads nothing, so the recipe must be free of faults."""
    if not recipe.seeds:
        return [Step(name, stage, options) for name, stage, options in _Plan(recipe).steps()]
    runs = by_seed(recipe)
    steps = [replace(step, name=f"{run.output.name}/{step.name}") for run in runs for step in plan(run)]
    comparison = options_of.Compare(
        runs=[str(run.output / "evaluate") for run in runs],
        baseline=_Plan(recipe).baseline(),
        confidence=recipe.evaluate.confidence,
        output=recipe.output / "compare",
    )
    return [*steps, Step("compare", "compare", comparison)]


def by_seed(recipe: Recipe) -> list[Recipe]:
    """The recipes of the runs that a recipe with `seeds` stands for, one folder in its output per seed."""
    changes = [{"seed": seed, "seeds": [], "output": recipe.output / f"seed-{seed}"} for seed in recipe.seeds]
    return [recipe.model_copy(update=change) for change in changes]


class _Plan:
    """The paths and options that the steps of one recipe share."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.output = recipe.output
        self.common = {"seed": recipe.seed, "threads": recipe.threads, "device": recipe.device}
        self.trust = {"trust_remote_code": recipe.trust_remote_code}
        self.data = self._data_settings()
        self.source = str(self.output / "synthetic" / "model") if recipe.synthetic else str(recipe.model)
        self.dense = self.path("base") if recipe.base else self.source
        self.moe = self.path("train")
        self.format = TextFormat(bad_rows=self.data.bad_rows, max_length=self.data.max_length).model_dump()
        self.read = {**self.format, "fields": self.data.fields}  # of files that the step data doesn't rewrite

    def path(self, name: str) -> str:
        return str(self.output / name)

    def pairs(self, name: str) -> str:
        return self.path(f"data/{name}.jsonl.gz")

    def _data_settings(self) -> options_of.DataSettings:
        """The recipe's section data; with a synthetic world, pointed at the files of that world."""
        settings = self.recipe.data or options_of.DataSettings()
        if self.recipe.synthetic is None:
            return settings
        world = {key: _under(self.output / "synthetic" / "data", value) for key, value in WORLD.items()}
        return settings.model_copy(update=world)

    @property
    def validation(self) -> str | None:
        given = self.data.validation or self.data.validation_share
        return self.pairs("validation") if given else None

    def fitting(self) -> dict[str, str | None]:
        """Fitting pairs, and held-out pairs if they are others than the fitting pairs."""
        if self.data.fit:
            return {"pairs": self.pairs("fit"), "validation": self.validation}
        return {"pairs": self.validation, "validation": None}

    def step(self, name: str, stage: str, section: Options | None, **given: Any) -> tuple[str, str, Run]:
        """A step's name, stage and options: those of a recipe's section, and what the plan adds."""
        kind = getattr(options_of, stage.capitalize())
        settings = section.model_dump() if section is not None else {}
        fields = {**settings, **self.common, **given, "output": self.output / name}
        return name, stage, kind(**fields)

    def steps(self) -> Iterator[tuple[str, str, Run]]:
        """All steps in order."""
        recipe = self.recipe
        if recipe.synthetic:
            yield self.step("synthetic", "synthetic", recipe.synthetic)
        yield self.step("data", "data", self.data, tokenizer=self.source, scored=not recipe.evaluate.has_gold)
        if recipe.base:
            yield self.train("base", recipe.base, self.source)
        if recipe.control:
            yield self.train("control", recipe.control, self.dense)
        yield self.step("upcycle", "upcycle", recipe.upcycle, model=self.dense, **self.trust)
        yield from self.baselines()
        yield self.train("train", recipe.train, self.path("upcycle"))
        yield self.step(
            "route", "route", recipe.route, **self.format, model=self.moe, pairs=self.pairs("train")
        )
        for method in [*recipe.also_merge, recipe.fit.method]:
            yield from self.merged(method)
        if recipe.sample:
            yield self.step("sample", "sample", recipe.sample, **self.read, **self.trust)
        yield self.evaluate()
        if recipe.optimise:
            yield self.optimise(recipe.optimise)
        yield self.publish()

    def train(
        self, name: str, section: options_of.TrainSettings, model: str, **given: Any
    ) -> tuple[str, str, Run]:
        """Training of a dense model or a MoE."""
        given = {"pairs": self.pairs("train"), "validation": self.validation} | given
        return self.step(name, "train", section, **self.format, **self.trust, **given, model=model)

    def baselines(self) -> Iterator[tuple[str, str, Run]]:
        """What the MoE is measured against besides the control."""
        for name, section, given in baselines.trainings(self.recipe, self.path("upcycle")):
            yield self.train(name, section, self.dense, **given)
        if baselines.is_averaged(self.recipe):
            settings = options_of.MergeSettings(dtype=self.recipe.merge.dtype)
            members = [self.path(name) for name in baselines.fine_tunes(self.recipe)]
            yield self.step(baselines.WARM, "merge", settings, models=members)
        if self.recipe.baselines.tuned and self.recipe.control:
            given = {"model": self.path("control"), "pairs": self.pairs("fit")}
            yield self.train(baselines.TUNED, self.recipe.control, **given)

    def merged(self, method: str) -> Iterator[tuple[str, str, Run]]:
        """Coefficients by one method, and the merge with them.

        A shared weight that is to be learned has its default in methods that learn nothing.
        """
        given = {"method": method, "model": self.moe, "routing": self.path("route")} | self.fitting()
        settings = self.recipe.fit.model_copy(update={"method": method})
        if method not in FINDS_SHARED and settings.learns_shared:
            settings = settings.model_copy(update={"shared_weight": options_of.FitSettings().shared_weight})
        yield self.step(f"fit-{method}", "fit", settings, **self.format, **given)
        given = {"model": self.moe, "coefficients": self.path(f"fit-{method}")}
        yield self.step(f"merge-{method}", "merge", self.recipe.merge, **given)

    def evaluate(self) -> tuple[str, str, Run]:
        """All models on all test and candidate sets."""
        tests = [*self.data.tests, *(["test"] if self.data.test_share else [])]
        candidates = {name: self.path(f"data/candidates/{name}.jsonl.gz") for name in self.data.candidates}
        if self.recipe.sample:
            candidates[policy_steps.SAMPLED] = self.path("sample/candidates.jsonl.gz")
        return self.step(
            "evaluate",
            "evaluate",
            self.recipe.evaluate,
            **self.format,
            **self.trust,
            models=self.models(model_names(self.recipe)),
            pairs={name: self.pairs(f"tests/{name}") for name in tests},
            candidates=candidates,
            baseline=self.baseline(),
            ensembles=baselines.ensembles(self.recipe),
        )

    def optimise(self, section: options_of.OptimiseSettings) -> tuple[str, str, Run]:
        """A policy optimised against the merged model and its dense rival."""
        names = policy_steps.optimised(self.recipe)
        given = {"models": self.models(names), "baseline": names[0]}
        return self.step("optimise", "optimise", section, **self.read, **self.trust, **given)

    def models(self, names: Iterable[str]) -> dict[str, str]:
        """The folders of models by their names in the report."""
        places = {"dense": self.dense, "moe": self.moe}
        return {name: places.get(name, self.path(name)) for name in names}

    def baseline(self) -> str:
        """The model that the others are compared with."""
        return self.recipe.evaluate.baseline or baselines.dense_rival(self.recipe)

    def publish(self) -> tuple[str, str, Run]:
        """The merged model's card, and the push if the recipe asks for it: push: true there is its yes."""
        given = {"model": self.path(f"merge-{self.recipe.fit.method}"), "evaluation": self.path("evaluate")}
        return self.step("publish", "publish", self.recipe.publish, **given, yes=self.recipe.publish.push)


def _under(folder: Path, names: Any) -> Any:
    if isinstance(names, dict):
        return {key: _under(folder, name) for key, name in names.items()}
    return str(folder / f"{names}.jsonl.gz")


def templates() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    installed = Path(str(importlib.resources.files("moemerge"))) / "merge_configs"
    folder = installed if installed.is_dir() else Path(__file__).parent.parent / "merge_configs"
    return {path.stem: path for path in sorted(folder.glob("*.yml"))}


def write_template(path: str | Path, name: str = "quickstart") -> Path:
    """Write the commented recipe `name` to `path`. OptionError for an unknown name or an existing file."""
    known, path = templates(), Path(path)
    if name not in known:
        fix = suggest(name, known)
        raise OptionError("unknown template", given=name, expected=f"one of: {', '.join(known)}", fix=fix)
    if path.exists():
        raise OptionError(
            "file exists already",
            given=str(path),
            expected="a new file",
            fix="choose another name or remove it",
        )
    with disk_faults(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, known[name].read_text(encoding="utf-8"))
    return path
