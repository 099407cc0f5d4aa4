"""Options of gate."""

from __future__ import annotations

from pydantic import Field

from moemerge.options.base import Run, Source, TextFormat


class Gate(TextFormat, Run):
    """Options of `moemerge gate`."""

    POSITIONAL = ("model", "pairs")

    model: Source = Field(description="MoE folder of upcycle with experts, gate prompt and no shared_expert")
    pairs: Source = Field(
        description="preference pairs with many different prompts: they say which expert suits which prompt"
    )
    max_pairs: int | None = Field(
        None, ge=1, description="number of pairs to use, the first ones (default: all)"
    )
    batch_tokens: int = Field(8192, ge=1, description="tokens per forward pass")
    shard_size: int = Field(5_000_000_000, ge=1, description="largest shard in bytes")
