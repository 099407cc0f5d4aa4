"""What may score answers besides a classifier: kinds of scorers, and the options of each, as scorer.json has.

To add one: its options here, its file in models/scorers/, and a row of the table (docs/extending.md).
"""

from __future__ import annotations

from typing import NamedTuple

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


class Row(NamedTuple):
    """A kind of scorer: its options, and what opens one, as "module:name"."""

    options: str
    opener: str


ROWS = {
    "implicit": Row("moemerge.options.scorers:Implicit", "moemerge.models.scorers.implicit:ImplicitScorer"),
}
KIND = "kind of scorer"
OPTIONS: Registry[type[Options]] = Registry(KIND, {kind: row.options for kind, row in ROWS.items()})
