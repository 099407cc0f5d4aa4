"""Options of data."""

from __future__ import annotations

from pydantic import Field, field_validator

from moemerge.options.base import Run, Source, Sources, TextFormat


class DataSettings(TextFormat):
    """Where a recipe's preference data comes from and how it is split."""

    train: Source | None = Field(None, description="training pairs: file or hub name:split")
    validation: Source | None = Field(None, description="held-out pairs (default: split off train)")
    fit: Source | None = Field(
        None, description="pairs for fitting coefficients (default: the validation pairs)"
    )
    tests: Sources = Field(default_factory=dict, description="test pairs, a file per name")
    candidates: Sources = Field(
        default_factory=dict, description="scored candidates for best-of-n, a file per name"
    )
    split_by: str | None = Field(
        None, description="row field, e.g. topic: rows with the same value stay in one split"
    )
    validation_share: float = Field(0.1, ge=0, lt=1, description="share split off train for validation")
    test_share: float = Field(0.0, ge=0, lt=1, description="share split off train as test set 'test'")
    max_train: int | None = Field(
        None, ge=1, description="largest number of training pairs; they are drawn at random"
    )
    max_validation: int | None = Field(
        None, ge=1, description="largest number of validation pairs; they are drawn at random"
    )
    max_test: int | None = Field(
        None, ge=1, description="largest number of pairs per test set; they are drawn at random"
    )
    max_prompts: int | None = Field(
        None, ge=1, description="largest number of prompts per candidate set; they are drawn at random"
    )


class Data(DataSettings, Run):
    """Options of `moemerge data`."""

    POSITIONAL = ("train",)

    tokenizer: Source | None = Field(None, description="model whose tokenizer measures max_length")
    folds: int = Field(
        0,
        ge=0,
        description="parts of train for cross-fitting, by whole groups: folds/N/held_out, and all other "
        "parts as folds/N/train",
    )
    scored: bool = Field(True, description="whether candidates must have gold scores")

    @field_validator("folds")
    @classmethod
    def _more_than_one(cls, folds: int) -> int:
        if folds == 1:
            raise ValueError("0, or 2 and more")
        return folds
