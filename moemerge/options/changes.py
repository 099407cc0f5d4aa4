"""Options of changes."""

from __future__ import annotations

from pydantic import Field

from moemerge.options.base import Run, Several, Source, TextFormat


class ChangesOptions(TextFormat, Run):
    """Options of `moemerge changes`."""

    POSITIONAL = ("models", "base")

    models: Several = Field(description="two models or more; without name= each has the name of its folder")
    base: Source = Field(description="the model that all of them were trained from")
    pairs: Source | None = Field(
        None, description="preference pairs, to measure the loss barriers between the models too"
    )
    max_pairs: int | None = Field(
        None, ge=1, description="number of pairs to use, the first ones (default: all)"
    )
    batch_tokens: int = Field(8192, ge=1, description="tokens per forward pass")
