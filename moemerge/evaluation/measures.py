"""The main numbers of an evaluation, one per model and measure, and differences to the baseline."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from moemerge.evaluation.benchmark_results import BenchmarkPart
from moemerge.evaluation.report import (
    COSTS,
    Report,
    accuracy_sets,
    best_of_n_sets,
    first_parts,
    rewardbench_sets,
    rmbench_sets,
)
from moemerge.evaluation.results import ModelCurves
from moemerge.reports.table import Interval, ends

STYLE_KINDS: tuple[Literal["average", "hard"], ...] = ("average", "hard")  # to see first, of RM-Bench


@dataclass(frozen=True)
class Difference:
    """A model's difference to the baseline in one measure, its paired interval, and its two-sided p."""

    what: str
    value: float
    low: float
    high: float
    p: float

    def __str__(self) -> str:
        return f"{self.value:+.3f} ({self.low:+.3f} to {self.high:+.3f})"


@dataclass(frozen=True)
class Measure:
    """A number of every model on the set `dataset`, and its difference to the baseline for all others.

    title: as tables and verdicts call it. metric, metric_name: as model cards do. cells: the values as a
    table shows them. intervals: those of the values.
    """

    title: str
    dataset: str
    metric: str
    metric_name: str
    values: dict[str, float]
    intervals: dict[str, Interval]
    cells: dict[str, str]
    differences: dict[str, Difference]


def main_measures(report: Report) -> Iterator[Measure]:
    """Accuracy, scores on RewardBench and RM-Bench, and gold scores, in this order."""
    yield from accuracy_measures(report)
    yield from rewardbench_measures(report)
    yield from rmbench_measures(report)
    yield from best_of_n_measures(report)


def model_rows(report: Report) -> Iterator[dict[str, Any]]:
    """A row per model: every main measure with its interval, its difference to the baseline, the cost."""
    for model, facts in report["models"].items():
        row: dict[str, Any] = {"model": model}
        for measure in main_measures(report):
            row |= _with_ends(measure.title, measure.values[model], measure.intervals[model])
            if difference := measure.differences.get(model):
                minus = f"{measure.title} minus {report['baseline']}"
                row |= _with_ends(minus, difference.value, (difference.low, difference.high))
                row[f"{minus} p"] = difference.p
        yield row | {name: facts[name] for name in COSTS}


def _with_ends(name: str, value: float, interval: Interval) -> dict[str, float]:
    return {name: value, f"{name} low": interval[0], f"{name} high": interval[1]}


def differences(report: Report, model: str) -> list[Difference]:
    """All that `model` is compared in with the report's baseline; nothing for the baseline itself."""
    if model == report["baseline"]:
        return []
    return [measure.differences[model] for measure in main_measures(report)]


def over_optimisation_costs(report: Report, model: str) -> Iterator[Difference]:
    """What over-optimisation costs the model more or less than the baseline, where the interval is clear.

    Larger is worse. These have no p.
    """
    for dataset, measured in best_of_n_sets(report).items():
        curves: Mapping[str, Any] = measured["models"].get(model, {})
        for name, title in (("gap_area", "gap"), ("regret_area", "regret")):
            if f"{name}_minus_baseline" in curves:
                found = Difference(f"{title} on {dataset}", *ends(curves, f"{name}_minus_baseline"), math.nan)
                if found.low > 0 or found.high < 0:
                    yield found


def accuracy_measures(report: Report) -> Iterator[Measure]:
    """Accuracy on each test set."""
    for dataset, measured in accuracy_sets(report).items():
        title, models = f"accuracy {dataset}", measured["all"]["models"]
        yield Measure(
            title,
            dataset,
            "accuracy",
            "Accuracy on preference pairs",
            values={model: numbers["accuracy"] for model, numbers in models.items()},
            intervals={model: numbers["interval"] for model, numbers in models.items()},
            cells={m: _with_range(numbers["accuracy"], numbers["interval"]) for m, numbers in models.items()},
            differences={
                model: Difference(title, versus["difference"], *versus["interval"], versus["p"])
                for model in models
                if model != report["baseline"]
                for versus in [models[model]["vs_baseline"]]
            },
        )


def rewardbench_measures(report: Report) -> Iterator[Measure]:
    """The scores of each file of RewardBench that come first (first_parts)."""
    baseline = report["baseline"]
    for dataset, benchmark in rewardbench_sets(report).items():
        version = benchmark["version"]
        for part, numbers in first_parts(benchmark).items():
            title, models = f"RewardBench {version} {dataset}, {part}", numbers["models"]
            yield Measure(
                title,
                dataset,
                f"rewardbench_{version}_score",
                f"RewardBench {version}, {part}",
                values={model: score["score"] for model, score in models.items()},
                intervals={model: score["interval"] for model, score in models.items()},
                cells={m: _with_range(score["score"], score["interval"]) for m, score in models.items()},
                differences={m: _compared(title, numbers, m, baseline) for m in models if m != baseline},
            )


def rmbench_measures(report: Report) -> Iterator[Measure]:
    """The average of each file of RM-Bench, and that where the wrong answer has the richer style."""
    for dataset, measured in rmbench_sets(report).items():
        part = measured["overall"]
        for kind in STYLE_KINDS:
            title = f"RM-Bench {dataset}, {kind}"
            scores = {model: numbers[kind] for model, numbers in part["models"].items()}
            yield Measure(
                title,
                dataset,
                f"rmbench_{kind}",
                f"RM-Bench, {kind}",
                values={model: score["score"] for model, score in scores.items()},
                intervals={model: score["interval"] for model, score in scores.items()},
                cells={m: _with_range(score["score"], score["interval"]) for m, score in scores.items()},
                differences={
                    model: Difference(title, c["difference"], *c["interval"], c["p"])
                    for model, versus in part["vs_baseline"].items()
                    for c in [versus[kind]]
                },
            )


def best_of_n_measures(report: Report) -> Iterator[Measure]:
    """The gold score at the largest n of each candidate set."""
    for dataset, measured in best_of_n_sets(report).items():
        last, models = measured["n"][-1], measured["models"]
        title = f"gold {dataset} at n={last}"
        yield Measure(
            title,
            dataset,
            f"gold_best_of_{last}",
            f"Gold score of the best of {last}",
            values={model: curves["gold"][-1] for model, curves in models.items()},
            intervals={m: (curves["gold_low"][-1], curves["gold_high"][-1]) for m, curves in models.items()},
            cells={model: f"{curves['gold'][-1]:.2f}" for model, curves in models.items()},
            differences={
                model: _at_last_n(title, curves)
                for model, curves in models.items()
                if model != report["baseline"]
            },
        )


def _at_last_n(title: str, curves: ModelCurves) -> Difference:
    value, low, high = (values[-1] for values in ends(curves, "minus_baseline"))
    return Difference(title, value, low, high, curves["minus_baseline_p"])


def _with_range(value: float, interval: Interval) -> str:
    low, high = interval
    return f"{value:.3f} ({low:.3f}-{high:.3f})"


def _compared(title: str, part: BenchmarkPart, model: str, baseline: str) -> Difference:
    """`model` minus `baseline`, from the comparison of the two, which may be the other way round."""
    (comparison,) = [c for c in part["comparisons"] if {c["first"], c["second"]} == {model, baseline}]
    sign = 1 if comparison["first"] == model else -1
    low, high = sorted(sign * end for end in comparison["interval"])
    return Difference(title, sign * comparison["difference"], low, high, comparison["p"])


def main_numbers(report: Report) -> dict[str, Any]:
    """The values of `main_measures` as a manifest keeps them for compare: by kind, set and model.

    A curve's end has the `n` there beside the models.
    """
    numbers: dict[str, Any] = {}
    for dataset, measured in accuracy_sets(report).items():
        models = measured["all"]["models"]
        numbers.setdefault("accuracy", {})[dataset] = {
            m: of_model["accuracy"] for m, of_model in models.items()
        }
    for dataset, curves in best_of_n_sets(report).items():
        last: Mapping[str, float] = {m: curve["gold"][-1] for m, curve in curves["models"].items()}
        numbers.setdefault("best_of_n_gold", {})[dataset] = {"n": curves["n"][-1], **last}
    for dataset, benchmark in rewardbench_sets(report).items():
        parts = first_parts(benchmark).items()
        numbers.setdefault("rewardbench", {})[dataset] = {
            part: {m: score["score"] for m, score in of_part["models"].items()} for part, of_part in parts
        }
    for dataset, styles in rmbench_sets(report).items():
        by_style = styles["overall"]["models"].items()
        numbers.setdefault("rmbench", {})[dataset] = {
            kind: {model: scores[kind]["score"] for model, scores in by_style} for kind in STYLE_KINDS
        }
    return numbers
