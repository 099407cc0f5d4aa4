"""What the probes rewardbench and rmbench write into report.json; see results.py. Imports nothing heavy."""

from __future__ import annotations

from typing_extensions import NotRequired, TypedDict

from moemerge.reports.table import Interval

# RewardBench


class ModelScore(TypedDict):
    """One model's score; `tied`, of a subset other than Ties, counts rows whose highest score is shared."""

    score: float
    interval: Interval
    tied: NotRequired[int]


class ScoreComparison(TypedDict):
    """`first` minus `second`."""

    first: str
    second: str
    difference: float
    interval: Interval
    p: float


class BenchmarkPart(TypedDict):
    """An overall score, a section or a subset; only subsets have `rows`, and how many are `expected`."""

    models: dict[str, ModelScore]
    always_longer: float
    always_shorter: float
    comparisons: list[ScoreComparison]
    rows: NotRequired[int]
    expected: NotRequired[int | None]


class Benchmark(TypedDict):
    """One file of RewardBench; `missing` names subsets that are not there."""

    version: int
    baseline: str
    overall: dict[str, BenchmarkPart]
    sections: dict[str, BenchmarkPart]
    subsets: dict[str, BenchmarkPart]
    missing: list[str]


class RewardBench(TypedDict):
    """The probe rewardbench."""

    confidence: float
    sets: dict[str, Benchmark]


# RM-Bench


class StyleScores(TypedDict):
    """One model on some rows of RM-Bench.

    matrix: share of rows whose chosen answer of a style (row) scores above the rejected one of a style
    (column); hard: its cells above the diagonal, where the wrong answer has the richer style; normal, easy:
    on and below it. length_correlation: Pearson's, of scores and characters; None where one is constant.
    """

    matrix: list[list[float]]
    hard: ModelScore
    normal: ModelScore
    easy: ModelScore
    average: ModelScore
    length_correlation: float | None


class StylePart(TypedDict):
    """All models on some rows; always_longer, always_shorter: hard, normal, easy, average of that rule."""

    rows: int
    models: dict[str, StyleScores]
    always_longer: dict[str, float]
    always_shorter: dict[str, float]
    vs_baseline: dict[str, dict[str, ScoreComparison]]


class StyleSet(TypedDict):
    """One file of RM-Bench: the mean of its groups of domains, the domains; those that are not there."""

    baseline: str
    overall: StylePart
    domains: dict[str, StylePart]
    missing: list[str]


class RMBench(TypedDict):
    """The probe rmbench."""

    confidence: float
    sets: dict[str, StyleSet]
