"""What the probes write into report.json, key by key.

Writers and readers meet in these types: mypy finds a reader of a number that was renamed, and a report that
is read again is held to them (evaluation/report.py). Imports nothing heavy.
"""

from __future__ import annotations

from typing_extensions import NotRequired, TypedDict

from moemerge.reports.table import Interval

# Accuracy on preference pairs


class Paired(TypedDict):
    """A difference of two models on the same pairs; pairs that one alone has right; McNemar's p."""

    difference: float
    interval: Interval
    first_alone: int
    second_alone: int
    p: float


class Comparison(Paired):
    """`first` minus `second`, with Holm's p over the `tests` comparisons that are looked at together."""

    first: str
    second: str
    p_holm: float
    tests: int


class AccuracyVersus(TypedDict):
    """A model minus the baseline."""

    difference: float
    interval: Interval
    right_alone: int
    baseline_right_alone: int
    p: float


class ModelAccuracy(TypedDict):
    """One model on some pairs; a tie is an error, `loss` Bradley-Terry's in nats."""

    accuracy: float
    ties: int
    loss: float
    interval: Interval
    vs_baseline: NotRequired[AccuracyVersus]


class AccuracyPart(TypedDict):
    """All models on some pairs; `always_longer` and `always_shorter` are what the answers' lengths give."""

    pairs: int
    prompts: int
    interval_kind: str
    baseline: str
    models: dict[str, ModelAccuracy]
    comparisons: list[Comparison]
    always_longer: float
    always_shorter: float


class AccuracySet(TypedDict):
    """One test set: `all` its pairs, the sections asked for, its subsets if there are several."""

    all: AccuracyPart
    sections: dict[str, AccuracyPart]
    subsets: dict[str, AccuracyPart]


class Accuracy(TypedDict):
    """The probe accuracy."""

    confidence: float
    sets: dict[str, AccuracySet]


# Calibration


class Slope(TypedDict):
    """The b of sigmoid(b * difference) that fits best."""

    value: float
    interval: Interval


class Diagram(TypedDict):
    """A reliability diagram: per bin that has pairs, their number, mean confidence, share right, its ends."""

    pairs: list[int]
    confidence: list[float]
    right: list[float]
    low: list[float]
    high: list[float]


class BrierVersus(TypedDict):
    """Brier score of a model minus the baseline's."""

    difference: float
    interval: Interval


class CalibrationNumbers(TypedDict):
    """One model on some pairs."""

    brier: float
    brier_interval: Interval
    ece: float
    ece_interval: Interval
    ece_by_chance: float
    vs_baseline: NotRequired[BrierVersus]


class ModelCalibration(CalibrationNumbers):
    """One model on a whole test set; no slope where no finite one is best."""

    slope: Slope | None
    diagram: Diagram


class CalibrationPart(TypedDict):
    """All models on a subset."""

    pairs: int
    prompts: int
    baseline: str
    models: dict[str, CalibrationNumbers]


class CalibrationSet(TypedDict):
    """All models on a test set, and on its subsets but the `small_subsets`."""

    pairs: int
    prompts: int
    baseline: str
    models: dict[str, ModelCalibration]
    subsets: dict[str, CalibrationPart]
    small_subsets: list[str]


class Calibration(TypedDict):
    """The probe calibration."""

    confidence: float
    bins: int
    sets: dict[str, CalibrationSet]


# Best of n


class ModelCurves(TypedDict):
    """Curves over the values of n, then numbers; each with the two ends of its interval.

    alpha, beta and fit_error where there are points enough for a fit. What is a difference or ratio to the
    baseline, the baseline does not have.
    """

    gold: list[float]
    gold_low: list[float]
    gold_high: list[float]
    proxy: list[float]
    proxy_low: list[float]
    proxy_high: list[float]
    gap: list[float]
    gap_low: list[float]
    gap_high: list[float]
    peak_n: float
    peak_n_low: float
    peak_n_high: float
    drop: float
    drop_low: float
    drop_high: float
    gap_area: float
    gap_area_low: float
    gap_area_high: float
    regret_area: float
    regret_area_low: float
    regret_area_high: float
    alpha: NotRequired[float]
    alpha_low: NotRequired[float]
    alpha_high: NotRequired[float]
    beta: NotRequired[float]
    beta_low: NotRequired[float]
    beta_high: NotRequired[float]
    fit_error: NotRequired[float]
    fit_error_low: NotRequired[float]
    fit_error_high: NotRequired[float]
    minus_baseline: NotRequired[list[float]]
    minus_baseline_low: NotRequired[list[float]]
    minus_baseline_high: NotRequired[list[float]]
    minus_baseline_p: NotRequired[float]
    peak_n_over_baseline: NotRequired[float]
    peak_n_over_baseline_low: NotRequired[float]
    peak_n_over_baseline_high: NotRequired[float]
    drop_minus_baseline: NotRequired[float]
    drop_minus_baseline_low: NotRequired[float]
    drop_minus_baseline_high: NotRequired[float]
    gap_area_minus_baseline: NotRequired[float]
    gap_area_minus_baseline_low: NotRequired[float]
    gap_area_minus_baseline_high: NotRequired[float]
    regret_area_minus_baseline: NotRequired[float]
    regret_area_minus_baseline_low: NotRequired[float]
    regret_area_minus_baseline_high: NotRequired[float]
    alpha_minus_baseline: NotRequired[float]
    alpha_minus_baseline_low: NotRequired[float]
    alpha_minus_baseline_high: NotRequired[float]
    beta_minus_baseline: NotRequired[float]
    beta_minus_baseline_low: NotRequired[float]
    beta_minus_baseline_high: NotRequired[float]


class CandidateCurves(TypedDict):
    """One candidate set; `candidates` are the fewest and most that a prompt has."""

    prompts: int
    candidates: list[int]
    n: list[int]
    kl: list[float]
    baseline: str
    references: dict[str, list[float]]
    models: dict[str, ModelCurves]


class BestOfN(TypedDict):
    """The probe best_of_n."""

    confidence: float
    sets: dict[str, CandidateCurves]


# Edited answers


class WorstCase(TypedDict):
    """The pair whose edited answer leads by most, to read."""

    row: int
    lead: float
    prompt: str
    chosen: str
    edited: str


class EffectVersus(TypedDict):
    """A model's effect minus the baseline's."""

    shift: float
    shift_interval: Interval | None
    flipped: float | None
    flipped_interval: Interval | None


class ModelEffect(TypedDict):
    """What an edit does to one model; `flipped` is a share of the `right` pairs, None without any."""

    shift: float
    shift_interval: Interval | None
    right: int
    flipped: float | None
    flipped_interval: Interval | None
    worst: WorstCase
    vs_baseline: NotRequired[EffectVersus]


class EditEffect(TypedDict):
    """What an edit does to every model; no models where no pair could be edited."""

    pairs: int
    prompts: int
    left_out: dict[str, int]
    models: dict[str, ModelEffect]


class LengthVersus(TypedDict):
    """A correlation minus the baseline's."""

    correlation: float
    interval: Interval | None


class ModelLength(TypedDict):
    """How one model's scores go with length; `accuracy` apart by which answer is the longer one."""

    correlation: float
    interval: Interval | None
    accuracy: dict[str, float | None]
    vs_baseline: NotRequired[LengthVersus]


class EditedSet(TypedDict):
    """One test set under a probe's edits; `length`, of the probe of that name, per model."""

    baseline: str
    edits: dict[str, EditEffect]
    length: NotRequired[dict[str, ModelLength]]


class Edited(TypedDict):
    """A probe that edits answers: the `side` that it edits is chosen or rejected."""

    confidence: float
    side: str
    sets: dict[str, EditedSet]
