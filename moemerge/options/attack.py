"""Options of attack."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from moemerge.options.base import Run, Source, TextFormat
from moemerge.options.decode import DecodeSettings
from moemerge.options.gold import GoldSource

OF_EDITS = ("patch", "edits", "words", "steps", "proposals", "beam")


class AttackSettings(DecodeSettings, GoldSource):
    """Reward-guided search for answers that a reward model puts on the wrong side of their pair.

    They are rejected answers with edits, or answers that a language model writes. With gold, an edited answer
    counts only while its gold score is below the chosen one's.
    """

    max_pairs: int | None = Field(200, ge=1, description="largest number of pairs; they are drawn at random")
    search: Literal["guided", "random", "decode"] = Field(
        "guided",
        description="guided: keep edits that raise the score until it is above the chosen answer's; "
        "random: 1 to steps random edits of every answer, the control for guidance; decode: "
        "a language model (policy) writes new answers, and the reward model has a say in "
        "each token",
    )
    patch: Literal["rejected", "both"] = Field(
        "rejected",
        description="patch.jsonl has each found answer as the rejected one; both: also the same edits of the "
        "chosen answer, against the rejected one as it was, so that being edited is no sign of being worse",
    )
    edits: list[str] = Field(
        default_factory=list,
        description="edits to search among (default: all that keep the content; with gold, all)",
    )
    words: list[str] = Field(
        default_factory=list, description="words that insert_word adds, in place of the built-in ones"
    )
    steps: int = Field(6, ge=1, description="most edits per answer, one after another")
    proposals: int = Field(12, ge=1, description="edits tried per step for each answer of the beam")
    beam: int = Field(1, ge=1, description="beam width: answers kept per step; 1: greedy")
    confidence: float = Field(0.95, gt=0, lt=1, description="coverage of intervals")
    resamples: int = Field(2000, ge=100, description="bootstrap resamples")
    batch_tokens: int = Field(8192, ge=1, description="tokens per forward pass or decoding batch")

    @model_validator(mode="after")
    def _one_search(self) -> AttackSettings:
        decoding = self.search == "decode"
        strange = [name for name in OF_EDITS if self.differs(name)] if decoding else self.decoding_set()
        if strange:
            home = "guided or random" if decoding else "decode"
            raise ValueError(f"{strange[0]} goes with search {home}")
        if decoding:
            self.check_decoding(self.has_gold)
        return self

    @property
    def is_guided(self) -> bool:
        """Whether the reward model has a say in what is tried."""
        return self.search == "guided" or (self.search == "decode" and self.is_guided_decoding)


class Attack(AttackSettings, TextFormat, Run):
    """Options of `moemerge attack`."""

    POSITIONAL = ("model", "pairs")

    model: Source = Field(description="reward model: folder or hub name, or a scorer.json")
    pairs: Source = Field(description="preference pairs whose rejected answers are edited")
    trust_remote_code: bool = Field(False, description="run code that comes with the model")
