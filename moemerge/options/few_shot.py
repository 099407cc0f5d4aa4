"""Options of few_shot."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from moemerge.options.base import Run, Source, TextFormat
from moemerge.options.scorers import Question


class FewShotSettings(Question):
    """How a scorer is made of a language model and a few labelled pairs (Activation RM, arXiv 2507.01368)."""

    examples: int = Field(80, ge=8, le=500, description="pairs to learn from, drawn at random")
    shots: int = Field(
        4,
        ge=0,
        le=16,
        description="examples with right verdicts shown before each one while mean activations are taken",
    )
    select: Literal["reinforce", "greedy"] = Field(
        "reinforce",
        description="how attention heads are selected; greedy: those that help most individually",
    )
    steps: int = Field(600, ge=1, description="select reinforce: steps, one example each")
    masks: int = Field(32, ge=2, le=1024, description="select reinforce: sets of heads tried per step")
    learning_rate: float = Field(0.1, gt=0, description="select reinforce: learning rate (Adam)")
    draws: int = Field(
        10, ge=1, le=1000, description="select reinforce: sets drawn at the end; the best is kept"
    )


class FewShot(FewShotSettings, TextFormat, Run):
    """Options of `moemerge few-shot`."""

    POSITIONAL = ("model", "pairs")

    model: Source = Field(description="language model, folder or hub name; it is not trained")
    pairs: Source = Field(description="preference pairs, from which the examples are drawn")
    held_out: Source | None = Field(
        None, description="held-out pairs to measure on (default: the rest of pairs, with other prompts)"
    )
    max_held_out: int = Field(1000, ge=2, description="largest number of held-out pairs, drawn at random")
    confidence: float = Field(0.95, gt=0, lt=1, description="coverage of intervals")
    resamples: int = Field(2000, ge=100, description="bootstrap resamples")
    batch_tokens: int = Field(8192, ge=1, description="tokens per forward pass")
    trust_remote_code: bool = Field(False, description="run code that comes with the model")
