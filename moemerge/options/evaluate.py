"""Options of evaluate."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from moemerge.options.base import Run, Source, Sources, TextFormat
from moemerge.options.gold import GoldSource
from moemerge.options.placement import Placement


class EvaluateSettings(GoldSource):
    """Accuracy and over-optimisation of several models on the same data."""

    probes: list[str] = Field(
        default_factory=lambda: ["accuracy", "calibration", "rewardbench", "rmbench", "best_of_n"],
        description="what to measure; biases stands for all bias probes",
    )
    baseline: str | None = Field(None, description="model that the others are compared with, pair by pair")
    confidence: float = Field(0.95, gt=0, lt=1, description="coverage of intervals")
    resamples: int = Field(2000, ge=100, description="bootstrap resamples")
    sections: dict[str, list[str]] = Field(
        default_factory=dict,
        description="groups of subsets, each with an accuracy of its own: section=subset,subset",
    )
    rewardbench: Sources = Field(
        default_factory=dict,
        description="name=file, RewardBench 1 or 2 in its own columns; the prior sets of version 1 by their "
        "names (anthropic_helpful, anthropic_hhh, shp, summarize)",
    )
    rmbench: Sources = Field(
        default_factory=dict,
        description="name=file, RM-Bench in its own columns, read with rewardbench_template and "
        "rewardbench_max_length",
    )
    rewardbench_template: Literal["chat", "plain"] = Field(
        "chat",
        description="how RewardBench's rows become text; chat: by the tokenizer's template; plain: turns "
        "joined by newlines, for tokenizers without one",
    )
    rewardbench_max_length: int = Field(
        2048,
        ge=2,
        description="longest text of RewardBench in tokens; longer ones are cut, as in its own code",
    )
    max_pairs: int | None = Field(
        None, ge=1, description="largest number of pairs per test set; they are drawn at random"
    )
    batch_tokens: int = Field(8192, ge=1, description="tokens per forward pass")
    bias_pairs: int = Field(
        500, ge=1, description="largest number of pairs per test set that bias probes edit"
    )
    ensembles: dict[str, list[str]] = Field(
        default_factory=dict, description="name: models whose scores are combined, as ensemble_by says"
    )
    ensemble_by: list[Literal["mean", "worst", "variance"]] = Field(
        default_factory=lambda: ["mean", "worst", "variance"],  # type: ignore[arg-type]
        description="mean; worst: the lowest score (WCO); variance: mean - variance_penalty * variance (UWO)",
    )
    variance_penalty: float = Field(0.5, ge=0, description="of ensemble_by variance (arXiv 2310.02743)")

    @field_validator("ensembles")
    @classmethod
    def _different_members(cls, ensembles: dict[str, list[str]]) -> dict[str, list[str]]:
        for name, members in ensembles.items():
            if len(members) < 2 or len(set(members)) < len(members):
                raise ValueError(f"two or more different models in ensemble {name}")
        return ensembles

    def combinations(self) -> dict[str, tuple[list[str], str]]:
        """Every ensemble's name in the report, NAME-HOW: its members, and how their scores are combined."""
        ways = [(name, members, how) for name, members in self.ensembles.items() for how in self.ensemble_by]
        return {f"{name}-{how}": (members, how) for name, members, how in ways}


class Evaluate(EvaluateSettings, TextFormat, Placement, Run):
    """Options of `moemerge evaluate`."""

    POSITIONAL = ("models", "data")

    models: Sources = Field(
        description="folders or hub names, or a scorer.json; without name= each has the name of its folder"
    )
    data: Sources = Field(
        default_factory=dict,
        description="files or hub name:split; their columns show which are pairs, candidates, RewardBench or "
        "RM-Bench",
    )
    pairs: Sources = Field(default_factory=dict, description="files or hub name:split, preference pairs")
    candidates: Sources = Field(
        default_factory=dict, description="files or hub name:split, prompts with scored candidates"
    )
    calibration: Source | None = Field(
        None,
        description="folder written by calibrate; in ensembles each member's scores are divided by its scale",
    )
    trust_remote_code: bool = Field(False, description="run code that comes with the model")
