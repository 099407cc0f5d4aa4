"""Options of a reward head that training draws anew."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from moemerge.options.base import MAX_SEED, Options

# What takes part only beside one of these kinds of head.
ONLY_WITH_HEAD = {
    "head_width": ("mlp", "nonnegative"),
    "head_dropout": ("mlp", "nonnegative"),
    "head_noise": ("mlp", "nonnegative"),
    "head_start": ("nonnegative",),
    "head_seed": ("linear", "mlp", "nonnegative"),
}
OWN = ONLY_WITH_HEAD["head_seed"]  # of another package's head it is not known what it takes
NOISY = ("nonnegative",)  # kinds with noise unless it is said otherwise


class HeadOptions(Options):
    """A fresh reward head, what it is like and how it trains."""

    head: str | None = Field(
        None,
        description="draw a new reward head, in place of an existing one: linear, the stock one; mlp, "
        "two layers and a weighted sum; nonnegative, BNRM's, whose factors and weights are "
        "never below 0 and are drawn in training. Models with one of the last two need "
        "moemerge to be loaded",
    )
    head_width: int = Field(1024, ge=1, description="mlp, nonnegative: width of their layers")
    head_dropout: float = Field(0.1, ge=0, lt=1, description="mlp, nonnegative: dropout on the last state")
    head_noise: bool | None = Field(
        None,
        description="mlp, nonnegative: Weibull noise on factors and weights in training (default: "
        "nonnegative yes, mlp no)",
    )
    head_start: Literal["positive", "uniform"] = Field(
        "positive",
        description="nonnegative: initial weights; positive: all above 0; uniform: the paper's, where "
        "half are 0 for ever",
    )
    head_seed: int | None = Field(
        None,
        ge=0,
        le=MAX_SEED,
        description="seed that the new head is drawn from (default: seed); models whose heads were drawn "
        "alike can be averaged whole",
    )
    head_kl: float = Field(
        1e-5, ge=0, description="nonnegative head with noise: weight of the KL divergence from its prior"
    )
    head_learning_rate: float | None = Field(
        None, gt=0, description="learning rate of the reward head (default: learning_rate)"
    )

    @model_validator(mode="after")
    def _head_options_have_a_head(self) -> HeadOptions:
        for name, kinds in ONLY_WITH_HEAD.items():
            if self.differs(name) and (self.head is None or self.head in set(OWN) - set(kinds)):
                raise ValueError(f"{name} needs head {' or '.join(kinds)}")
        return self

    @property
    def noisy_head(self) -> bool:
        """Whether the new head is to draw its factors and weights in training."""
        return self.head in NOISY if self.head_noise is None else self.head_noise
