"""Options of robustness."""

from __future__ import annotations

from pydantic import Field, model_validator

from moemerge.options.base import Run, Sources


class Robustness(Run):
    """Options of `moemerge robustness`."""

    POSITIONAL = ("attacks",)

    attacks: Sources = Field(
        description="folders written by attack, of two models or more, all on the same pairs and by the same "
        "options"
    )
    baseline: str | None = Field(
        None, description="the model that the others are compared with (default: the first)"
    )
    confidence: float = Field(0.95, gt=0, lt=1, description="coverage of intervals")
    resamples: int = Field(2000, ge=100, le=100_000, description="bootstrap resamples")

    @model_validator(mode="after")
    def _something_to_compare(self) -> Robustness:
        if len(self.attacks) < 2:
            raise ValueError("attacks: those of two models or more")
        if self.baseline is not None and self.baseline not in self.attacks:
            raise ValueError(f"baseline: one of {', '.join(self.attacks)}")
        return self
