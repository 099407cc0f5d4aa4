"""Options of calibrate."""

from __future__ import annotations

from pydantic import Field, model_validator

from moemerge.options.base import Run, Source, Sources, TextFormat
from moemerge.options.placement import Placement


class Calibrate(TextFormat, Placement, Run):
    """Options of `moemerge calibrate`."""

    POSITIONAL = ("models", "pairs")

    models: Sources = Field(description="folders or hub names; without name= each has the name of its folder")
    pairs: Source = Field(description="two answers per prompt; the labels are not used")
    max_pairs: int | None = Field(
        None, ge=1, description="number of pairs to use, the first ones (default: all)"
    )
    batch_tokens: int = Field(8192, ge=1, description="tokens per forward pass")
    resamples: int = Field(1000, ge=100, le=100_000, description="bootstrap resamples for the intervals")
    confidence: float = Field(0.95, gt=0, lt=1, description="coverage of intervals")

    @model_validator(mode="after")
    def _some_models(self) -> Calibrate:
        if not self.models:
            raise ValueError("models: give one at least")
        return self
