"""What may score answers besides a classifier: kinds of scorers, and the options of each, as scorer.json has.

To add one: its options here, its file in models/scorers/, and a row of the table (docs/extending.md).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from pydantic import Field

from moemerge.options.base import Options, Source
from moemerge.registry import Registry


class Implicit(Options):
    """The reward that a policy stands for: beta log pi(answer | prompt) / reference(answer | prompt).

    DPO's implicit reward (arXiv 2305.18290, equation 5); without a reference RewardBench's own without one.
    """

    policy: Source = Field(description="language model trained by DPO or the like")
    reference: Source | None = Field(
        None, description="language model that it was trained from, of the same tokenizer (default: none)"
    )
    beta: float = Field(0.1, gt=0, description="what the log ratio is multiplied by: that of the training")
    per_token: bool = Field(False, description="mean over the answer's tokens in place of their sum")


class Question(Options):
    """What a language model is asked about answers; its verdict is the next token."""

    model: Source = Field(description="language model, best one that follows instructions")
    form: Literal["scalar", "ranked"] = Field(
        "scalar",
        description="scalar: whether an answer meets the criterion, yes or no; ranked: which of two answers "
        "does so better, A or B, in both orders: for rows of two answers only",
    )
    criterion: str = Field(
        "it is helpful, correct and harmless", min_length=1, max_length=2000, description="what is asked for"
    )
    yes: str = Field("Yes", min_length=1, description="verdict, a single token; of form ranked A is one")
    no: str = Field("No", min_length=1, description="the other verdict; of form ranked B")


class Judge(Question):
    """A language model as judge: its log-odds of one verdict over the other (arXiv 2306.05685)."""

    shots: Source | None = Field(
        None, description="preference pairs that are shown first, with right verdicts (default: none)"
    )
    examples: int = Field(4, ge=1, le=64, description="how many of these, the first ones")


class Row(NamedTuple):
    """A kind of scorer: its options, and what opens one, as "module:name"."""

    options: str
    opener: str


ROWS = {
    "implicit": Row("moemerge.options.scorers:Implicit", "moemerge.models.scorers.implicit:ImplicitScorer"),
    "judge": Row("moemerge.options.scorers:Judge", "moemerge.models.scorers.judge:JudgeScorer"),
}
KIND = "kind of scorer"
OPTIONS: Registry[type[Options]] = Registry(KIND, {kind: row.options for kind, row in ROWS.items()})
