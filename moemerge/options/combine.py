"""Options of combine."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from moemerge.options.base import Run, Source, Sources, refuse_twice
from moemerge.options.choose import ChooseSettings


class CombineSettings(ChooseSettings):
    """Reward models that are good at different things -> the one dense model to use, and why."""

    language_models: Sources = Field(  # before models: whether one of these is enough hangs on it
        default_factory=dict,
        description="with one reward model: language models of its base that know what it lacks; each is "
        "averaged into it, but for the head, with the weight that suits the pairs best "
        "(DogeRM)",
    )
    models: Sources = Field(description="two reward models or more, of one architecture")
    base: Source | None = Field(
        None,
        description="the model that all of them were trained from, with or without a reward head (default: "
        "the start that moemerge train recorded in all; without one, averages only, no sums)",
    )
    pairs: Source = Field(
        description="your own preference pairs, a few dozen at least: file or hub name:split"
    )
    split_by: str | None = Field(
        None, description="row field, e.g. topic: rows with the same value are held out together"
    )
    folds: int = Field(3, ge=2, le=20, description="parts of the pairs; each is held out in turn")
    tune: Literal["all", "merges", "none"] = Field(
        "all",
        description="what is also tried after training on the pairs: all (models and merges), merges, or "
        "none",
    )
    form: Literal["dense", "moe"] = Field(
        "dense",
        description="moe: also try a mixture whose gate picks one model's MLPs by the prompt: the "
        "compute of one model, the memory of all (decoders only; loading it needs moemerge)",
    )
    epochs: float = Field(1.0, gt=0, description="tuning: passes over the pairs")
    learning_rate: float = Field(1e-5, gt=0, description="tuning: learning rate")
    batch_size: int = Field(8, ge=1, description="tuning: pairs per step")
    train_layers: str = Field("all", description="tuning: transformer layers that train, such as last:4")
    scale: float | None = Field(
        None, gt=0, description="sum: total of the coefficients c (default: 2, so 2/M for each of M models)"
    )
    granularity: Literal["global", "group", "layer", "matrix"] = Field(
        "global", description="fitted coefficients: what shares one set of them"
    )
    l2: float = Field(
        0.03, ge=0, description="fitted coefficients: L2 penalty on the distance to those of the sum"
    )
    max_epochs: int = Field(10, ge=1, description="fitted coefficients: most passes over the pairs")

    @field_validator("models")
    @classmethod
    def _enough_models(cls, models: dict[str, str], info: ValidationInfo) -> dict[str, str]:
        if len(models) < (1 if info.data.get("language_models") else 2):
            raise ValueError("two models at least, as name=source or sources alone")
        return models

    @model_validator(mode="after")
    def _something_to_merge(self) -> CombineSettings:
        if self.language_models and (len(self.models) > 1 or self.base or self.form == "moe"):
            raise ValueError("language_models go with one reward model, without base and form moe")
        refuse_twice([*self.models.values()])
        return self

    @model_validator(mode="after")
    def _names_apart(self) -> CombineSettings:
        made = {*RESERVED, *map(with_language_model, self.language_models)}
        candidates = {*made, *(f"{name}-tuned" for name in (*self.models, *made))}
        if clash := sorted(candidates & {*self.models}):
            raise ValueError(f"models: another name than {clash[0]}, which a candidate has")
        return self


class Combine(CombineSettings, Run):
    """Options of `moemerge combine`."""

    POSITIONAL = ("models", "pairs")


MARK = "scores"  # the ensemble that is shown beside the candidates, as MARK-mean
ROUTED = "routed"  # the candidate of form moe


def with_language_model(name: str) -> str:
    """The candidate into which the language model `name` is averaged."""
    return f"with-{name}"


RESERVED = {"uniform", "sum", "fitted", ROUTED, MARK, f"{MARK}-mean"}
