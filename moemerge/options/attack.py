"""Options of attack."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from moemerge.options.base import Run, Source, TextFormat
from moemerge.options.gold import GoldSource


class AttackSettings(GoldSource):
    """Reward-guided search for rejected answers that a reward model overrates once they are edited.

    With gold, an edited answer counts only while its gold score is below the chosen one's.
    """

    max_pairs: int | None = Field(200, ge=1, description="largest number of pairs; they are drawn at random")
    search: Literal["guided", "random"] = Field(
        "guided",
        description="guided: edits that raise the score are kept until it is above the chosen answer's; "
        "random: 1 to steps edits of every answer, whatever they do: what guidance is compared with",
    )
    patch: Literal["rejected", "both"] = Field(
        "rejected",
        description="patch.jsonl has each found answer as the rejected one; both: also the same edits of the "
        "chosen answer, against the rejected one as it was, so that being edited is no sign of being worse",
    )
    edits: list[str] = Field(
        default_factory=list,
        description="edits to search among (default: all that keep the content; with gold all)",
    )
    words: list[str] = Field(
        default_factory=list, description="words that insert_word adds, in place of the built-in ones"
    )
    steps: int = Field(6, ge=1, description="largest number of edits of one answer, one after another")
    proposals: int = Field(12, ge=1, description="edits tried per step and answer of the beam")
    beam: int = Field(1, ge=1, description="answers kept per step; 1: greedy")
    confidence: float = Field(0.95, gt=0, lt=1, description="coverage of intervals")
    resamples: int = Field(2000, ge=100, description="bootstrap resamples")
    batch_tokens: int = Field(8192, ge=1, description="tokens per forward pass")


class Attack(AttackSettings, TextFormat, Run):
    """Options of `moemerge attack`."""

    POSITIONAL = ("model", "pairs")

    model: Source = Field(description="reward model: folder or hub name")
    pairs: Source = Field(description="preference pairs whose rejected answers are edited")
    trust_remote_code: bool = Field(False, description="run code that comes with the model")
