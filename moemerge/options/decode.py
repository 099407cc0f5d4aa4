"""Options of guided decoding: a part of the options of attack and patch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from moemerge.options.base import Contradiction, Options, Source

Side = Literal["rejected", "chosen"]


class DecodeSettings(Options):
    """How a language model, guided by the reward model under attack, writes new answers."""

    policy: Source | None = Field(
        None,
        description="search decode: language model that writes the answers; ideally one that was trained "
        "to write answers of the side that is attacked",
    )
    other_policy: Source | None = Field(
        None,
        description="search decode, in place of gold: language model of the other side's answers; a new "
        "answer stays on its side while policy finds it more likely than this model does",
    )
    side: Side = Field(
        "rejected",
        description="search decode: rejected: bad answers that score above the chosen one; chosen: good "
        "answers that score below the rejected one",
    )
    keep: float = Field(
        0.25,
        ge=0,
        lt=1,
        description="search decode: share of the original answer's words that each new answer starts with",
    )
    answers: int = Field(1, ge=1, le=1000, description="search decode: new answers per pair")
    top: int = Field(
        5,
        ge=1,
        le=1000,
        description="search decode: number of most likely tokens among which the reward model chooses",
    )
    guidance: float = Field(
        0.5,
        ge=0,
        le=1,
        description="search decode: weight of the reward model against the policy; 0: the policy alone, "
        "the control for guidance",
    )
    temperature: float = Field(0.6, gt=0, description="search decode: sampling temperature")
    formula: Literal["balanced", "reform"] = Field(
        "balanced",
        description="search decode: balanced: log-probabilities and standardised scores, weighted by "
        "guidance; reform: sum of two softmaxes, as in REFORM's code, without guidance",
    )
    max_new_tokens: int = Field(
        128, ge=1, description="search decode: most new tokens per answer; longer answers are cut"
    )

    @property
    def is_guided_decoding(self) -> bool:
        """Whether the reward model has a say in what is written."""
        return self.guidance > 0 or self.formula == "reform"

    def decoding_set(self) -> list[str]:
        """The options of decoding that are not as they are by default."""
        return [name for name in DecodeSettings.model_fields if self.differs(name)]

    def check_decoding(self, has_gold: bool) -> None:
        """Raise Contradiction unless answers can be written, and something tells their class."""
        if self.policy is None:
            raise Contradiction("search decode needs a policy", "name a language model that writes answers")
        if has_gold and self.other_policy is not None:
            raise Contradiction("gold and other_policy exclude each other", "leave one of them out")
        if not has_gold and self.other_policy is None:
            raise Contradiction(
                "search decode writes new answers, and nothing says whether they are good or bad",
                "give gold_function or gold_model, or as other_policy a language model of the other side",
            )
        if self.formula == "reform" and self.differs("guidance"):
            raise Contradiction("formula reform has no guidance", "leave guidance out, or take balanced")
