"""The steps of a recipe, in order, with their options."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from moemerge.fitting.methods import FINDS_SHARED
from moemerge.options.audit import Audit
from moemerge.options.base import Options, Run, TextFormat
from moemerge.options.combine import Combine
from moemerge.options.compare import Compare
from moemerge.options.data import DataSettings
from moemerge.options.fit import FitSettings
from moemerge.options.merge import MergeSettings
from moemerge.options.optimise import OptimiseSettings
from moemerge.options.patch import Patch
from moemerge.options.recipe import Recipe
from moemerge.options.sample import SAMPLED
from moemerge.options.strength import StrengthSettings
from moemerge.options.train import TrainSettings
from moemerge.run import baselines
from moemerge.run.audit import Plan as AuditPlan
from moemerge.run.combine_plan import Plan, with_start
from moemerge.run.patch_plan import every_step
from moemerge.run.steps import Step
from moemerge.stages import OPTIONS

# What the synthetic world writes, as a recipe's section data names it.
WORLD = {
    "train": "train",
    "validation": "validation",
    "tests": {name: f"tests/{name}" for name in ("in_distribution", "out_of_distribution")},
    "candidates": {"wide": "candidates/wide"},
}


def plan(recipe: Recipe | Run) -> list[Step]:
    """The steps of a recipe in order, of a combination up to its choice, of a patch that finds something.

    Reads nothing but, for a combination without base, what its models' manifests name as their start; so the
    recipe must be free of faults.
    """
    if isinstance(recipe, Audit):
        return [*AuditPlan(recipe).steps()]
    if isinstance(recipe, Combine):
        return list(Plan(with_start(recipe)).trials())
    if isinstance(recipe, Patch):
        return every_step(recipe)
    assert isinstance(recipe, Recipe)  # commands.ROWS has no other
    if not recipe.seeds:
        return [Step(name, stage, options) for name, stage, options in _Plan(recipe).steps()]
    runs = by_seed(recipe)
    steps = [replace(step, name=f"{run.output.name}/{step.name}") for run in runs for step in plan(run)]
    comparison = Compare(
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

    def _data_settings(self) -> DataSettings:
        """The recipe's section data; with a synthetic world, pointed at the files of that world."""
        settings = self.recipe.data or DataSettings()
        if self.recipe.synthetic is None:
            return settings
        world = {key: _under(self.output / "synthetic" / "data", value) for key, value in WORLD.items()}
        return settings.model_copy(update=world)

    @property
    def validation(self) -> str | None:
        held_out = self.data.validation or self.data.validation_share
        return self.pairs("validation") if held_out else None

    @property
    def training_pairs(self) -> str:
        """What all models are trained on: treated, if there is a vote on labels."""
        return self.path("strength/pairs.jsonl.gz") if self.recipe.strength else self.pairs("train")

    def fitting(self) -> dict[str, str | None]:
        """Fitting pairs, and held-out pairs if they are others than the fitting pairs."""
        if self.data.fit:
            return {"pairs": self.pairs("fit"), "validation": self.validation}
        return {"pairs": self.validation, "validation": None}

    def step(self, name: str, stage: str, section: Options | None, **added: Any) -> tuple[str, str, Run]:
        """A step's name, stage and options: those of a recipe's section, and what the plan adds."""
        settings = section.model_dump() if section is not None else {}
        fields = {**settings, **self.common, **added, "output": self.output / name}
        return name, stage, OPTIONS.get(stage)(**fields)

    def steps(self) -> Iterator[tuple[str, str, Run]]:
        """All steps in order."""
        recipe = self.recipe
        if recipe.synthetic:
            yield self.step("synthetic", "synthetic", recipe.synthetic)
        yield self.step("data", "data", self.data, tokenizer=self.source, scored=not recipe.evaluate.has_gold)
        if recipe.strength:
            yield self.strength(recipe.strength)
        if recipe.base:
            yield self.train("base", recipe.base, self.source)
        if recipe.control:
            yield self.train("control", recipe.control, self.dense)
        yield self.step("upcycle", "upcycle", recipe.upcycle, model=self.dense, **self.trust)
        yield from self.baselines()
        yield self.train("train", recipe.train, self.path("upcycle"))
        yield self.step(
            "route", "route", recipe.route, **self.format, model=self.moe, pairs=self.training_pairs
        )
        for method in [*recipe.also_merge, recipe.fit.method]:
            yield from self.merged(method)
        if recipe.sample:
            yield self.step("sample", "sample", recipe.sample, **self.read, **self.trust)
        yield self.evaluate()
        if recipe.optimise:
            yield self.optimise(recipe.optimise)
        yield self.publish()

    def train(self, name: str, section: TrainSettings, model: str, **added: Any) -> tuple[str, str, Run]:
        """Training of a dense model or a MoE."""
        added = {"pairs": self.training_pairs, "validation": self.validation} | added
        return self.step(name, "train", section, **self.format, **self.trust, **added, model=model)

    def strength(self, section: StrengthSettings) -> tuple[str, str, Run]:
        """The vote on training pairs; held-out pairs keep their labels, or it would be judged by itself."""
        added = {"pairs": self.pairs("train")}
        trained = {"model": self.source, "validation": self.validation} if section.trains else {}
        return self.step("strength", "strength", section, **self.format, **self.trust, **added, **trained)

    def baselines(self) -> Iterator[tuple[str, str, Run]]:
        """What the MoE is measured against besides the control."""
        for name, section, added in baselines.trainings(self.recipe, self.path):
            start = self.source if name == baselines.UNTREATED_BASE else self.dense
            yield self.train(name, section, **{"model": start} | added)
        if baselines.is_averaged(self.recipe):
            settings = MergeSettings(dtype=self.recipe.merge.dtype)
            members = [self.path(name) for name in baselines.fine_tunes(self.recipe)]
            yield self.step(baselines.WARM, "merge", settings, models=members)
        if self.recipe.baselines.tuned and self.recipe.control:
            added = {"model": self.path("control"), "pairs": self.pairs("fit")}
            # What strength adds to training pairs, fitting pairs do not have.
            control = self.recipe.control
            tuning = baselines.without_columns(control) if self.recipe.strength else control
            yield self.train(baselines.TUNED, baselines.with_the_head_that_is_there(tuning), **added)

    def merged(self, method: str) -> Iterator[tuple[str, str, Run]]:
        """Coefficients by one method, and the merge with them.

        A shared weight that is to be learned has its default in methods that learn nothing.
        """
        added = {"method": method, "model": self.moe, "routing": self.path("route")} | self.fitting()
        settings = self.recipe.fit.model_copy(update={"method": method})
        if method not in FINDS_SHARED and settings.learns_shared:
            settings = settings.model_copy(update={"shared_weight": FitSettings().shared_weight})
        yield self.step(f"fit-{method}", "fit", settings, **self.format, **added)
        added = {"model": self.moe, "coefficients": self.path(f"fit-{method}")}
        yield self.step(f"merge-{method}", "merge", self.recipe.merge, **added)

    def evaluate(self) -> tuple[str, str, Run]:
        """All models on all test and candidate sets."""
        tests = [*self.data.tests, *(["test"] if self.data.test_share else [])]
        candidates = {name: self.path(f"data/candidates/{name}.jsonl.gz") for name in self.data.candidates}
        if self.recipe.sample:
            candidates[SAMPLED] = self.path("sample/candidates.jsonl.gz")
        return self.step(
            "evaluate",
            "evaluate",
            self.recipe.evaluate,
            **self.format,
            **self.trust,
            models=self.models(baselines.model_names(self.recipe)),
            pairs={name: self.pairs(f"tests/{name}") for name in tests},
            candidates=candidates,
            baseline=self.baseline(),
            ensembles=baselines.ensembles(self.recipe),
        )

    def optimise(self, section: OptimiseSettings) -> tuple[str, str, Run]:
        """A policy optimised against the merged model and its dense rival."""
        names = baselines.optimised(self.recipe)
        added = {"models": self.models(names), "baseline": names[0]}
        return self.step("optimise", "optimise", section, **self.read, **self.trust, **added)

    def models(self, names: Iterable[str]) -> dict[str, str]:
        """The folders of models by their names in the report."""
        folders = {"dense": self.dense, "moe": self.moe}
        return {name: folders.get(name, self.path(name)) for name in names}

    def baseline(self) -> str:
        """The model that the others are compared with."""
        return self.recipe.evaluate.baseline or baselines.dense_rival(self.recipe)

    def publish(self) -> tuple[str, str, Run]:
        """The merged model's card, and the push if the recipe asks for it: push: true there is its yes."""
        added = {"model": self.path(f"merge-{self.recipe.fit.method}"), "evaluation": self.path("evaluate")}
        return self.step("publish", "publish", self.recipe.publish, **added, yes=self.recipe.publish.push)


def _under(folder: Path, names: Any) -> Any:
    if isinstance(names, dict):
        return {key: _under(folder, name) for key, name in names.items()}
    return str(folder / f"{names}.jsonl.gz")
