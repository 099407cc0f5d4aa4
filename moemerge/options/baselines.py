"""The section baselines of a recipe: what the run adds to hold a MoE and its merges against."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from moemerge.options.base import Options


class BaselineSettings(Options):
    """What a MoE and its merges are measured against besides the control; all train as the control does."""

    same_flops: bool = Field(
        False, description="train the control once more, for as many FLOPs as the MoE's training takes"
    )
    untreated: bool = Field(
        False,
        description="with strength: a model trained on labels as they came, for as many FLOPs as vote and "
        "control take: what the vote is worth",
    )
    plain: bool = Field(
        False,
        description="a model trained as the control, for as many FLOPs, but by plain Bradley-Terry, without "
        "further objectives, smoothing or margins: what these are worth",
    )
    heads: bool = Field(
        False,
        description="with a head in the control: the control under each other one, linear, mlp, mlp with "
        "noise, with the same search: what the head, and what its noise, is worth",
    )
    fine_tunes: int = Field(
        0,
        ge=0,
        description="number of fine-tunes of the dense model, in other orders, to average and combine",
    )
    budget: Literal["full", "split"] = Field(
        "full",
        description="of each fine-tune; full: the control's, which is then one of them; split: a share of it",
    )
    warm: bool = Field(True, description="with fine_tunes: their average (WARM, arXiv 2401.12187)")
    ensemble: bool = Field(
        True, description="with fine_tunes: their scores combined, as evaluate.ensemble_by says"
    )

    tuned: bool = Field(
        False, description="the control trained further on data.fit, which learned coefficients have seen too"
    )

    @model_validator(mode="after")
    def _more_than_one(self) -> BaselineSettings:
        if self.fine_tunes == 1:
            raise ValueError("fine_tunes is 0, or 2 and more: one alone is no ensemble")
        return self

    def of_control(self) -> bool:
        """Whether any is asked for: all share the control's training."""
        own = self.same_flops or self.untreated or self.plain or self.heads
        return bool(own or self.fine_tunes or self.tuned)
