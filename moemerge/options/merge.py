"""Options of merge."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from moemerge.options.base import OURS, Contradiction, Members, Options, Run, Source


class MergeSettings(Options):
    """MoE or models + coefficients -> dense reward model of the original architecture."""

    method: str = Field(
        OURS,
        description="routing_normalized_average, our own, or a method of mergekit: linear, ties, "
        "karcher, ...",
    )
    parameters: dict[str, float | bool | str] = Field(
        default_factory=dict,
        description="parameters of a method of mergekit, e.g. density=0.5, the same for all experts",
    )
    dtype: Literal["keep", "float32", "bfloat16", "float16"] = Field(
        "keep", description="dtype of the result; keep: that of the dense model"
    )
    shard_size: int = Field(5_000_000_000, ge=1, description="largest shard in bytes")

    @model_validator(mode="after")
    def _parameters_have_a_method(self) -> MergeSettings:
        if self.method == OURS and self.parameters:
            raise ValueError("parameters go with a method of mergekit; routing_normalized_average takes none")
        return self


class Merge(MergeSettings, Members, Run):
    """Options of `moemerge merge`."""

    POSITIONAL = ("model", "coefficients")

    coefficients: Source | None = Field(
        None, description="folder written by fit; a method of mergekit takes them as its weight"
    )
    weights: list[float] = Field(
        default_factory=list,
        description="with models, in place of coefficients: a weight for each, the base first if there "
        "is one; they need not sum to one (default: equal). With coordinates sum: the c of "
        "each but the base",
    )
    scale: float | None = Field(
        None,
        gt=0,
        description="coordinates sum: total of the c if no weights are given (default: 2, so 2/M for "
        "each of M models)",
    )

    @model_validator(mode="after")
    def _method_has_what_it_needs(self) -> Merge:
        if self.model and self.method == OURS and self.coefficients is None:
            raise Contradiction(
                "method routing_normalized_average needs coefficients, the folder written by fit",
                f"find some, equal ones by moemerge fit --model {self.model} --method uniform --output C; "
                f"then moemerge merge --model {self.model} --coefficients C",
            )
        return self

    @model_validator(mode="after")
    def _weights_fit(self) -> Merge:
        if self.weights and (self.model or self.coefficients):
            raise ValueError("weights go with models, in place of coefficients")
        if self.scale is not None and (self.coordinates != "sum" or self.weights or self.coefficients):
            raise ValueError("scale goes with coordinates sum, in place of weights or coefficients")
        if self.coefficients and (self.coordinates != "average" or self.calibration):
            raise ValueError("coefficients know their coordinates and scales: leave both out")
        count = len(self.models) + (bool(self.base) and self.coordinates == "average")
        if self.weights and len(self.weights) != count:
            raise ValueError(f"weights: {len(self.weights)} for {count} models")
        if self.coordinates == "sum":
            return self
        if self.weights and (min(self.weights) < 0 or not 0 < sum(self.weights) < math.inf):
            raise ValueError("weights must be finite, none below zero and at least one above")
        return self
