"""Options of audit."""

from __future__ import annotations

from pydantic import Field, field_validator

from moemerge.options.base import Run, Source, Sources, TextFormat


class AuditSettings(TextFormat):
    """How far reward models can be trusted: measured on pairs, under edits, and under attack."""

    models: Sources = Field(description="reward models: folders, hub names or scorer.json files")
    pairs: Source = Field(
        description="preference pairs that the models were not trained on: file or hub name:split"
    )
    candidates: Source | None = Field(
        None, description="prompts with scored answers, for best-of-n: file or hub name:split"
    )
    max_pairs: int | None = Field(1000, ge=1, description="largest number of pairs; they are drawn at random")
    attack_pairs: int = Field(200, ge=1, description="largest number of pairs to attack")
    steps: int = Field(6, ge=1, description="attack: most edits per answer")
    proposals: int = Field(12, ge=1, description="attack: edits tried per step")
    confidence: float = Field(0.95, gt=0, lt=1, description="coverage of intervals")
    resamples: int = Field(2000, ge=100, le=100_000, description="bootstrap resamples")

    @field_validator("models")
    @classmethod
    def _one_at_least(cls, models: dict[str, str]) -> dict[str, str]:
        if not models:
            raise ValueError("one model at least")
        return models


class Audit(AuditSettings, Run):
    """Options of `moemerge audit`."""

    POSITIONAL = ("models", "pairs")
