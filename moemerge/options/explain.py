"""Options of explain."""

from __future__ import annotations

from pydantic import Field

from moemerge.options.base import Run, Source, TextFormat


class Explain(TextFormat, Run):
    """Options of `moemerge explain`."""

    POSITIONAL = ("model", "pairs")

    model: Source = Field(description="reward model: a decoder, dense or MoE")
    pairs: Source = Field(description="preference pairs whose answers are explained")
    max_pairs: int | None = Field(500, ge=1, description="largest number of pairs; they are drawn at random")
    least: int = Field(
        5, ge=2, description="fewest prompts in whose answers a phrase must occur to be reported"
    )
    shown: int = Field(
        12,
        ge=0,
        le=200,
        description="pairs shown with their texts: half of them the most wrongly ranked, half drawn at "
        "random",
    )
    batch_tokens: int = Field(8192, ge=1, description="tokens per forward pass")
    confidence: float = Field(0.95, gt=0, lt=1, description="coverage of intervals")
    trust_remote_code: bool = Field(False, description="run code that comes with the model")
