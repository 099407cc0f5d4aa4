"""Options of fit."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from moemerge.options.base import (
    COORDINATES,
    SCALE_OF_SUM,
    Coordinates,
    Members,
    Options,
    Run,
    Source,
    Sources,
    TextFormat,
)
from moemerge.options.placement import SHARDED


class FitSettings(Options):
    """Merge coefficients: a row per block for the members, and a weight for the shared one."""

    method: str = Field(
        "learned", description="uniform, usage, usage_chosen, one_hot, learned, grid, least_squares"
    )
    granularity: Literal["layer", "matrix", "group", "global"] = Field(
        "layer",
        description="what shares one set of coefficients: a layer; a matrix with its bias; group: all "
        "MLPs, the rest of all layers (attention, norms), the head, and what is in no layer, "
        "each; global: everything",
    )
    initial: Literal["auto", "uniform", "usage", "usage_chosen", "one_hot"] = Field(
        "auto",
        description="start of the methods that learn; auto: usage if there is routing, else uniform; "
        "usage_chosen: gate mass on chosen answers",
    )
    initial_member: int = Field(0, ge=0, description="one_hot: number of the member that gets all the weight")
    grid: list[float] = Field(
        default_factory=lambda: [step / 20 for step in range(21)],
        description="method grid: the shared weights to try",
    )
    shared_weight: float | Literal["match", "learned", "learned_global"] = Field(
        0.5,
        description="weight of the shared member: a number in [0, 1], match (as in routing), learned (per "
        "block, as granularity says) or learned_global (one for all)",
    )
    coordinates: Coordinates = COORDINATES
    scale: float = Field(
        SCALE_OF_SUM,
        gt=0,
        description="coordinates sum: total of the c at the start; those of the heads sum to one",
    )
    objectives: dict[str, float] = Field(
        default_factory=lambda: {"bradley_terry": 1.0},
        description="what method learned minimises, with weights: bradley_terry, on labels; distillation, to "
        "the MoE's scores; alignment, with each member on its own pairs, without labels",
    )
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=0.5,
        description="bradley_terry: label smoothing, the share of labels assumed to be wrong",
    )
    margin: Literal["none", "column", "strength"] = Field(
        "none",
        description="bradley_terry: margin that chosen must win by: the data's margin column, or the MoE's "
        "(the models' mean) own score difference",
    )
    owners: dict[str, int] = Field(
        default_factory=dict,
        description="for alignment and least_squares, subset=number of the member to which its pairs belong "
        "(default: a MoE's routing decides; to a list of models all pairs belong alike)",
    )
    optimizer: str = Field("auto", description="lbfgs, adam, cma; auto: lbfgs up to 2048 pairs, else adam")
    learning_rate: float = Field(0.05, gt=0, description="of the coefficient logits (Adam)")
    max_epochs: int = Field(
        30, ge=1, description="most passes over the fitting pairs (a generation of cma counts as one)"
    )
    max_pairs: int | None = Field(
        None,
        ge=1,
        description="largest number of fitting pairs, and of held-out ones, drawn at random",
    )
    batch_size: int = Field(32, ge=1, description="pairs per step (Adam)")
    micro_batch_size: int = Field(8, ge=1, description="pairs per forward pass; changes memory, not results")
    kl: float = Field(0.0, ge=0, description="weight of the KL divergence from the initial coefficients")
    l2: float = Field(
        0.0,
        ge=0,
        description="pull towards the start, squared distance: of logits, or of a sum's c (of these in "
        "least_squares too, whose error then counts in units of what one model's change makes of outputs)",
    )
    patience: int = Field(5, ge=1, description="evaluations without improvement before stopping")
    evals_per_epoch: int = Field(4, ge=1, description="evaluations on held-out pairs per epoch (Adam)")
    holdout: float = Field(
        0.3, gt=0, lt=1, description="share of pairs held out when no validation pairs are given"
    )
    folds: int = Field(
        0,
        ge=0,
        description="0, or number of parts: each is held out in turn, and the coefficients are averaged",
    )
    level: float = Field(
        0.05,
        gt=0,
        le=1,
        description="significance level: the initial coefficients are kept unless p on held-out pairs is "
        "below",
    )
    judge: Literal["calibrated", "preferences", "accuracy", "objective"] = Field(
        "calibrated",
        description="criterion on held-out pairs, also for method grid: calibrated, the Bradley-Terry "
        "loss after the best scale factor for each candidate, so that no scale is rewarded; "
        "preferences, that loss as it is; accuracy; objective, what is fitted",
    )
    robust_rounds: int = Field(
        0, ge=0, description="further rounds, with more weight on pairs that the merged model ranks badly"
    )
    robust_temperature: float = Field(
        1.0, gt=0, description="robust_rounds: weights are exp(loss / temperature); wrong labels gain too"
    )
    sensitivity: bool = Field(True, description="report what each layer's coefficients contribute")
    cache_memory: float = Field(
        1.0,
        ge=0,
        description="GB of memory to cache the states of the layers below the first merged one; what "
        "does not fit goes into a file beside output; 0: no cache; the results are the same",
    )

    @model_validator(mode="after")
    def _values_make_sense(self) -> FitSettings:
        if isinstance(self.shared_weight, float) and not 0 <= self.shared_weight <= 1:
            raise ValueError("shared_weight is outside [0, 1]")
        if not self.grid or not all(0 <= value <= 1 for value in self.grid):
            raise ValueError("grid needs one value or more, all in [0, 1]")
        if not self.objectives or not all(value > 0 for value in self.objectives.values()):
            raise ValueError("objectives needs one or more, all with weights above 0")
        if self.folds == 1:
            raise ValueError("folds is 0, or 2 and more")
        if self.coordinates == "sum":
            self._check_sum()
        return self

    def _check_sum(self) -> None:
        """What only averages have."""
        if self.method == "grid" or self.learns_shared or self.kl:
            raise ValueError(
                "coordinates sum has no weight of the shared member, and takes no kl: choose method learned, "
                "least_squares, uniform, usage or one_hot, leave shared_weight out, and use l2"
            )

    @property
    def shares_rows(self) -> bool:
        """Whether blocks of several layers share a row of coefficients."""
        return self.granularity in ("group", "global")

    @property
    def learns_shared(self) -> bool:
        """Whether the shared weight is to be fitted."""
        return self.shared_weight in ("learned", "learned_global")


class Fit(FitSettings, Members, TextFormat, Run):
    """Options of `moemerge fit`."""

    POSITIONAL = ("model", "pairs")

    routing: Source | None = Field(None, description="folder written by route; needed by usage and match")
    pairs: Source | None = Field(None, description="fitting pairs; needed by learned, grid and least_squares")
    validation: Source | None = Field(
        None, description="held-out pairs (default: a share of the fitting pairs)"
    )
    start: Source | None = Field(
        None, description="coefficients of the same members to start from, in place of initial"
    )
    curve: Sources = Field(
        default_factory=dict,
        description="method grid: test pairs, name=file, on which every weight is also measured, by subset",
    )
    candidates: Source | None = Field(
        None, description="robust_rounds: scored candidates, whose overrated answers become pairs"
    )
    sharded: bool = SHARDED

    @model_validator(mode="after")
    def _inputs_fit(self) -> Fit:
        if self.start and self.initial != "auto":
            raise ValueError("start and initial exclude each other: give one of them")
        if self.folds and self.validation:
            raise ValueError("folds are parts of the fitting pairs: give folds or validation, not both")
        if self.curve and self.method != "grid":
            raise ValueError("curve goes with method grid")
        if self.candidates and not self.robust_rounds:
            raise ValueError("candidates need robust_rounds")
        return self
