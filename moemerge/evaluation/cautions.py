"""What must be said before any verdict: models that judge nothing, and models that are one and the same."""

from __future__ import annotations

from collections.abc import Container, Mapping, Set
from typing import Any, cast

from moemerge.evaluation.report import Probes, Report, accuracy_sets
from moemerge.evaluation.results import ModelAccuracy

# Keys of probes' results whose values are mappings by model.
BY_MODEL = ("models", "vs_baseline", "length")
ALL_TIES = "the same score for both answers of every pair"


def cautions(report: Report, models: Container[str]) -> list[str]:
    """Sentences on those of `models` that tie on every pair of a set, and on those with equal weights."""
    tied: dict[str, list[str]] = {}
    for name, measured in accuracy_sets(report).items():
        part = measured["all"]
        for model, numbers in part["models"].items():
            if model in models and judges_nothing(numbers, part["pairs"]):
                tied.setdefault(model, []).append(name)
    sentences = [
        f"{model} gives {ALL_TIES} of {', '.join(sets)}: it judges nothing." for model, sets in tied.items()
    ]
    for names in report.get("equal_models", []):
        first, *others = [name for name in names if name in models] or [""]
        if others:
            are = "are" if others[1:] else "is"
            sentences.append(f"{', '.join(others)} {are} {first}: the same weights, byte for byte.")
    return sentences


def first_of_equals(report: Report) -> dict[str, list[str]]:
    """The models that differ, each with those that are the same; of these the baseline comes first."""
    alike = report.get("equal_models", [])
    groups = {name: [name] for name in report["models"] if not any(name in names for names in alike)}
    for names in alike:
        ordered = sorted(names, key=lambda name: name != report["baseline"])
        groups[ordered[0]] = ordered
    return {name: groups[name] for name in report["models"] if name in groups}


def without_copies(report: Report) -> Probes:
    """The probes' results with one of each group of equal models, as tables and plots show them."""
    copies = report["models"].keys() - first_of_equals(report).keys()
    return cast(Probes, _pruned(report["probes"], copies)) if copies else report["probes"]


def _pruned(found: Any, copies: Set[str]) -> Any:
    """`found` without what is said of `copies`: in mappings by model, and comparisons of two models."""
    if isinstance(found, list):
        return [_pruned(one, copies) for one in found if not (isinstance(one, dict) and _of(one) & copies)]
    if not isinstance(found, dict):
        return found
    kept = {
        key: {name: of for name, of in value.items() if name not in copies} if key in BY_MODEL else value
        for key, value in found.items()
    }
    return {key: _pruned(value, copies) for key, value in kept.items()}


def _of(comparison: Mapping[str, Any]) -> set[Any]:
    return {comparison[side] for side in ("first", "second") if isinstance(comparison.get(side), str)}


def judges_nothing(numbers: ModelAccuracy, pairs: int) -> bool:
    """Whether all pairs are ties, which accuracy counts as errors."""
    return numbers["ties"] == pairs > 0


def equal_models(inputs: Mapping[str, Any]) -> list[list[str]]:
    """Names of models whose weight files and config.json have equal checksums, group by group.

    Scorers made of other models are equal as a whole.

    inputs: what a manifest records of each model folder (fingerprints).
    """
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, record in inputs.items():
        files = record.get("files", {})
        deciding = sorted(file for file in files if file.endswith(".safetensors") or file == "config.json")
        if deciding:
            key = tuple(files[file]["sha256"] for file in deciding)
            groups.setdefault((record["sha256"],) if "sources" in record else key, []).append(name)
    return [names for names in groups.values() if len(names) > 1]
