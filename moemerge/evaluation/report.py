"""What evaluate and compare write, key by key, and how it is read again: only in this very form.

Imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from typing_extensions import NotRequired, TypedDict

from moemerge.artifacts.json_file import read_object
from moemerge.data.rows import RowSummary
from moemerge.errors import ArtifactError
from moemerge.evaluation.benchmark_results import Benchmark, BenchmarkPart, RewardBench, RMBench, StyleSet
from moemerge.evaluation.probes import BIASES
from moemerge.evaluation.results import (
    Accuracy,
    AccuracySet,
    BestOfN,
    Calibration,
    CandidateCurves,
    Edited,
)
from moemerge.reports.table import Interval

if TYPE_CHECKING:
    from pydantic import TypeAdapter

# Raised whenever something that is read again changes its name or meaning; versions before 2 wrote no number.
FORMAT = 2
NAMES = {"evaluate": "report.json", "compare": "compare.json"}
# What a model costs (models/cost.py counts it), as tables call it.
COSTS: dict[Literal["parameters", "active_parameters", "flops_per_token"], str] = {
    "parameters": "parameters",
    "active_parameters": "active parameters",
    "flops_per_token": "FLOPs per token",
}

# "class" is a word of Python, so this one cannot be written as a class.
ModelFacts = TypedDict(
    "ModelFacts",
    {
        "source": str,
        "class": str,
        "tokens": int,
        "parameters": int,
        "active_parameters": int,
        "flops_per_token": int,
    },
)


class TimedFacts(ModelFacts):
    """The same with the seconds that scoring took; in the manifest only."""

    seconds: float


class SetProtocol(TypedDict):
    """How one set's texts were read; `cut_texts`, of RewardBench, counts those cut for each model."""

    rows: int
    used: int
    bad: dict[str, int]
    longest: int
    text: str
    max_length: int
    truncation: str
    cut_texts: NotRequired[dict[str, int]]


class ModelProtocol(TypedDict):
    """One model's template and special tokens; of one that is asked about answers, the question."""

    chat_template: str | None
    bos: str | None
    eos: str | None
    padding: str
    question: NotRequired[str]


class Protocol(TypedDict):
    """How an evaluation read its texts."""

    sets: dict[str, SetProtocol]
    models: dict[str, ModelProtocol]


class Probes(TypedDict, total=False):
    """The results of the probes that were asked for and had data."""

    accuracy: Accuracy
    calibration: Calibration
    rewardbench: RewardBench
    rmbench: RMBench
    best_of_n: BestOfN
    length: Edited
    style: Edited
    flattery: Edited
    confidence: Edited
    boilerplate: Edited
    irrelevance: Edited
    damage: Edited


# Probes are an open set: the results of one that is not named here are kept as they are.
Probes.__pydantic_config__ = {"extra": "allow"}  # type: ignore[attr-defined]


class Report(TypedDict):
    """report.json of evaluate: the models, one `baseline` among them, measured on the same rows.

    equal_models: groups of models with the same weights, where there are any.
    """

    format: int
    models: dict[str, ModelFacts]
    baseline: str
    gold: str
    rows: dict[str, RowSummary]
    protocol: Protocol
    probes: Probes
    plots: list[str]
    plots_by_probe: dict[str, list[str]]
    equal_models: NotRequired[list[list[str]]]


class SeedNumbers(TypedDict):
    """A measure of one model over seeds; the baseline has no difference, equal differences no interval."""

    mean: float
    sd: float | None
    by_seed: dict[str, float]
    difference: NotRequired[float]
    interval: NotRequired[Interval | None]
    p: NotRequired[float | None]


class SeedGroup(TypedDict):
    """Runs of one recipe: measures and costs by model."""

    title: str
    seeds: list[int]
    runs: list[str]
    baseline: str
    measures: dict[str, dict[str, SeedNumbers]]
    costs: dict[str, dict[str, float]]


class SeedComparison(TypedDict):
    """compare.json of compare."""

    format: int
    confidence: float
    groups: list[SeedGroup]
    plots: list[str]


def read_report(folder: str | Path) -> Report:
    """What evaluate wrote into `folder`. Raises ArtifactError if it is no report of this format."""
    return cast(Report, _read(folder, "evaluate"))


def read_comparison(folder: str | Path) -> SeedComparison:
    """What compare wrote into `folder`. Raises ArtifactError if it is no comparison of this format."""
    return cast(SeedComparison, _read(folder, "compare"))


def _read(folder: str | Path, stage: str) -> Any:
    from pydantic import ValidationError

    path = Path(folder) / NAMES[stage]
    try:
        report = read_object(path)
        if report.get("format") == FORMAT:
            return _forms()[stage].validate_python(report)
        reason = f"format {report.get('format', 'without a number')}"
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"[:200]
    except (OSError, ValueError) as error:
        reason = str(error)
    raise ArtifactError(
        f"{path} cannot be shown by this version of moemerge",
        given=reason,
        expected=f"format {FORMAT}",
        fix=f"{stage} again with this version, or read it with the version in the folder's manifest.json",
    )


@cache
def _forms() -> dict[str, TypeAdapter[Any]]:
    from pydantic import TypeAdapter

    return {"evaluate": TypeAdapter(Report), "compare": TypeAdapter(SeedComparison)}


def outdated(folder: str | Path, stage: str) -> str | None:
    """Why what `stage` wrote into `folder` must be made again; None where all is well."""
    if stage in NAMES:
        try:
            _read(folder, stage)
        except ArtifactError as error:
            return f"its {NAMES[stage]} is of {error.given}, not {error.expected}"
    return None


def accuracy_sets(report: Report) -> dict[str, AccuracySet]:
    """What the probe accuracy measured, by test set; nothing where it was not asked for."""
    accuracy = report["probes"].get("accuracy")
    return accuracy["sets"] if accuracy else {}


def rewardbench_sets(report: Report) -> dict[str, Benchmark]:
    """What the probe rewardbench measured, by file."""
    rewardbench = report["probes"].get("rewardbench")
    return rewardbench["sets"] if rewardbench else {}


def rmbench_sets(report: Report) -> dict[str, StyleSet]:
    """What the probe rmbench measured, by file."""
    rmbench = report["probes"].get("rmbench")
    return rmbench["sets"] if rmbench else {}


def best_of_n_sets(report: Report) -> dict[str, CandidateCurves]:
    """What the probe best_of_n measured, by candidate set."""
    best_of_n = report["probes"].get("best_of_n")
    return best_of_n["sets"] if best_of_n else {}


def edited(report: Report) -> Iterator[Edited]:
    """What the bias probes measured, in the order in which they were asked for."""
    for name, result in report["probes"].items():
        if name in BIASES:
            yield cast(Edited, result)


def confidence(report: Report) -> float | None:
    """The coverage of the report's intervals, the same in all probes; None without probes."""
    results = cast(Mapping[str, Any], report["probes"]).values()
    return next((float(result["confidence"]) for result in results), None)


def first_parts(benchmark: Benchmark) -> dict[str, BenchmarkPart]:
    """The scores to show first: overall ones; of a part of a benchmark its sections, else its subsets."""
    return benchmark["overall"] or benchmark["sections"] or benchmark["subsets"]
