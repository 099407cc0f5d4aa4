"""Settings of the stage evaluate; recipe.py makes the stage's options of them. Imports nothing heavy."""

from __future__ import annotations

from pydantic import Field

from moemerge.policy_settings import GoldSource


class EvaluateSettings(GoldSource):
    """Accuracy and over-optimisation of several models on the same data."""

    probes: list[str] = Field(
        default_factory=lambda: ["accuracy", "best_of_n"], description="what to measure"
    )
    baseline: str | None = Field(None, description="model that the others are compared with, pair by pair")
    confidence: float = Field(0.95, gt=0, lt=1, description="coverage of intervals")
    resamples: int = Field(2000, ge=100, description="bootstrap resamples")
    batch_tokens: int = Field(8192, ge=1, description="tokens per forward pass")
