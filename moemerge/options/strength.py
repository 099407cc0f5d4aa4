"""Options of strength."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from moemerge.options.base import Options, Run, Source, SourceList, TextFormat
from moemerge.options.train import TrainSettings

SHARE = 0.2  # of pairs, which the paper flips
RELABELS = ("auto", "soft")  # treatments that need to know how often the vote errs
OF_TRAINING = (*TrainSettings.model_fields, "folds", "orders", "fold_by")
OF_VOTING = ("trusted", "planted")


class VoteSettings(Options):
    """How models vote on the labels of preference pairs, and what is done with what they doubt."""

    folds: int = Field(
        5, ge=2, le=20, description="parts of the pairs; each is scored by voters trained on the others"
    )
    orders: int = Field(3, ge=1, description="voters per part, each trained in an order of its own")
    fold_by: Literal["text", "prompt", "subset"] = Field(
        "text",
        description="what keeps pairs in one part: an equal prompt; text: an equal prompt or answer; subset: "
        "an equal subset or prompt",
    )
    planted: float = Field(
        0.05,
        ge=0,
        le=0.2,
        description="share of pairs whose labels are flipped for the voters: planted errors, to be found",
    )
    trusted: Source | None = Field(
        None, description="pairs like these with checked labels, to measure how often the vote errs"
    )
    noise: float | None = Field(
        None,
        gt=0,
        lt=0.5,
        description="in place of trusted: known share of wrong labels, equal for all kinds of pairs",
    )
    treat: Literal["none", "auto", "flip", "drop", "soft"] = Field(
        "none",
        description="auto: flip or drop (auto_by) as many of each subset's weakest pairs as are surely "
        "more than half wrong; flip, drop: the weakest share; soft: write each label's doubt",
    )
    auto_by: Literal["flip", "drop"] = Field("flip", description="what treat auto does with these pairs")
    share: float = Field(SHARE, gt=0, lt=1, description="flip and drop: share of pairs, the weakest ones")
    confidence: float = Field(0.95, gt=0, lt=1, description="coverage of intervals")
    batch_tokens: int = Field(8192, ge=1, description="tokens per forward pass when pairs are scored")

    @model_validator(mode="after")
    def _treatment_has_what_it_needs(self) -> VoteSettings:
        if self.trusted and self.noise:
            raise ValueError("trusted pairs tell the noise: give trusted or noise, not both")
        if self.treat in RELABELS and not self.knows_errors:
            raise ValueError(
                f"treat {self.treat} needs trusted or noise: without one of them, no vote tells wrong labels "
                "from errors of its own"
            )
        if self.share != SHARE and self.treat not in ("flip", "drop"):
            raise ValueError("share goes with treat flip or drop")
        if self.auto_by != "flip" and self.treat != "auto":
            raise ValueError("auto_by goes with treat auto")
        return self

    @property
    def knows_errors(self) -> bool:
        """Whether something may tell how often the vote errs."""
        return bool(self.trusted or self.noise)


class StrengthSettings(VoteSettings, TrainSettings):
    """A vote on the labels of preference pairs by models trained for it, and what is done about it.

    After Secrets of RLHF II (arXiv 2401.06080); the other options are those of the voters' training.
    """

    voters: SourceList = Field(
        default_factory=list,
        description="in place of training: reward models (or scorer.json) that vote as they are and have not "
        "seen the pairs",
    )
    votes: Source | None = Field(
        None,
        description="in place of training: folder that strength wrote for these pairs, to treat them "
        "differently by the same votes",
    )

    @model_validator(mode="after")
    def _only_what_trains_has_a_training(self) -> StrengthSettings:
        if self.voters and self.votes:
            raise ValueError("voters vote anew, votes are there already: give voters or votes, not both")
        idle = [name for name in OF_TRAINING if not self.trains and self.differs(name)]
        idle += [name for name in OF_VOTING if self.votes and self.differs(name)]
        if idle:
            raise ValueError(f"{idle[0]} does not go with {'votes' if self.votes else 'voters'}")
        return self

    @property
    def trains(self) -> bool:
        """Whether voters are trained."""
        return not (self.voters or self.votes)

    @property
    def knows_errors(self) -> bool:
        """As of any vote; votes may have those on trusted pairs."""
        return super().knows_errors or bool(self.votes)


class Strength(StrengthSettings, TextFormat, Run):
    """Options of `moemerge strength`."""

    POSITIONAL = ("pairs",)

    pairs: Source = Field(description="preference pairs whose labels are voted on")
    model: Source | None = Field(
        None, description="what voters are trained from: a reward model, or a base model (fresh head)"
    )
    validation: Source | None = Field(
        None, description="held-out pairs for the voters' early stopping and search"
    )
    trust_remote_code: bool = Field(False, description="run code that comes with the models")

    @model_validator(mode="after")
    def _one_kind_of_voters(self) -> Strength:
        if self.trains == (self.model is None) or (self.validation and not self.trains):
            raise ValueError(
                "voters are trained from model, with validation or without, or are the models that voters "
                "names, or votes has what they said: give one of these"
            )
        if self.search and self.validation is None:
            raise ValueError("search needs validation, held-out pairs to choose by")
        return self
