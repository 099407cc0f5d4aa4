"""What must be said before any verdict: models that judge nothing, and models that are one and the same."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

from moemerge.evaluation.report import Report, accuracy_sets
from moemerge.evaluation.results import ModelAccuracy

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
