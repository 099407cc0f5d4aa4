"""Options of route."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from moemerge.options.base import Options, Run, Source, TextFormat
from moemerge.options.placement import Placement


class RouteSettings(Options):
    """Routing statistics of a MoE over preference pairs."""

    max_pairs: int | None = Field(
        None, ge=1, description="number of pairs to use, the first ones (default: all)"
    )
    batch_tokens: int = Field(8192, ge=1, description="tokens per forward pass")
    diversity: Literal["none", "weights", "all"] = Field(
        "none",
        description="how experts differ; weights: their updates; all: also verdicts, loss barriers and "
        "speculative experts (with 7 experts 100 passes over probe_pairs)",
    )
    probe_pairs: int = Field(
        200, ge=8, description="with diversity all: number of pairs to use, the first ones"
    )


class Route(RouteSettings, TextFormat, Placement, Run):
    """Options of `moemerge route`."""

    POSITIONAL = ("model", "pairs")

    model: Source = Field(description="MoE folder")
    pairs: Source = Field(description="preference pairs")
