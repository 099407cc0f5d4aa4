"""Options of data."""

from __future__ import annotations

from pydantic import Field

from moemerge.options.base import Run, Source, Sources, TextFormat


class DataSettings(TextFormat):
    """Where a recipe's preference data comes from and how it is split."""

    train: Source | None = Field(None, description="training pairs: file or hub name:split")
    validation: Source | None = Field(None, description="held-out pairs; default: split off train")
    fit: Source | None = Field(
        None, description="pairs for fitting coefficients; default: the validation pairs"
    )
    tests: Sources = Field(default_factory=dict, description="name: file, test pairs")
    candidates: Sources = Field(
        default_factory=dict, description="name: file, scored candidates for best-of-n"
    )
    split_by: str | None = Field(
        None, description="row field whose values never straddle a split, e.g. topic"
    )
    validation_share: float = Field(0.1, ge=0, lt=1, description="share split off train for validation")
    test_share: float = Field(0.0, ge=0, lt=1, description="share split off train as test set 'test'")
    max_train: int | None = Field(None, ge=1, description="draw at most so many training pairs")
    max_validation: int | None = Field(None, ge=1, description="draw at most so many validation pairs")
    max_test: int | None = Field(None, ge=1, description="draw at most so many pairs per test set")
    max_prompts: int | None = Field(None, ge=1, description="draw at most so many prompts per candidate set")


class Data(DataSettings, Run):
    """Options of `moemerge data`."""

    tokenizer: Source | None = Field(None, description="model whose tokenizer measures max_length")
    scored: bool = Field(True, description="whether candidates must have gold scores")
