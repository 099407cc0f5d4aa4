"""What is wrong with a recipe whose form is right: each check yields the faults that it finds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from moemerge.artifacts.paths import near_path, reads_like_path
from moemerge.artifacts.scorer_file import scorer_file
from moemerge.artifacts.stage import RECIPE_COPY
from moemerge.errors import CheckpointError, MoemergeError, OptionError, UnsupportedError
from moemerge.models.config_file import LAYERS
from moemerge.models.families import family_called
from moemerge.models.folder import ModelFolder
from moemerge.options.base import Run, input_fields
from moemerge.options.data import DataSettings
from moemerge.options.layers import parse_layers
from moemerge.options.optimise import OptimiseSettings
from moemerge.options.recipe import WITH_INPUTS, Recipe
from moemerge.options.sample import SAMPLED
from moemerge.run.baselines import model_names, optimised, scored_names
from moemerge.run.commands import row_of
from moemerge.run.label_check import label_faults
from moemerge.run.recipe_file import Tree
from moemerge.run.training_check import (
    baseline_faults,
    fault_of,
    has_validation,
    steering_faults,
    training_faults,
    trainings,
    unknown_name,
)

ANY_LAYERS = 10_000  # stands for a model whose number of layers is not known here

Check = Callable[[Recipe], Iterator[MoemergeError]]


def find_faults(recipe: Recipe, dropped: Iterable[str] = ()) -> list[MoemergeError]:
    """Missing inputs, unknown names and contradictions; nothing that depends on one of the `dropped` keys.

    A fault in the value of a dropped key is reported already, and its default would give false ones.
    """
    held_out = {"data", "data.validation", "data.validation_share"}
    checks: dict[Check, set[str]] = {
        _check_sources: {"model", "synthetic", "data", "data.train"},
        _check_files: set(),
        _check_model: {"base"},
        training_faults: held_out,
        label_faults: {"strength", "strength.treat", "base", "control", "train"},
        steering_faults: {"train", "base", "control", "upcycle.shared_expert"},
        _check_fit: held_out | {"data.fit"},
        _check_evaluation: {
            "data",
            "data.tests",
            "data.test_share",
            "data.candidates",
            "control",
            "baselines",
            "baselines.fine_tunes",
            "evaluate.ensembles",
            "evaluate.ensemble_by",
            "also_merge",
        },
        _check_publish: {"publish.repo"},
        baseline_faults: {"control", "strength", "baselines", "data", "data.fit"},
        _check_seeds: {"seeds"},
        _check_policies: {"data", "data.max_length", "data.candidates", "sample", "optimise", "evaluate"},
        _check_output: set(),
    }
    sound = [check for check, keys in checks.items() if not keys & set(dropped)]
    return [fault for check in sound for fault in check(recipe)]


def _check_sources(recipe: Recipe) -> Iterator[MoemergeError]:
    if recipe.synthetic is None:
        if recipe.model is None:
            yield fault_of(
                "no model", "neither model nor synthetic", "one of them", "add model: FOLDER or HUB NAME"
            )
        if recipe.data is None or recipe.data.train is None:
            yield fault_of(
                "no training pairs", "no data.train", "preference pairs", "add data: {train: FILE}"
            )
        return
    if recipe.model is not None:
        yield fault_of("two models", "model and synthetic", "one of them", "take one of the two out")
    files = ", ".join(f"data.{name}" for name in (input_fields(recipe.data) if recipe.data else {}))
    if files:
        yield fault_of("two sources of data", f"synthetic and {files}", "one of them", f"take out {files}")


def _absent(recipe: Recipe | Run) -> dict[str, str]:
    """The inputs that are neither files nor folders here, by the key in the recipe."""
    if not isinstance(recipe, Recipe):
        sources = _sources(input_fields(recipe), row_of(recipe).section)
        return {key: source for key, source in sources.items() if not Path(source).exists()}
    sources = {"model": recipe.model} if recipe.model else {}
    for section, settings in ((name, getattr(recipe, name)) for name in WITH_INPUTS):
        sources |= _sources(input_fields(settings) if settings else {}, section)
    return {key: source for key, source in sources.items() if not Path(source).exists()}


def _sources(inputs: Mapping[str, Any], section: str = "") -> dict[str, str]:
    """What is read, by its key, in a recipe's section if there is one."""
    sources: dict[str, str] = {}
    for field, value in inputs.items():
        listed = dict(enumerate(value)) if isinstance(value, list) else {"": value}
        by_name = value if isinstance(value, dict) else listed
        sources |= {f"{section}.{field}.{name}".strip("."): source for name, source in by_name.items()}
    return sources


def named(option: str, section: str) -> str:
    """The option as the user wrote it: in a recipe it stands in a section."""
    return f"{section}.{option}" if section else option


def missing_inputs(inputs: Mapping[str, Any], section: str = "") -> Iterator[MoemergeError]:
    """A fault for each input that reads like a path and is not there."""
    for key, source in _sources(inputs, section).items():
        if not Path(source).exists() and reads_like_path(source):
            fix = f"{near_path(source)}correct {key}"
            yield fault_of(f"{key} does not exist", source, "an existing file or folder", fix)


def headless(models: Mapping[str, str]) -> Iterator[MoemergeError]:
    """A fault for each model on this disk, by its key, that cannot be opened or has no reward head."""
    for key, source in models.items():
        if not Path(source).is_dir() or scorer_file(source):
            continue
        try:
            model = ModelFolder(source)
            if model.is_base:
                kind = ", ".join(model.architectures)
                fix = "train it first: moemerge train gives it a head"
                yield fault_of(f"{key} has no reward head", f"{source}: {kind}", "a reward model", fix)
        except MoemergeError as fault:
            yield fault


def taken_for_hub_names(recipe: Recipe | Run) -> dict[str, str]:
    """The inputs that will be looked for on the hub, by the key in the recipe."""
    return {key: source for key, source in _absent(recipe).items() if not reads_like_path(source)}


def _check_files(recipe: Recipe) -> Iterator[MoemergeError]:
    """Inputs that read like paths and are not there. Anything else may be a name on the hub."""
    for key, source in _absent(recipe).items():
        if reads_like_path(source):
            fix = f"{near_path(source)}correct {key}, or override it: --set {key}=PATH"
            yield fault_of(f"{key} does not exist", source, "an existing file or folder", fix)


def _local_model(recipe: Recipe) -> ModelFolder | None:
    """The recipe's model, opened, if it is a folder here. Raises as ModelFolder, also without a config."""
    if not recipe.model or not Path(recipe.model).is_dir():
        return None
    model = ModelFolder(recipe.model)
    model.config_json  # noqa: B018 (raises if there is none)
    return model


def _check_model(recipe: Recipe) -> Iterator[MoemergeError]:
    model = None
    try:
        model = _local_model(recipe)
    except MoemergeError as fault:
        yield fault
    if model is not None:
        yield from _check_architecture(recipe, model)
        try:
            model.check_tokenizer()
        except CheckpointError as fault:
            yield fault
    yield from _check_layers(recipe, model.config_json if model else {})


def _check_architecture(recipe: Recipe, model: ModelFolder) -> Iterator[MoemergeError]:
    """Whether it can be upcycled, with that gate, and has a head or is given one."""
    family = None
    if "model_type" in model.config_json:
        try:
            family = family_called(model.dense_type)
        except UnsupportedError as fault:
            yield fault
    if recipe.upcycle.gate == "prompt" and family and not family.causal:
        yield fault_of(
            "gate prompt needs a causal model",
            f"upcycle.gate prompt, model type {model.model_type}",
            "gate xft or topk, because in an encoder the prompt's states see the answer",
            "set upcycle.gate to xft",
        )
    if recipe.base is None and not (model.claims_head or recipe.upcycle.fresh_head):
        yield fault_of(
            "model has no reward head",
            f"{', '.join(model.architectures) or 'no architecture'}, and no section base",
            "a reward model, or a section base that trains one from it",
            "add the section base",
        )


def _check_layers(recipe: Recipe, config: Tree) -> Iterator[MoemergeError]:
    """Layers that the recipe names, against those of the model's config.json, as far as that is known."""
    specs = {f"{name}.train_layers": section.train_layers for name, section in trainings(recipe).items()}
    known = recipe.synthetic.num_layers if recipe.synthetic else ANY_LAYERS
    yield from layer_faults({"upcycle.layers": recipe.upcycle.layers} | specs, config, known)


def layer_faults(specs: Mapping[str, str], config: Tree, known: int = ANY_LAYERS) -> Iterator[MoemergeError]:
    """A fault for each option that names layers which a model lacks; `known`: how many if no config says."""
    layers = next((config[name] for name in LAYERS if config.get(name)), known)
    for key, spec in specs.items():
        try:
            parse_layers(spec, int(layers))
        except OptionError as fault:
            yield fault_of(f"{key}: {fault.what}", fault.given, fault.expected, f"correct {key}")


def _check_fit(recipe: Recipe) -> Iterator[MoemergeError]:
    from moemerge.fitting.methods import FINDS_SHARED, METHODS
    from moemerge.fitting.objectives import OBJECTIVES
    from moemerge.fitting.optimisers import OPTIMISERS

    methods = {"fit.method": recipe.fit.method} | {
        f"also_merge[{i}]": m for i, m in enumerate(recipe.also_merge)
    }
    for key, method in methods.items():
        yield from unknown_name(key, method, METHODS)
    if len(set(methods.values())) < len(methods):
        yield fault_of(
            "a coefficient method is named twice",
            ", ".join(methods.values()),
            "each of fit.method and also_merge once",
            "take the repeated one out of also_merge",
        )
    yield from unknown_name("fit.optimizer", recipe.fit.optimizer, ["auto", *OPTIMISERS])
    for name in recipe.fit.objectives:
        yield from unknown_name("fit.objectives", name, OBJECTIVES)
    if recipe.fit.method not in FINDS_SHARED and recipe.fit.learns_shared:
        yield fault_of(
            f"shared_weight {recipe.fit.shared_weight} contradicts fit.method",
            f"fit.method {recipe.fit.method}, fit.shared_weight {recipe.fit.shared_weight}",
            "method learned, or a number or match for shared_weight",
            "set fit.method to learned, or fit.shared_weight to 0.5",
        )
    fitting = recipe.data and recipe.data.fit
    needy = [method for method in methods.values() if method in FINDS_SHARED]
    if needy and not fitting and not has_validation(recipe):
        yield fault_of(
            f"method {needy[0]} needs fitting pairs",
            "no data.fit, no data.validation, and data.validation_share 0",
            "pairs that were not trained on",
            "set data.fit or data.validation_share, or choose method usage",
        )


def _check_evaluation(recipe: Recipe) -> Iterator[MoemergeError]:
    from moemerge.evaluation.probes import PROBES, expand

    for probe in expand(recipe.evaluate.probes):
        yield from unknown_name("evaluate.probes", probe, PROBES)
    if recipe.evaluate.baseline is not None:
        yield from unknown_name("evaluate.baseline", recipe.evaluate.baseline, scored_names(recipe))
    for name, members in recipe.evaluate.ensembles.items():
        for member in members:
            yield from unknown_name(f"evaluate.ensembles.{name}", member, model_names(recipe))
    data = recipe.data
    tested = data and (data.tests or data.test_share or data.candidates or _benchmarks(recipe))
    if recipe.synthetic is None and data and not (tested or recipe.sample):
        yield fault_of(
            "nothing to evaluate on",
            "no data.tests, no data.candidates, and data.test_share 0",
            "test pairs, candidate sets or RewardBench",
            "set data.tests, data.test_share or evaluate.rewardbench",
        )


def _benchmarks(recipe: Recipe) -> bool:
    return bool(recipe.evaluate.rewardbench or recipe.evaluate.rmbench)


def _check_policies(recipe: Recipe) -> Iterator[MoemergeError]:
    """Answers without gold scores or room, and a candidate set that has the sampled one's name."""
    data = recipe.data or DataSettings()
    if recipe.sample and not (recipe.sample.has_gold or recipe.evaluate.has_gold):
        yield fault_of(
            "sampled answers have no gold scores",
            "sample, without gold_model and gold_function in it or in evaluate",
            "one that grades them",
            "set sample.gold_model or sample.gold_function",
        )
    if recipe.sample and SAMPLED in data.candidates:
        yield fault_of(
            f"two candidate sets are called {SAMPLED}",
            f"data.candidates.{SAMPLED}, and sample",
            "another name",
            f"rename data.candidates.{SAMPLED}",
        )
    if recipe.optimise and recipe.optimise.report_to:
        from moemerge.training.arguments import tracker_faults

        yield from tracker_faults(recipe.optimise.report_to, "optimise.report_to")
    if recipe.optimise and recipe.optimise.refresh:
        yield from _refresh_faults(recipe, recipe.optimise)
    for name, section in {"sample": recipe.sample, "optimise": recipe.optimise}.items():
        if section and section.max_new_tokens >= data.max_length:
            yield fault_of(
                f"{name} leaves no room for a prompt",
                f"{name}.max_new_tokens {section.max_new_tokens}, data.max_length {data.max_length}",
                "answers that are shorter than max_length",
                f"lower {name}.max_new_tokens, or raise data.max_length",
            )


def _refresh_faults(recipe: Recipe, section: OptimiseSettings) -> Iterator[MoemergeError]:
    for name in section.refresh:
        yield from unknown_name("optimise.refresh", name, optimised(recipe))
    if section.refresh_trains == "coefficients":
        yield fault_of(
            "a recipe cannot refresh coefficients",
            "optimise.refresh_trains coefficients; its reward models are merged, and have none",
            "all, head or experts",
            "leave it out, and run moemerge optimise on the MoE by itself",
        )


def _check_publish(recipe: Recipe) -> Iterator[MoemergeError]:
    fault = recipe.publish.missing_repo("publish.")
    if fault is not None:
        yield fault


def _check_seeds(recipe: Recipe) -> Iterator[MoemergeError]:
    if len(set(recipe.seeds)) < len(recipe.seeds) or min(recipe.seeds, default=0) < 0:
        seeds = ", ".join(map(str, recipe.seeds))
        yield fault_of("seeds cannot be run", seeds, "different seeds, none below zero", "correct seeds")


def _check_output(recipe: Recipe) -> Iterator[MoemergeError]:
    yield from occupied(recipe.output)


def occupied(output: Path) -> Iterator[MoemergeError]:
    """The fault of a run's output that is no folder, or holds what no run put there."""
    visible = [path.name for path in output.glob("[!.]*")]
    foreign = bool(visible) and RECIPE_COPY not in visible
    if foreign or (output.exists() and not output.is_dir()):
        fix = "choose another output: --output FOLDER"
        yield fault_of(
            "output is not the folder of a run", output, "a new folder, or that of an earlier run", fix
        )
