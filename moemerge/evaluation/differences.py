"""Differences between two models of an evaluation, over all its measures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from moemerge.evaluation.report import Report, _rewardbench_title, _sets, rewardbench_parts


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


def differences(report: Report, model: str) -> Iterator[Difference]:
    """All that `model` is compared in with the report's baseline; nothing for the baseline itself."""
    if model == report["baseline"]:
        return
    for name, measured in _sets(report, "accuracy").items():
        versus = measured["all"]["models"][model]["vs_baseline"]
        low, high = versus["interval"]
        yield Difference(f"accuracy {name}", versus["difference"], low, high, versus["p"])
    for name, measured in _sets(report, "rewardbench").items():
        for part, numbers in rewardbench_parts(measured).items():
            yield _in_comparisons(
                _rewardbench_title(name, measured, part), numbers, model, report["baseline"]
            )
    for name, measured in _sets(report, "best_of_n").items():
        curve = measured["models"][model]
        value, low, high = (curve[f"minus_baseline{end}"][-1] for end in ("", "_low", "_high"))
        yield Difference(f"gold {name} at n={measured['n'][-1]}", value, low, high, curve["minus_baseline_p"])


def _in_comparisons(what: str, numbers: Mapping[str, Any], model: str, baseline: str) -> Difference:
    """`model` minus `baseline` among the differences of every two models."""
    (one,) = [c for c in numbers["comparisons"] if {c["first"], c["second"]} == {model, baseline}]
    sign = 1 if one["first"] == model else -1
    low, high = sorted(sign * end for end in one["interval"])
    return Difference(what, sign * one["difference"], low, high, one["p"])
