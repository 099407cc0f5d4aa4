"""Options of export."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from moemerge.options.base import Members, Run, Source, TextFormat


class Export(Members, TextFormat, Run):
    """Options of `moemerge export`."""

    POSITIONAL = ("model", "coefficients")

    form: Literal["dense", "qwen2_moe", "linear"] = Field(
        "dense",
        description="dense: each expert or model as a model of its own; qwen2_moe: a MoE that stock "
        "transformers loads; linear: a model under a head of moemerge's own with a stock "
        "head instead, fitted to its scores by least squares",
    )
    pairs: Source | None = Field(None, description="form linear: pairs on whose texts the head is fitted")
    holdout: float = Field(
        0.2, gt=0, lt=1, description="form linear: share of pairs held out to compare both heads"
    )
    least_agreement: float = Field(
        0.95,
        ge=0,
        le=1,
        description="form linear: smallest share of held-out pairs on which both heads prefer the same "
        "answer; below it nothing is written",
    )
    batch_tokens: int = Field(8192, ge=1, description="form linear: tokens per forward pass")
    coefficients: Source | None = Field(
        None, description="folder written by fit: also writes linear.yml, the merge for stock mergekit"
    )
    shard_size: int = Field(5_000_000_000, ge=1, description="largest shard in bytes")

    @model_validator(mode="after")
    def _form_fits(self) -> Export:
        if self.form != "dense" and (self.models or self.coefficients):
            what = "a model" if self.form == "linear" else "a MoE as model"
            raise ValueError(f"form {self.form} goes with {what}, and without coefficients")
        if (self.form == "linear") != (self.pairs is not None):
            raise ValueError("form linear and pairs go together")
        return self
