"""Options of export."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from moemerge.options.base import Members, Run, Source


class Export(Members, Run):
    """Options of `moemerge export`."""

    POSITIONAL = ("model", "coefficients")

    form: Literal["dense", "qwen2_moe"] = Field(
        "dense", description="dense: each member by itself; qwen2_moe: a MoE as stock transformers knows it"
    )
    coefficients: Source | None = Field(
        None, description="folder written by fit: also writes linear.yml, the merge for stock mergekit"
    )
    shard_size: int = Field(5_000_000_000, ge=1, description="largest shard in bytes")

    @model_validator(mode="after")
    def _form_fits(self) -> Export:
        if self.form != "dense" and (self.models or self.coefficients):
            raise ValueError(f"form {self.form} goes with a MoE as model, and without coefficients")
        return self
