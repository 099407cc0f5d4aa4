"""Options of choose."""

from __future__ import annotations

from pydantic import Field, model_validator

from moemerge.options.base import Run, SourceList, Sources, TextFormat


class ChooseSettings(TextFormat):
    """When a costlier model is taken, and how surely its numbers are known."""

    level: float = Field(
        0.05,
        gt=0,
        lt=1,
        description="significance level: a costlier candidate is taken only if it is better with p "
        "below this",
    )
    confidence: float = Field(0.95, gt=0, lt=1, description="coverage of intervals")
    resamples: int = Field(2000, ge=100, le=100_000, description="bootstrap resamples for the intervals")


class Choose(ChooseSettings, Run):
    """Options of `moemerge choose`."""

    POSITIONAL = ("evaluations", "pairs")

    evaluations: SourceList = Field(description="folders written by evaluate on the parts")
    pairs: Sources = Field(
        description="held-out parts of the data, named as in the evaluations; no candidate was made from "
        "the part on which it is scored"
    )
    ranks: dict[str, int] = Field(
        description="the candidates and the cost rank of each: name=0 for the simplest; other models in "
        "the evaluations are shown, but never taken"
    )
    notes: dict[str, str] = Field(
        default_factory=dict, description="a few words on each candidate, for the report"
    )

    @model_validator(mode="after")
    def _something_to_choose(self) -> Choose:
        if not self.evaluations or not self.pairs or not self.ranks:
            raise ValueError("evaluations, pairs and ranks: give one of each at least")
        return self
