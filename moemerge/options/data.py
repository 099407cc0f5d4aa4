"""Options of the steps synthetic and data; part of recipe.py. Imports nothing heavy."""

from __future__ import annotations

from pydantic import Field

from moemerge.options.base import Options, Run, Source, Sources, TextFormat


class SyntheticSettings(Options):
    """A preference world with a known gold reward, and a tiny untrained Llama for it."""

    train_pairs: int = Field(5000, ge=10, description="training pairs")
    validation_pairs: int = Field(600, ge=10, description="held-out pairs for early stopping and fitting")
    test_pairs: int = Field(2000, ge=10, description="test pairs, in and out of distribution each")
    prompts: int = Field(100, ge=2, description="prompts with candidate answers")
    candidates: int = Field(256, ge=2, description="answers per prompt for best-of-n")
    label_noise: float = Field(
        0.2, ge=0, lt=0.5, description="share of flipped labels in training and validation pairs"
    )
    hidden_size: int = Field(64, ge=8, description="width of the tiny Llama")
    num_layers: int = Field(3, ge=1, description="layers of the tiny Llama")


class Synthetic(SyntheticSettings, Run):
    """Options of `moemerge.stages.synthetic.write_world`."""


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
    """Options of `moemerge.stages.data.prepare`."""

    tokenizer: Source | None = Field(None, description="model whose tokenizer measures max_length")
    scored: bool = Field(True, description="whether candidates must have gold scores")
