"""Options of patch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from moemerge.options.base import Run, Source, TextFormat
from moemerge.options.decode import DecodeSettings
from moemerge.options.gold import GoldSource


class PatchSettings(DecodeSettings, GoldSource, TextFormat):
    """A reward model is attacked, trained on with a few of the answers found, and attacked again.

    With gold, an answer that is found counts only while gold has it on its old side.
    """

    model: Source = Field(description="reward model: folder or hub name")
    pairs: Source = Field(description="pairs to attack and to train on: file or hub name:split")
    test: Source | None = Field(
        None, description="other pairs, to measure the patch on (default: a share of pairs)"
    )
    test_share: float = Field(
        0.3, gt=0, lt=1, description="without test: share of the prompts held out for it"
    )
    split_by: str | None = Field(
        None, description="row field, e.g. topic: rows with the same value stay on one side of the split"
    )
    search: Literal["guided", "decode"] = Field(
        "guided",
        description="what the patch is made of: guided: answers edited under the guidance of the model's "
        "score; decode: answers that a language model writes under that guidance",
    )
    unseen: list[str] = Field(
        default_factory=lambda: ["flattery", "agreement", "bold", "bullets", "headings", "emoji"],
        description="edits kept out of every patch, to see whether it helps against more than it was made of",
    )
    rounds: int = Field(1, ge=1, le=10, description="attacks and trainings, each on the model of the last")
    share: float = Field(0.05, gt=0, lt=1, description="share of the training pairs that come from the patch")
    epochs: float = Field(1.0, gt=0, description="passes over the pairs per round")
    learning_rate: float = Field(1e-5, gt=0, description="learning rate")
    batch_size: int = Field(8, ge=1, description="pairs per step")
    train_layers: str = Field("all", description="transformer layers that train, such as last:4")
    controls: bool = Field(
        True,
        description="train two rivals for as many steps: on ordinary pairs alone, and with as many pairs "
        "whose edits are random (of decode: that were written without guidance)",
    )
    max_pairs: int = Field(200, ge=1, description="largest number of pairs to attack, drawn at random")
    steps: int = Field(6, ge=1, description="attack: most edits per answer")
    proposals: int = Field(12, ge=1, description="attack: edits tried per step")
    words: list[str] = Field(default_factory=list, description="attack: words that insert_word adds")
    confidence: float = Field(0.95, gt=0, lt=1, description="coverage of intervals")
    resamples: int = Field(2000, ge=100, le=100_000, description="bootstrap resamples")

    @model_validator(mode="after")
    def _something_unseen(self) -> PatchSettings:
        if not self.unseen:
            raise ValueError("unseen: one edit at least, to see whether the patch helps against other ones")
        return self

    @model_validator(mode="after")
    def _one_search(self) -> PatchSettings:
        if self.search == "decode":
            self.check_decoding(self.has_gold)
        elif strange := self.decoding_set():
            raise ValueError(f"{strange[0]} goes with search decode")
        return self


class Patch(PatchSettings, Run):
    """Options of `moemerge patch`."""

    POSITIONAL = ("model", "pairs")
