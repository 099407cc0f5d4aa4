"""Options of a refresh: a part of the options of optimise."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from moemerge.options.base import Contradiction, Options, Source
from moemerge.options.gold import Function

When = Literal["during", "before"]
RATES = {"all": 1e-5, "head": 1e-4, "experts": 1e-5, "coefficients": 0.05}


class RefreshSettings(Options):
    """Reward models that learn, while a policy trains, from its answers that a rule has judged (Cooper)."""

    refresh: dict[str, When] = Field(
        default_factory=dict,
        description="reward models that are refreshed, by name; during: while the policy trains; before: by "
        "as many updates on the first policy's answers, the control of equal budget; others stay as they are",
    )
    refresh_every: int = Field(1, ge=1, description="refresh: policy steps per update of a reward model")
    verifier: Function = Field(
        None,
        description="refresh: FILE.py:NAME or MODULE:NAME, a function of prompt and answer: 1 if the answer "
        "is right, 0 if it is wrong, None if it cannot say",
    )
    right_above: float | None = Field(
        None,
        description="refresh, in place of verifier: gold score above which answers are right, others wrong",
    )
    negatives: Literal["both", "answers", "made"] = Field(
        "both",
        description="refresh: answers: the policy's own wrong ones to the same prompt; made: right answers "
        "made wrong; both: made where there are no wrong ones",
    )
    corrupt: Function = Field(
        None,
        description="refresh: a function of prompt and right answer that makes a wrong one (default: words "
        "are deleted and change places)",
    )
    tries: int = Field(
        3, ge=1, le=100, description="refresh: most attempts to make an answer that the rule calls wrong"
    )
    refresh_trains: Literal["all", "head", "experts", "coefficients"] = Field(
        "all",
        description="refresh: what of the reward model trains; coefficients: only how a MoE's experts "
        "are merged; the merge is then the reward model",
    )
    refresh_coefficients: Source | None = Field(
        None,
        description="refresh_trains coefficients: folder written by fit, to start from (default: equal ones)",
    )
    refresh_learning_rate: float | None = Field(
        None, gt=0, description="refresh: default 1e-5, head 1e-4, coefficients 0.05 (of their logits)"
    )
    refresh_center: float = Field(
        0.01, ge=0, description="refresh: weight of the pair's squared sum of scores, which holds their level"
    )
    replay_pairs: Source | None = Field(
        None, description="refresh: pairs that the model was trained on, to be mixed in"
    )
    replay: float = Field(0.5, ge=0, lt=1, description="refresh: share of replay_pairs in an update")
    held_out_pairs: Source | None = Field(
        None, description="pairs on which the reward models' accuracy is measured while the policy trains"
    )

    def check_refresh(self, has_credit: bool) -> None:
        """Raise Contradiction unless what is said of refreshing goes together."""
        if not self.refresh:
            left = set(RefreshSettings.model_fields) - {"held_out_pairs"}
            if strange := sorted(name for name in left if self.differs(name)):
                raise Contradiction(f"{strange[0]} needs refresh", "name the reward models to refresh")
            return
        if (self.verifier is None) == (self.right_above is None):
            raise Contradiction(
                "refresh needs one rule that says which answers are right", "give verifier or right_above"
            )
        if has_credit:
            raise Contradiction("refresh and credit token exclude each other", "leave one of them out")
        self._check_parts()

    def _check_parts(self) -> None:
        needs = {
            "corrupt": self.negatives != "answers",
            "tries": self.negatives != "answers",
            "replay": self.replay_pairs is not None,
            "refresh_coefficients": self.refresh_trains == "coefficients",
        }
        wanted = {
            "corrupt": "negatives both or made",
            "tries": "negatives both or made",
            "replay": "replay_pairs",
            "refresh_coefficients": "refresh_trains coefficients",
        }
        for name, given in needs.items():
            if self.differs(name) and not given:
                raise Contradiction(f"{name} needs {wanted[name]}", f"give it, or leave {name} out")

    @property
    def rate(self) -> float:
        """The learning rate of what is refreshed."""
        return self.refresh_learning_rate or RATES[self.refresh_trains]
