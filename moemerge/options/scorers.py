"""What may score answers besides a classifier: kinds of scorers, and the options of each, as scorer.json has.

To add one: its options here, its file in models/scorers/, and a row of the table (docs/extending.md).
Other packages add classes like those in models/scorers/, with their options as `Options`.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, cast

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

    form: Literal["scalar", "ranked"] = Field(
        "scalar",
        description="scalar: whether an answer meets the criterion, yes or no; ranked: which of two answers "
        "does so better, A or B, in both orders: for rows of two answers only",
    )
    criterion: str = Field(
        "it is helpful, correct and harmless",
        min_length=1,
        max_length=2000,
        description="criterion that answers are judged by, as the end of a question",
    )
    yes: str = Field("Yes", min_length=1, description="good verdict, a single token (form ranked: A)")
    no: str = Field("No", min_length=1, description="bad verdict, a single token (form ranked: B)")


class Judge(Question):
    """A language model as judge: its log-odds of one verdict over the other (arXiv 2306.05685)."""

    model: Source = Field(description="language model, best one that follows instructions")
    shots: Source | None = Field(
        None, description="preference pairs that are shown first, with right verdicts (default: none)"
    )
    examples: int = Field(4, ge=1, le=64, description="how many of these, the first ones")


class Activation(Question):
    """What few_shot writes: a judge some of whose heads are replaced, or read (arXiv 2507.01368)."""

    model: Source = Field(description="language model whose heads these are")
    fingerprint: str | None = Field(None, description="checksum of its weights (default: not checked)")
    heads: Source = Field("heads.safetensors", description="places of heads, and numbers for each")
    read: Literal["verdict", "projection"] = Field(
        "verdict",
        description="verdict: heads have these activations, and the log-odds of the verdict count; "
        "projection: the heads' own activations, times these numbers, summed",
    )


class Pessimistic(Options):
    """A reward model's score less a multiple of its standard deviation under its head's noise (BNRM)."""

    model: Source = Field(
        description="reward model whose head has noise: nonnegative, or mlp with head_noise"
    )
    deviations: float = Field(
        1.0, ge=0, description="how many standard deviations are taken off, of 0 the score as it is"
    )


class Row(NamedTuple):
    """A kind of scorer: its options, and what opens one, as "module:name"."""

    options: str
    opener: str


ROWS = {
    "implicit": Row("moemerge.options.scorers:Implicit", "moemerge.models.scorers.implicit:ImplicitScorer"),
    "judge": Row("moemerge.options.scorers:Judge", "moemerge.models.scorers.judge:JudgeScorer"),
    "activation": Row(
        "moemerge.options.scorers:Activation", "moemerge.models.scorers.activation:ActivationScorer"
    ),
    "pessimistic": Row(
        "moemerge.options.scorers:Pessimistic", "moemerge.models.scorers.pessimistic:PessimisticScorer"
    ),
}
KIND = "kind of scorer"
OPTIONS: Registry[type[Options]] = Registry(KIND, {kind: row.options for kind, row in ROWS.items()})
# What opens one: called with source, options, trust_remote_code.
SCORERS: Registry[Any] = Registry(
    KIND,
    {kind: row.opener for kind, row in ROWS.items()},
    group="scorers",
    needs=("Options", "reader", "load"),
)


def options_of(kind: str) -> type[Options]:
    """The options of a kind of scorer. Raises as Registry.get."""
    return OPTIONS.get(kind) if kind in OPTIONS else cast("type[Options]", SCORERS.get(kind).Options)
